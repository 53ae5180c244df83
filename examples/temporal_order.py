"""Which of two symbols came first? A recurrent network, and the cliff it trains on.

    pip install "optaxclip[examples]"
    python temporal_order.py    # twelve runs of eight seeds: a table, a picture, logs
    python temporal_order.py --clip none,percentile --lengths 20 --seeds 32
    python temporal_order.py --rate 0.01 --updates 60000        # as the authors trained

Pascanu, Mikolov and Bengio ("On the difficulty of training recurrent neural networks",
2013) clipped gradients for this task: two of the symbols of a sequence are an A or a B,
the others mean nothing, and after the last one a plain tanh network (Flax NNX) says
which two there were, and in which order. The longer the sequence, the steeper the
cliffs of its loss, and plain SGD leaps off them. Every clip gets the same networks and
the same sequences. `vmap` trains all seeds of a run at once, `scan` makes many updates
in one call, and several devices share the seeds. The script also draws the authors'
own picture of a cliff: the error of one unit.

With the defaults it prints this table; `updates` is the median number until a network
solves the task:

length  clip         solved   95% interval  updates  clipped  largest norm
    10  none            8/8    68% to 100%      100     0.0%           8.6
    10  global 1        8/8    68% to 100%      100    50.5%           5.2
    10  percentile      8/8    68% to 100%      100   100.0%           2.7
    10  step 0.03       8/8    68% to 100%      200     0.0%           1.4
    20  none            2/8      7% to 59%    >2500     0.0%         131.2
    20  global 1        8/8    68% to 100%      550    37.2%         137.5
    20  percentile      8/8    68% to 100%      650    56.5%         130.7
    20  step 0.03       8/8    68% to 100%      800     0.0%           3.7
    30  none            0/8      0% to 32%    >2500     0.0%         337.7
    30  global 1        6/8     41% to 93%     1450    36.9%         360.4
    30  percentile      4/8     22% to 78%    >2500    66.1%        2232.1
    30  step 0.03       0/8      0% to 32%    >2500     0.0%           5.4

`step` clips what flows back through each time step, inside the network, by
`clip_cotangent`. Gradients no longer explode, but at 30 symbols no seed solves the task
within 2,500 updates. Some do if the whole gradient is clipped: 6 of 8 with `global`,
and 4 of 8 with `percentile`, whose interval overlaps. (`clipped` counts only clips of
the whole gradient.) The norm of the gradient that flows back through time, for the
network and the batch with the largest gradient of any run:

back in time    after the last step  after the first
no clip                      0.1121         423.7861
norm held to 0.03            0.0300           0.0300

The suffix of a name lists the axes of its array: S seeds, B batch, T time, I inputs, H
hidden units, K classes, C checks, X random numbers.
"""

import argparse
import csv
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from tqdm import tqdm

import optaxclip
from optaxclip.audit import ClipLog, read, report


@dataclasses.dataclass(frozen=True)
class Config:
    # The comparison.
    clip: str = "none,global,percentile,step"  # runs to make, from CLIPS
    lengths: str = "10,20,30"  # symbols per sequence; every clip meets each length
    seeds: int = 8  # networks a run, trained at the same time
    max_norm: float = 1.0  # global: largest norm of the gradient
    max_flow: float = 0.03  # step: largest norm of what flows back through a time step
    # The training.
    updates: int = 2500  # give up on a network after so many
    every: int = 100  # updates between two checks whether a network solves it
    batch: int = 20  # sequences a batch
    rate: float = 0.1  # learning rate of plain SGD
    units: int = 50  # hidden units
    # A network solves the task once it gets 99% of so many sequences right.
    check: int = 500  # fresh sequences a check
    # The machine.
    cpu_devices: int = 2  # devices that share the seeds, if there is only a CPU
    out: str = "runs/temporal_order"  # folder for metrics, logs, reports, picture


def read_config() -> Config:
    """Options of the command line for all fields; the comments above are their help."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag, type=field.type, default=field.default, help=text)
    return Config(**vars(parser.parse_args()))


def lengths(config: Config) -> list[int]:
    return [int(length) for length in config.lengths.split(",")]


# --- clips ----------------------------------------------------------------------------


def sgd(config: Config, clip: optax.GradientTransformation) -> Any:
    return optax.chain(clip, optax.sgd(config.rate))


# A line a run: from the configuration to the optimizer.
CLIPS = {
    # An infinite threshold clips nothing, and measures all the same.
    "none": lambda c: sgd(c, optaxclip.clip_by_global_norm(jnp.inf)),
    # What the authors did, by hand.
    "global": lambda c: sgd(c, optaxclip.clip_by_global_norm(c.max_norm)),
    # What nobody has to tune.
    "percentile": lambda c: sgd(c, optaxclip.clip_by_percentile()),
    # Nothing here: the network clips what flows back through each of its time steps.
    "step": lambda c: sgd(c, optaxclip.clip_by_global_norm(jnp.inf)),
    # As percentile, and a step that is not finite changes nothing at all.
    "skip": lambda c: optaxclip.skip_nonfinite(sgd(c, optaxclip.clip_by_percentile())),
}


def label(config: Config, name: str) -> str:
    """The name of a run, with the one threshold that somebody had to choose."""
    chosen = {"global": config.max_norm, "step": config.max_flow}
    return f"{name} {chosen[name]:g}" if name in chosen else name


# --- data -----------------------------------------------------------------------------

SYMBOLS, CLASSES = 6, 4


def temporal_order(
    key: jax.Array, batch: int, length: int
) -> tuple[jax.Array, jax.Array]:
    """Sequences of six symbols, and which two of A and B stand in which order.

    One A or B stands in the second tenth of a sequence, another in the sixth, and
    symbols that mean nothing stand everywhere else: AA, AB, BA and BB are the classes.
    """
    tenth = length // 10
    # One draw for everything: a draw each would take longer to compile.
    chance_BX = jax.random.uniform(key, (batch, 4 + length))
    marks_B2 = (2 * chance_BX[:, :2]).astype(int)
    places_B2 = (tenth * chance_BX[:, 2:4]).astype(int)
    places_B2 += jnp.array([tenth, length // 2])
    symbols_BT = (2 + (SYMBOLS - 2) * chance_BX[:, 4:]).astype(int)
    for mark_B, place_B in zip(marks_B2.T, places_B2.T, strict=True):
        is_here_BT = jnp.arange(length) == place_B[:, None]
        symbols_BT = jnp.where(is_here_BT, mark_B[:, None], symbols_BT)
    labels_B = marks_B2 @ jnp.array([2, 1])
    return jax.nn.one_hot(symbols_BT, SYMBOLS), labels_B


# --- model ----------------------------------------------------------------------------


class RNN(nnx.Module):
    """A plain tanh cell, read out by a linear layer after the last step."""

    def __init__(
        self,
        *,
        inputs: int,
        units: int,
        outputs: int,
        rngs: nnx.Rngs,
        max_flow: float = math.inf,
    ):
        small = jax.nn.initializers.normal(0.1)
        self.max_flow = max_flow
        self.cell = nnx.SimpleCell(
            inputs,
            units,
            kernel_init=small,
            recurrent_kernel_init=small,
            rngs=rngs,
        )
        self.readout = nnx.Linear(units, outputs, kernel_init=small, rngs=rngs)

    def __call__(self, inputs_BTI: jax.Array) -> jax.Array:
        def step(state_BH: jax.Array, inputs_BI: jax.Array):
            state_BH, _ = self.cell(state_BH, inputs_BI)
            if self.max_flow < math.inf:
                state_BH = optaxclip.clip_cotangent(state_BH, self.max_flow)
            return state_BH, None

        start_BH = jnp.zeros((len(inputs_BTI), self.cell.hidden_features))
        last_BH, _ = jax.lax.scan(step, start_BH, inputs_BTI.swapaxes(0, 1))
        return self.readout(last_BH)


def cross_entropy(model: RNN, inputs_BTI: jax.Array, labels_B: jax.Array) -> jax.Array:
    logits_BK = model(inputs_BTI)
    losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, labels_B)
    return losses_B.mean()


def new_model(
    config: Config, key: jax.Array, max_flow: float = math.inf
) -> tuple[Any, Any]:
    """The network of one seed, as `nnx.split` gives it."""
    sizes = {"inputs": SYMBOLS, "units": config.units, "outputs": CLASSES}
    return nnx.split(RNN(**sizes, rngs=nnx.Rngs(key), max_flow=max_flow))


# --- training -------------------------------------------------------------------------


def new_states(config: Config, tx: Any) -> tuple[Any, jax.Array]:
    """Parameters, optimizer state and steepest place of all seeds; a key for each."""

    def new_state(key: jax.Array) -> Any:
        _, params = new_model(config, key)
        return params, tx.init(params), (jnp.float32(-1), params, key)

    key_S = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    # Seeds do not know of each other: as many devices as divide them share them.
    devices = math.gcd(config.seeds, jax.device_count())
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("seed",), auto, devices=jax.devices()[:devices])
    by_seed = NamedSharding(mesh, PartitionSpec("seed"))
    return jax.device_put((jax.vmap(new_state)(key_S), key_S), by_seed)


def stretch_of(
    config: Config, tx: Any, length: int, max_flow: float = math.inf
) -> Callable[..., Any]:
    """From states and keys of all seeds to their states after `every` updates."""
    graphdef, _ = new_model(config, jax.random.key(0), max_flow)

    def loss_of(params: Any, inputs_BTI: jax.Array, labels_B: jax.Array) -> jax.Array:
        return cross_entropy(nnx.merge(graphdef, params), inputs_BTI, labels_B)

    def update(state: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, opt_state, steepest = state
        batch = temporal_order(key, config.batch, length)
        loss, grads = jax.value_and_grad(loss_of)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss)
        norm = optaxclip.metrics(opt_state)["grad_norm"]
        # Kept to be looked at: the network, and the batch, of the largest gradient.
        here = norm, params, key
        larger = norm > steepest[0]
        steepest = jax.tree.map(lambda a, b: jnp.where(larger, a, b), here, steepest)
        return (optax.apply_updates(params, updates), opt_state, steepest), (loss, norm)

    def stretch(state: Any, key: jax.Array, number: jax.Array) -> tuple[Any, dict]:
        # Seeded by its number: every clip sees the same sequences.
        keys = jax.random.split(jax.random.fold_in(key, number), config.every)
        state, (losses, norms) = jax.lax.scan(update, state, keys)
        return state, {
            "loss": losses.mean(),
            "norm": norms.max(),
            "clipped": optaxclip.metrics(state[1])["clip_fraction"],
        }

    return jax.jit(jax.vmap(stretch, in_axes=(0, 0, None)))


@functools.cache  # the same program for all clips
def check_of(config: Config, length: int) -> Callable[..., jax.Array]:
    """From parameters and keys of all seeds to the share of wrong answers."""
    graphdef, _ = new_model(config, jax.random.key(0))

    def check(params: Any, key: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, config.updates + number)  # not one of training
        inputs_BTI, labels_B = temporal_order(key, config.check, length)
        guesses_B = nnx.merge(graphdef, params)(inputs_BTI).argmax(-1)
        return (guesses_B != labels_B).mean()

    return jax.jit(jax.vmap(check, in_axes=(0, 0, None)))


def train(config: Config, name: str, length: int, path: Path) -> tuple[dict, Any]:
    """Columns of shape (checks, seeds), and the steepest place that a seed came to.

    The log of the first seed goes to the path.
    """
    tx = optaxclip.record_history(CLIPS[name](config), config.every, leaf_norms=True)
    state, key_S = new_states(config, tx)
    max_flow = config.max_flow if name == "step" else math.inf
    stretch = stretch_of(config, tx, length, max_flow)
    check = check_of(config, length)

    path.unlink(missing_ok=True)  # an existing log would be continued
    log = ClipLog(
        path,
        params=jax.tree.map(lambda x_S: x_S[0], state[0]),
        transform=name,
        hyperparameters=dataclasses.asdict(config) | {"length": length},
    )
    rows, solved_S = [], np.zeros(config.seeds, bool)
    bar = tqdm(total=config.updates, desc=f"{name}, length {length}", unit="update")
    for number in range(config.updates // config.every):
        state, row = stretch(state, key_S, number)
        rows.append(jax.device_get(row | {"wrong": check(state[0], key_S, number)}))
        log.update(state[1])
        solved_S |= rows[-1]["wrong"] <= 0.01
        bar.set_postfix_str(f"solved {solved_S.sum()}/{config.seeds}", refresh=False)
        bar.update(config.every)
        if solved_S.all():
            break
    bar.close()
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    most = int(state[2][0].argmax())
    return columns, jax.tree.map(lambda x_S: x_S[most], state[2])


def updates_to_solve(config: Config, run: dict[str, np.ndarray]) -> np.ndarray:
    """Of each seed; infinite for one that the run gave up on."""
    solved_CS = run["wrong"] <= 0.01
    first_S = config.every * (1.0 + solved_CS.argmax(0))
    return np.where(solved_CS.any(0), first_S, np.inf)


# --- what flows back ------------------------------------------------------------------


def flow_back(config: Config, length: int, place: Any, max_flow: float) -> np.ndarray:
    """The norm of the gradient of the loss by the state after each time step."""
    _, params, key = place
    graphdef, _ = new_model(config, key)
    model = nnx.merge(graphdef, params)
    inputs_BTI, labels_B = temporal_order(key, config.batch, length)

    def loss_of(nudges_TBH: jax.Array) -> jax.Array:
        def step(state_BH: jax.Array, now: Any) -> tuple[jax.Array, None]:
            inputs_BI, nudge_BH = now
            state_BH, _ = model.cell(state_BH, inputs_BI)
            # A nudge of 0 changes nothing, and has the gradient of the state it is on.
            return optaxclip.clip_cotangent(state_BH + nudge_BH, max_flow), None

        now = inputs_BTI.swapaxes(0, 1), nudges_TBH
        last_BH, _ = jax.lax.scan(step, jnp.zeros_like(nudges_TBH[0]), now)
        losses_B = optax.softmax_cross_entropy_with_integer_labels(
            model.readout(last_BH), labels_B
        )
        return losses_B.mean()

    zeros_TBH = jnp.zeros((length, config.batch, config.units))
    return np.asarray(jax.vmap(optaxclip.global_norm)(jax.grad(loss_of)(zeros_TBH)))


def flows_of(config: Config, places: dict[tuple[str, int], Any]) -> dict[str, Any]:
    """At the steepest place of all, without a clip and with one at each time step."""
    (name, length), place = max(places.items(), key=lambda item: item[1][0])
    print(f"The steepest place: {name}, length {length}, norm {place[0]:.1f}")
    bounds = {"no clip": math.inf, f"norm held to {config.max_flow:g}": config.max_flow}
    return {
        name: flow_back(config, length, place, bound) for name, bound in bounds.items()
    }


# --- the cliff ------------------------------------------------------------------------

START, TARGET = (4.51, -2.21), 0.7  # weight and bias to start from; the wanted output
CLIFF_RATE, CLIFF_NORM, CLIFF_STEPS = 0.1, 0.1, 30


def unit_error(weight: Any, bias: Any) -> jax.Array:
    """Of one unit that feeds itself for 50 steps, as in Figure 6 of the paper."""

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return weight * jax.nn.sigmoid(x) + bias, None

    start = jnp.full(jnp.shape(weight), 0.5)
    last, _ = jax.lax.scan(step, start, None, 50)
    return (jax.nn.sigmoid(last) - TARGET) ** 2


def descend(clip: optax.GradientTransformation) -> dict[str, np.ndarray]:
    """The path of gradient descent over the weight and the bias: a row a step."""
    tx = optax.chain(clip, optax.sgd(CLIFF_RATE))

    def step(state: Any, _: None) -> tuple[Any, dict[str, jax.Array]]:
        place, opt_state = state
        error, slope = jax.value_and_grad(lambda p: unit_error(*p))(place)
        updates, opt_state = tx.update(slope, opt_state)
        row = {"place": place, "error": error, "norm": optaxclip.global_norm(slope)}
        return (optax.apply_updates(place, updates), opt_state), row

    start = jnp.array(START)
    return jax.device_get(
        jax.lax.scan(step, (start, tx.init(start)), None, CLIFF_STEPS)[1]
    )


# --- output ---------------------------------------------------------------------------

Runs = dict[tuple[str, int], dict[str, np.ndarray]]
Paths = dict[str, dict[str, np.ndarray]]
# Told apart by color-blind readers, too.
COLORS = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
MARKS = {"ms": 5, "lw": 1.5}


def save(config: Config, runs: Runs, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["clip", "length", "seed", "update", *next(iter(runs.values()))]
        )
        for (name, length), run in runs.items():
            for check, seed in np.ndindex(run["loss"].shape):
                at = [name, length, seed, config.every * (check + 1)]
                writer.writerow(at + [column[check, seed] for column in run.values()])


def wilson(solved: int, seeds: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate: honest for eight seeds, at 0 and 1 too."""
    z, rate = 1.96, solved / seeds
    middle = (rate + z**2 / (2 * seeds)) / (1 + z**2 / seeds)
    half = z * math.sqrt(rate * (1 - rate) / seeds + (z / (2 * seeds)) ** 2)
    half /= 1 + z**2 / seeds
    return max(0.0, middle - half), min(1.0, middle + half)


HEADER = "length  clip         solved   95% interval  updates  clipped  largest norm"


def table(config: Config, runs: Runs) -> str:
    """A line a run: the median of the updates to solve, and the largest norm of all."""
    lines = [HEADER]
    for (name, length), run in runs.items():
        updates_S = updates_to_solve(config, run)
        solved, seeds = int(np.isfinite(updates_S).sum()), len(updates_S)
        low, high = wilson(solved, seeds)
        median = np.median(updates_S)
        updates = f"{median:.0f}" if np.isfinite(median) else f">{config.updates}"
        lines.append(
            f"{length:>6}  {name:<11}{f'{solved}/{seeds}':>8}"
            f"{f'{low:.0%} to {high:.0%}':>15}{updates:>9}"
            f"{run['clipped'][-1].mean():>9.1%}{run['norm'].max():>14.1f}"
        )
    return "\n".join(lines)


def flow_table(flows: dict[str, np.ndarray]) -> str:
    lines = ["back in time    after the last step  after the first"]
    for name, flow_T in flows.items():
        lines.append(f"{name:<17}{flow_T[-1]:>18.4f}{flow_T[0]:>17.4f}")
    return "\n".join(lines)


def cliff_table(paths: dict[str, dict[str, np.ndarray]]) -> str:
    lines = ["one unit       largest norm  longest step  error at the end"]
    for name, path in paths.items():
        steps = np.linalg.norm(np.diff(path["place"], axis=0), axis=1)
        lines.append(
            f"{name:<15}{path['norm'].max():>12.1f}{steps.max():>14.3f}"
            f"{path['error'][-1]:>18.4f}"
        )
    return "\n".join(lines)


def picture(
    config: Config, runs: Runs, flows: dict[str, Any], paths: Paths, path: Path
) -> None:
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    rows = figure.add_gridspec(2)
    rates, updates, back = figure.add_subfigure(rows[0]).subplots(1, 3)
    surface, errors = figure.add_subfigure(rows[1]).subplots(1, 2, width_ratios=(5, 3))
    names = [label(config, name) for name in config.clip.split(",")]
    for i, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        beside = 0.2 * (i - (len(names) - 1) / 2)  # not on top of each other
        found = {
            place + beside: updates_to_solve(config, runs[name, length])
            for place, length in enumerate(lengths(config))
        }
        draw_rates(rates, name, found, color)
        draw_updates(updates, found, color, config.updates)
    rates.set(title="How many seeds solve the task\n(bars: 95% intervals)")
    rates.set(ylabel="share of seeds", ylim=(-0.03, 1.03))
    rates.legend(title="clip", loc="lower left")
    updates.set(title="How soon\n(a dot is a seed, a hollow one never solved it)")
    updates.set(ylabel="updates until 99% are right", yscale="log")
    for axes in (rates, updates):
        axes.set_xticks(range(len(lengths(config))), config.lengths.split(","))
        axes.set(xlabel="symbols per sequence", xlim=(-0.5, len(lengths(config)) - 0.5))
    draw_flows(back, flows)
    draw_surface(surface, paths)
    draw_errors(errors, paths)
    figure.savefig(path, dpi=120)


def draw_rates(axes: Any, name: str, found: dict, color: str) -> None:
    counts = [(int(np.isfinite(x_S).sum()), len(x_S)) for x_S in found.values()]
    shares = [solved / seeds for solved, seeds in counts]
    low, high = zip(*[wilson(*count) for count in counts], strict=True)
    axes.plot(list(found), shares, "o-", color=color, lw=2, label=name)
    axes.vlines(list(found), low, high, color=color, lw=4, alpha=0.3)


def draw_updates(axes: Any, found: dict, color: str, budget: int) -> None:
    for at, updates_S in found.items():
        solved_S = np.isfinite(updates_S)
        spread_S = at + np.linspace(-0.08, 0.08, len(updates_S))
        axes.plot(spread_S[solved_S], updates_S[solved_S], "o", ms=5, color=color)
        never_S = np.where(solved_S, np.nan, budget)
        axes.plot(spread_S, never_S, "o", ms=5, mfc="none", color=color)


def draw_flows(axes: Any, flows: dict[str, np.ndarray]) -> None:
    for (name, flow_T), color in zip(flows.items(), COLORS, strict=False):
        axes.plot(1 + np.arange(len(flow_T)), flow_T, ".-", color=color, label=name)
    axes.set(
        title="The gradient on its way back in time,\nat the steepest place of all"
    )
    axes.set(xlabel="time step", ylabel="norm", yscale="log")
    axes.legend(title="clip at every time step")


def draw_surface(axes: Any, paths: Paths) -> None:
    """The error over weight and bias, the paths, and a closer look at the cliff."""
    near = axes.inset_axes((0.52, 0.04, 0.44, 0.44))
    axes.set(xlim=(4, 7.5), ylim=(-3, 2.2))
    near.set(xlim=(4.44, 4.52), ylim=(-2.29, -2.2), xticks=[], yticks=[])
    for ax in (axes, near):
        ends = (ax.get_xlim(), ax.get_ylim())
        grid = np.meshgrid(*(np.linspace(low, high, 400) for low, high in ends))
        error = jax.jit(unit_error)(*map(jnp.asarray, grid))
        scale = PowerNorm(0.5, 0, 0.4)
        heights = ax.pcolormesh(*grid, error, cmap="Greys", norm=scale, rasterized=True)
        for (name, path), color in zip(paths.items(), COLORS, strict=False):
            ax.plot(*path["place"].T, ".-", color=color, label=name, **MARKS)
    axes.indicate_inset_zoom(near, edgecolor="black", alpha=1)
    axes.set(title="A cliff: the error of one unit, and two descents")
    axes.set(xlabel="weight", ylabel="bias")
    axes.legend(loc="upper left")
    axes.figure.colorbar(heights, ax=axes, label="squared error")


def draw_errors(axes: Any, paths: Paths) -> None:
    for (name, path), color in zip(paths.items(), COLORS, strict=False):
        axes.plot(path["error"], ".-", color=color, label=name, **MARKS)
    axes.set(title="The error on these descents")
    axes.set(xlabel="step", ylabel="squared error", yscale="log")
    axes.legend(loc="center right")


def main() -> None:
    config = read_config()
    if unknown := set(config.clip.split(",")) - set(CLIPS):
        raise SystemExit(f"--clip: {sorted(unknown)} are not among {list(CLIPS)}")
    if min(lengths(config)) < 10:
        raise SystemExit(f"--lengths must be at least 10, got {config.lengths}")
    if config.updates % config.every:
        raise SystemExit(f"--updates must be a multiple of --every, {config.every}")
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    runs: Runs = {}
    places = {}
    for length in lengths(config):
        for name in config.clip.split(","):
            path = folder / f"{name}-length{length}.jsonl"
            key = label(config, name), length
            runs[key], places[key] = train(config, name, length, path)
            title = f"temporal_order, {name}, length {length}"
            report(read(path), path.with_suffix(".html"), title=title)
    paths = {
        "no clip": descend(optaxclip.clip_by_global_norm(jnp.inf)),
        f"norm held to {CLIFF_NORM}": descend(
            optaxclip.clip_by_global_norm(CLIFF_NORM)
        ),
    }
    flows = flows_of(config, places)
    save(config, runs, folder / "metrics.csv")
    picture(config, runs, flows, paths, folder / "temporal_order.png")
    print(table(config, runs), flow_table(flows), cliff_table(paths), sep="\n\n")
    print(f"In {folder}/ are temporal_order.png and, of each run, log and report.")


if __name__ == "__main__":
    main()
