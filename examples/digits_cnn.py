"""A network without normalization: a large batch and rate, on several devices.

    pip install "optaxclip[examples]"
    python digits_cnn.py     # four clips, three seeds each, on eight virtual devices
    python digits_cnn.py --clip none,percentile --broken-every 0
    python digits_cnn.py --rate 0.5 --clipping 0.01 --width 64  # on an accelerator

Four convolutions (Flax NNX) and no normalization learn scikit-learn's handwritten
digits with SGD and momentum. Without a clip, this is unstable. Adaptive gradient
clipping (`agc`) was made for such networks (Brock et al., "High-Performance Large-Scale
Image Recognition Without Normalization", 2021): it limits the gradient of each unit to
a fraction of the unit's weights. All devices share a batch under `pmap`; the gradients
are averaged before the clip sees them.

Now and then a batch is broken: its pixels were not scaled to [0, 1]. The authors of
adaptive clipping leave the last layer unclipped, and a broken batch would pass through
it. So `agc` clips the gradient of that layer to a fixed norm. With the defaults, this
is the result (`after` is the largest norm after clipping):

clip        validation loss     wrong answers  clipped  skipped  largest norm     after
none              nan ± nan      97.2% ± 4.9%     0.0%      0.0      4.61e+32  4.61e+32
global 1      0.043 ± 0.019       1.3% ± 0.3%    19.8%      0.0           239         1
percentile    0.043 ± 0.018       1.5% ± 0.1%    71.6%      0.0      1.08e+03     0.964
agc           0.045 ± 0.008       1.3% ± 0.1%    98.9%      0.0           217      1.28

Without broken batches (`--broken-every 0`), 6.6% ± 8.0% of the answers are wrong if
nothing is clipped, and 1.2% ± 0.3% with `global 1`.

The suffix of a name lists the axes of its array: D devices, B batch, N examples, H
height, W width, C channels, K classes.
"""

import argparse
import csv
import dataclasses
import functools
import inspect
import itertools
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import optaxclip
from optaxclip.audit import ClipLog, read, report

Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    # The comparison.
    clip: str = "none,global,percentile,agc"  # runs to make, from CLIPS
    seeds: int = 3  # repeat every run with this many seeds
    broken_every: int = 40  # one batch in this many is broken; 0 for none
    max_norm: float = 1.0  # global: largest norm; agc: that of the last layer
    clipping: float = 0.04  # agc: gradient of a unit, as a share of its weights
    # The training.
    steps: int = 150  # optimizer steps of a run
    batch: int = 512  # images per batch, a multiple of the number of devices
    rate: float = 0.2  # learning rate of SGD
    momentum: float = 0.9  # momentum of SGD
    width: int = 16  # channels of the first convolution
    # Input and output.
    cpu_devices: int = 8  # virtual devices to make if there is only a CPU
    every: int = 10  # steps between two validations, and two metrics transfers
    out: str = "runs/digits_cnn"  # folder for metrics, logs, reports, picture


def read_config() -> Config:
    """Options of the command line for all fields; the comments above are their help."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag, type=field.type, default=field.default, help=text)
    return Config(**vars(parser.parse_args()))


# --- clips ----------------------------------------------------------------------------


def sgd(config: Config, clip: Any, clip_of_the_head: Any = None) -> Any:
    """SGD behind a clip, and two gauges of the global norm around the clip.

    The gradients are averages over all devices before they get here, the same on each.
    `pmap` cannot know that: `axis_name=()` says so, here and below.
    """
    gauge = optaxclip.clip_by_global_norm(jnp.inf, axis_name=())
    return optax.named_chain(
        ("before", gauge),
        ("clip", clip),
        ("head", clip_of_the_head or optax.identity()),
        ("after", gauge),
        ("sgd", optax.sgd(config.rate, config.momentum)),
    )


def agc(config: Config) -> Any:
    """Adaptive gradient clipping; the last layer has a fixed threshold instead."""

    def is_head(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "head" in jax.tree_util.keystr(path), params
        )

    def is_body(params: Any) -> Any:
        return jax.tree.map(operator.not_, is_head(params))

    body = optaxclip.adaptive_grad_clip(config.clipping, axis_name=())
    head = optaxclip.clip_by_global_norm(config.max_norm, axis_name=())
    return sgd(config, optax.masked(body, is_body), optax.masked(head, is_head))


# One line per run: from the configuration to the optimizer.
CLIPS = {
    # An infinite threshold clips nothing, but the norm is still measured.
    "none": lambda c: sgd(c, optaxclip.clip_by_global_norm(jnp.inf, axis_name=())),
    "global": lambda c: sgd(c, optaxclip.clip_by_global_norm(c.max_norm, axis_name=())),
    # No threshold to tune.
    "percentile": lambda c: sgd(c, optaxclip.clip_by_percentile(axis_name=())),
    # Like percentile, but a step that is not finite changes nothing.
    "skip": lambda c: optaxclip.skip_nonfinite(
        sgd(c, optaxclip.clip_by_percentile(axis_name=())), axis_name=()
    ),
    "agc": agc,
}


def label(config: Config, name: str) -> str:
    """The name of a run, with its threshold if somebody had to choose one."""
    return f"global {config.max_norm:g}" if name == "global" else name


# --- data -----------------------------------------------------------------------------


def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images of 8 x 8 pixels in [0, 1] and their digits, to train on and to validate.

    Every fourth image is kept for validation: the same ones for every run.
    """
    digits: Any = sklearn.datasets.load_digits()
    images_NHWC = (digits.images[..., None] / 16).astype(np.float32)
    labels_N = digits.target.astype(np.int32)
    valid_N = np.arange(len(labels_N)) % 4 == 0
    return (
        images_NHWC[~valid_N],
        labels_N[~valid_N],
        images_NHWC[valid_N],
        labels_N[valid_N],
    )


def training_batches(
    config: Config, images_NHWC: np.ndarray, labels_N: np.ndarray, seed: int
) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    while True:
        at_B = rng.integers(len(labels_N), size=config.batch)
        yield images_NHWC[at_B], labels_N[at_B]


def is_broken(config: Config, number: int) -> bool:
    return config.broken_every > 0 and number % config.broken_every == 0


def broken(config: Config, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, some of them as from a file whose pixels are 0 to 255, not 0 to 1.

    It wraps any batches, so the training code does not know about it.
    """
    for number, (images_BHWC, labels_B) in enumerate(batches, start=1):
        if is_broken(config, number):
            images_BHWC = images_BHWC * np.float32(255)
        yield images_BHWC, labels_B


# --- model ----------------------------------------------------------------------------


class CNN(nnx.Module):
    """Four convolutions, two of which halve the image, and no normalization."""

    def __init__(self, *, classes: int = 10, width: int = 16, rngs: nnx.Rngs):
        he = jax.nn.initializers.he_normal()

        def conv(inputs: int, outputs: int, stride: int) -> nnx.Conv:
            return nnx.Conv(
                inputs, outputs, (3, 3), strides=stride, kernel_init=he, rngs=rngs
            )

        self.convs = nnx.List(
            [
                conv(1, width, 1),
                conv(width, 2 * width, 2),
                conv(2 * width, 2 * width, 1),
                conv(2 * width, 4 * width, 2),
            ]
        )
        self.head = nnx.Linear(4 * width, classes, rngs=rngs)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        x_BHWC = images_BHWC
        for conv in self.convs:
            x_BHWC = nnx.relu(conv(x_BHWC))
        return self.head(x_BHWC.mean((1, 2)))


def cross_entropy(model: CNN, images_BHWC: jax.Array, labels_B: jax.Array) -> jax.Array:
    logits_BK = model(images_BHWC)
    losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, labels_B)
    return losses_B.mean()


def new_model(config: Config, seed: Any) -> tuple[Any, Any]:
    return nnx.split(CNN(width=config.width, rngs=nnx.Rngs(jax.random.key(seed))))


def structure(config: Config) -> Any:
    """What `nnx.merge` needs besides the parameters, without making any."""
    graphdef, _ = nnx.eval_shape(lambda: new_model(config, seed=0))
    return graphdef


# --- training -------------------------------------------------------------------------


def new_state_of(config: Config, tx: Any) -> Callable[..., Any]:
    """Makes parameters and optimizer state on every device, from a seed for each."""

    def new_state(seed: jax.Array) -> Any:
        _, params = new_model(config, seed)
        return params, tx.init(params)

    # With another name than in the step, the sharding differs: it would compile twice.
    return jax.pmap(new_state, axis_name="devices")


def first_copy(tree: Any) -> Any:
    """The arrays of the first device, on the host."""
    return jax.tree.map(lambda x_D: x_D[0], jax.device_get(tree))


def shared_out(batch: Batch) -> Batch:
    """An equal part of a batch for each device."""
    images_BHWC, labels_B = batch
    devices = jax.device_count()
    images_DBHWC = images_BHWC.reshape(devices, -1, *images_BHWC.shape[1:])
    return images_DBHWC, labels_B.reshape(devices, -1)


def train_step_of(config: Config, tx: Any) -> Callable[..., Any]:
    """The step that every device takes with its part of a batch."""
    graphdef = structure(config)

    def train_step(
        state: Any, images_BHWC: jax.Array, labels_B: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        def loss_of(params: Any) -> jax.Array:
            return cross_entropy(nnx.merge(graphdef, params), images_BHWC, labels_B)

        params, opt_state = state
        # The mean first, then the clip: it bounds the gradient of the whole batch.
        loss, grads = jax.lax.pmean(jax.value_and_grad(loss_of)(params), "devices")
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss)
        metrics = {"train_loss": loss} | optaxclip.metrics(opt_state)
        return (optax.apply_updates(params, updates), opt_state), metrics

    return jax.pmap(train_step, axis_name="devices", donate_argnums=0)


def validation_of(config: Config) -> Callable[..., dict[str, jax.Array]]:
    graphdef = structure(config)

    @jax.jit
    def validate(params: Any, images_BHWC: Any, labels_B: Any) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, params)
        loss = cross_entropy(model, images_BHWC, labels_B)
        wrong = (model(images_BHWC).argmax(-1) != labels_B).mean()
        # If the network returns NaN, argmax still gives an answer.
        return {"val_loss": loss, "val_error": jnp.where(loss < jnp.inf, wrong, 1.0)}

    return validate


def train(
    config: Config, name: str, seed: int, programs: Any, data: Any, path: Path
) -> list[dict[str, Any]]:
    """The metrics of a run, one row per step; its log is written to the path."""
    new_state, train_step, validate = programs
    images_NHWC, labels_N, *valid = data
    state = new_state(np.full(jax.device_count(), seed))
    path.unlink(missing_ok=True)  # an existing log would be continued
    log = ClipLog(
        path,
        params=first_copy(state[0]),
        transform=name,
        hyperparameters=dataclasses.asdict(config) | {"seed": seed},
    )
    batches = broken(config, training_batches(config, images_NHWC, labels_N, seed))
    rows: list[dict[str, Any]] = []
    bar = tqdm(total=config.steps, desc=f"{name}, seed {seed}", unit="step")
    while len(rows) < config.steps:
        pending = []
        for batch in itertools.islice(
            batches, min(config.every, config.steps - len(rows))
        ):
            state, metrics_D = train_step(state, *shared_out(batch))
            pending.append(metrics_D)
        # The metrics stay on the device until here: fetched at each step, they would
        # make each step wait for the one before. They are the same on every device.
        for metrics_D in jax.device_get(pending):
            values = {key: value[0].item() for key, value in metrics_D.items()}
            rows.append({"step": len(rows) + 1} | values)
        log.update(state[1])
        validation = validate(first_copy(state[0]), *valid)
        rows[-1] |= {key: x.item() for key, x in validation.items()}
        bar.set_postfix_str(f"wrong {rows[-1]['val_error']:.1%}", refresh=False)
        bar.update(len(pending))
    bar.close()
    return rows


# --- output ---------------------------------------------------------------------------

Runs = dict[str, list[list[dict[str, Any]]]]
# Color-blind readers can tell them apart.
COLORS = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


def save(rows: list[dict[str, Any]], path: Path) -> None:
    with open(path, "w", newline="") as file:
        # The last row has all columns, most others no validation.
        writer = csv.DictWriter(file, rows[-1], restval="")
        writer.writeheader()
        writer.writerows(rows)


HEADER = (
    "clip        validation loss     wrong answers  clipped  skipped"
    "  largest norm     after"
)


def table(runs: Runs) -> str:
    """One line per run: means and deviations over the seeds at the end."""
    lines = [HEADER]
    for name, repeats in runs.items():
        last = [run[-1] for run in repeats]
        losses, errors = (
            [row[key] for row in last] for key in ("val_loss", "val_error")
        )
        clipped = np.mean([row["clip/clip_fraction"] for row in last])
        skipped = np.mean([row.get("skip_count", 0) for row in last])
        lines.append(
            f"{name:<11}{spread(losses, '.3f'):>16}{spread(errors, '.1%'):>18}"
            f"{clipped:>9.1%}{skipped:>9.1f}{largest(repeats, 'before'):>14.3g}"
            f"{largest(repeats, 'after'):>10.3g}"
        )
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return format(values[0], form)
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"


def largest(repeats: list[list[dict[str, Any]]], gauge: str) -> float:
    norms = np.array([row[f"{gauge}/grad_norm"] for run in repeats for row in run])
    return norms[np.isfinite(norms)].max()


def picture(config: Config, runs: Runs, path: Path) -> None:
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    grid = figure.add_gridspec(2, len(runs), height_ratios=[1.4, 1])
    top = figure.add_subplot(grid[0, :])
    panel = None
    for i, ((name, repeats), color) in enumerate(
        zip(runs.items(), COLORS, strict=False)
    ):
        draw_errors(top, name, repeats, color)
        panel = figure.add_subplot(grid[1, i], sharey=panel)
        draw_norms(panel, name, repeats[0], color)
        panel.label_outer()
    for axes in figure.axes:
        for number in filter(
            functools.partial(is_broken, config), range(1, config.steps + 1)
        ):
            axes.axvline(number, color="0.88", lw=4, zorder=0)
    top.set(title="Wrong answers in validation, mean and range over the seeds")
    top.set(
        xlabel="step (gray: a batch with unscaled pixels)", ylabel="share", yscale="log"
    )
    top.legend(title="clip: at the end", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def draw_errors(axes: Any, name: str, repeats: Any, color: str) -> None:
    validated = [[row for row in run if "val_error" in row] for run in repeats]
    errors = np.array([[row["val_error"] for row in run] for run in validated])
    steps, mean = [row["step"] for row in validated[0]], errors.mean(0)
    axes.plot(steps, mean, ".-", color=color, lw=2, label=f"{name}: {mean[-1]:.1%}")
    axes.fill_between(steps, errors.min(0), errors.max(0), color=color, alpha=0.15)


def draw_norms(axes: Any, name: str, rows: Any, color: str) -> None:
    """Of the gradients of the first seed; they end where they are not finite."""
    steps = [row["step"] for row in rows]
    for gauge, style in [
        ("before", {"color": "0.6", "lw": 1}),
        ("after", {"color": color, "lw": 1.5}),
    ]:
        norms = np.array([row[f"{gauge}/grad_norm"] for row in rows])
        norms = np.where(np.isfinite(norms), norms, np.nan)
        axes.plot(steps, norms, label=f"{gauge} the clip", **style)
    axes.set(yscale="log", xlabel="step", ylabel="norm of the gradient", title=name)
    axes.set(ylim=(1e-3, 1e4))  # without a clip it leaves this window
    axes.legend(fontsize="small")


def main() -> None:
    config = read_config()
    if unknown := set(config.clip.split(",")) - set(CLIPS):
        raise SystemExit(f"--clip: {sorted(unknown)} are not among {list(CLIPS)}")
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    if config.batch % jax.device_count():
        raise SystemExit(
            f"--batch must be a multiple of {jax.device_count()} (devices)"
        )
    data = load_digits()
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    validate = validation_of(config)
    runs: Runs = {}
    for name in config.clip.split(","):
        tx = optaxclip.record_history(
            CLIPS[name](config),
            config.every,
            leaf_norms=True,
            clip="clip",
            axis_name=(),
        )
        # One for all seeds, so that they compile once.
        programs = new_state_of(config, tx), train_step_of(config, tx), validate
        for seed in range(config.seeds):
            path = folder / f"{name}-seed{seed}.jsonl"
            rows = train(config, name, seed, programs, data, path)
            save(rows, path.with_suffix(".csv"))
            report(read(path), path.with_suffix(".html"), title=f"digits_cnn, {name}")
            runs.setdefault(label(config, name), []).append(rows)
    picture(config, runs, folder / "digits_cnn.png")
    print(table(runs))
    print(f"In {folder}/ are digits_cnn.png and, of each run, metrics, log and report.")


if __name__ == "__main__":
    main()
