"""Compare gradient clips on a language model that gets some broken batches.

    pip install "optaxclip[examples]"
    python char_lm.py                          # two minutes on two cores
    python char_lm.py --clip value,leaf,zclip --seeds 3
    python char_lm.py --nan-share 0.005        # some late batches are NaN, too

The model and the text are those of `train.py`, in the same folder. Each token has a
weight. One batch in a hundred is broken: the weights of one of its sequences are so
large that the gradient is about a thousand times too large. Every clip gets the same
model, the same batches and the same broken ones.

With `--seeds 3` it prints this at the end:

clip          validation loss  clipped  skipped   largest norm, clipped to
none            3.294 ± 0.115     0.0%      0.0           3896      3896.3
global 1        2.105 ± 0.010     4.9%      0.0           3689         1.0
percentile      2.075 ± 0.014    17.8%      0.0           3584         0.8
skip            2.075 ± 0.014    17.8%      0.0           3584         0.8
"""

import argparse
import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm
from train import Transformer, batches, cross_entropy, load_text

import optaxclip
from optaxclip.audit import ClipLog, LogData, read, report


@dataclasses.dataclass(frozen=True)
class Config:
    # The comparison.
    clip: str = "none,global,percentile,skip"  # runs to make, from CLIPS
    seeds: int = 1  # repeat every run with this many seeds
    broken_share: float = 0.01  # share of the batches with a huge gradient
    nan_share: float = 0.0  # share of the batches that are NaN, all late
    max_norm: float = 1.0  # global: largest norm of the whole gradient
    max_value: float = 0.1  # value: largest element of the gradient
    max_leaf_norm: float = 0.5  # leaf: largest norm of a parameter's gradient
    # The training.
    steps: int = 600  # optimizer steps of a run
    batch: int = 16  # sequences per batch, a multiple of the number of devices
    peak_rate: float = 3e-3  # learning rate after the warm-up
    warmup: int = 50  # steps of linear warm-up, below --steps; then a cosine decay
    # The model and the text.
    context: int = 64  # characters per sequence
    depth: int = 2  # Transformer blocks
    heads: int = 4  # attention heads, a divisor of the width
    width: int = 64  # width of the residual stream
    dtype: str = "float32"  # dtype of the computation; parameters stay float32
    text: str = ""  # file to learn from; Python's standard library if empty
    # The output.
    every: int = 50  # steps between two validations, and between two reads of the log
    out: str = "runs/char_lm"  # folder for logs, reports and picture


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


def adamw(config: Config, clip: optax.GradientTransformation) -> Any:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.peak_rate, config.warmup, config.steps, config.peak_rate / 10
    )
    return optax.chain(clip, optax.adamw(rate))


# One line per run: from the configuration to the optimizer.
CLIPS = {
    # An infinite threshold clips nothing, but the norm is still measured.
    "none": lambda c: adamw(c, optaxclip.clip_by_global_norm(jnp.inf)),
    "global": lambda c: adamw(c, optaxclip.clip_by_global_norm(c.max_norm)),
    "value": lambda c: adamw(c, optaxclip.clip_by_value(c.max_value)),
    "leaf": lambda c: adamw(c, optaxclip.clip_by_leaf_norm(c.max_leaf_norm)),
    "zclip": lambda c: adamw(c, optaxclip.zclip()),
    "percentile": lambda c: adamw(c, optaxclip.clip_by_percentile()),
    # Like percentile, but a step that is not finite changes nothing.
    "skip": lambda c: optaxclip.skip_nonfinite(
        adamw(c, optaxclip.clip_by_percentile())
    ),
}


def label(config: Config, name: str) -> str:
    """The name of a run, with its threshold if somebody had to choose one."""
    return f"global {config.max_norm:g}" if name == "global" else name


# --- data -----------------------------------------------------------------------------


def bad_steps(config: Config, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the batches with a huge gradient, and of those that are NaN."""
    rng, steps = np.random.default_rng(seed), config.steps
    huge = rng.choice(steps, round(config.broken_share * steps), replace=False)
    # Late, since a run that does not skip them is over then.
    late = np.arange(steps * 4 // 5, steps)
    return huge, rng.choice(late, round(config.nan_share * steps), replace=False)


def broken(
    batches: Iterator[np.ndarray], config: Config, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gives each token its weight, 1, and breaks the weights of some batches."""
    huge, nan = bad_steps(config, seed)
    for number, tokens_BT1 in enumerate(batches):
        weights_BT = np.ones(tokens_BT1[:, 1:].shape, np.float32)
        if number in huge:
            # One record's weight is 1/p, and its p came out as almost nothing.
            weights_BT[0] = 1000 * len(weights_BT)
        if number in nan:
            weights_BT[:] = np.nan
        yield tokens_BT1, weights_BT


# --- training -------------------------------------------------------------------------


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(
    model: Transformer,
    optimizer: nnx.Optimizer,
    tokens_BT1: jax.Array,
    weights_BT: jax.Array,
) -> None:
    loss, grads = nnx.value_and_grad(cross_entropy)(model, tokens_BT1, weights_BT)
    optimizer.update(model, grads, loss=loss)


validation_loss = nnx.jit(cross_entropy)


def train(
    config: Config, name: str, tx: Any, seed: int, texts: Any, path: Path
) -> list[float]:
    """The validation losses of a run; its log is written to the path."""
    text, validation_text = texts
    model = Transformer(config, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    # Every device has the model, and the devices share each batch.
    mesh = Mesh(jax.devices(), "batch")
    by_sequence = NamedSharding(mesh, P("batch"))
    state = jax.device_put(nnx.state((model, optimizer)), NamedSharding(mesh, P()))
    nnx.update((model, optimizer), state)

    held_out = batches(validation_text, config.batch, config.context, seed=0)
    held_out = jax.device_put([next(held_out) for _ in range(8)], by_sequence)
    path.unlink(missing_ok=True)  # an existing log would be continued
    hyperparameters = dataclasses.asdict(config) | {"seed": seed}
    log = ClipLog(path, transform=name, hyperparameters=hyperparameters)
    stream = batches(text, config.batch, config.context, seed)
    stream = broken(stream, config, seed)
    losses = []
    for step in tqdm(range(1, config.steps + 1), f"{name}, seed {seed}", unit="step"):
        tokens_BT1, weights_BT = jax.device_put(next(stream), by_sequence)
        train_step(model, optimizer, tokens_BT1, weights_BT)
        if step % config.every == 0 or step == config.steps:
            log.update(optimizer)
            loss = [validation_loss(model, tokens_BT1) for tokens_BT1 in held_out]
            losses.append(float(np.mean(jax.device_get(loss))))
    return losses


# --- output ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """All seeds of a clip."""

    losses_SN: np.ndarray  # S seeds, N validations
    logs: list[LogData]


HEADER = "clip          validation loss  clipped  skipped   largest norm, clipped to"


def row(name: str, run: Run) -> str:
    final_S = run.losses_SN[:, -1]
    loss = f"{final_S.mean():.3f}"
    if len(final_S) > 1:
        loss += f" ± {final_S.std(ddof=1):.3f}"
    before = np.concatenate([log.norm for log in run.logs])
    after = np.concatenate([log.norm * log.scale for log in run.logs])
    clipped = np.mean([log.clipped.mean() for log in run.logs])
    skipped = np.mean([log.skipped.sum() for log in run.logs])
    return (
        f"{name:<12}{loss:>17}{clipped:>9.1%}{skipped:>9.1f}"
        f"{before[np.isfinite(before)].max():>15.0f}"
        f"{after[np.isfinite(after)].max():>12.1f}"
    )


# Color-blind readers can tell them apart.
COLORS = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


def picture(runs: dict[str, Run], config: Config, path: Path) -> None:
    n_rows = (len(runs) + 1) // 2
    figure = Figure(figsize=(11, 4 + 2.6 * n_rows), layout="constrained")
    grid = figure.add_gridspec(1 + n_rows, 2, height_ratios=[1.5] + [1] * n_rows)
    top = figure.add_subplot(grid[0, :])
    steps = [*range(config.every, config.steps, config.every), config.steps]
    colors = itertools.cycle(COLORS)
    for i, ((name, run), color) in enumerate(zip(runs.items(), colors, strict=False)):
        mean_N, low_N, high_N = (f(run.losses_SN, 0) for f in (np.mean, np.min, np.max))
        label = f"{name}: {mean_N[-1]:.3f}"
        # The later the thinner, so that of two equal curves both are seen.
        width = max(1.5, 5 - i)
        top.plot(steps, mean_N, ".-", color=color, lw=width, label=label)
        top.fill_between(steps, low_N, high_N, color=color, alpha=0.15)
        panel = figure.add_subplot(grid[1 + i // 2, i % 2])
        draw_norms(panel, name, run.logs[0], bad_steps(config, 0), color)
    title = f"Validation loss, {config.broken_share:.1%} of the batches are broken"
    if config.nan_share:
        title += "; after a batch of NaN a run is over, unless it skips"
    top.set(title=title, xlabel="step", ylabel="nats per character")
    top.legend(title="clip: final loss")
    figure.savefig(path, dpi=120)


def draw_norms(axes: Axes, name: str, log: LogData, bad: Any, color: str) -> None:
    for step in np.concatenate(bad):
        axes.axvline(step, color="0.85", lw=4, zorder=0)
    axes.plot(log.step, log.norm, color=color, lw=1, label="before the clip")
    if np.isfinite(log.threshold).any():  # without a clip there is none to draw
        axes.plot(log.step, log.threshold, color="black", lw=1.5, label="threshold")
    title = f"{name}: norm of the gradient, gray: broken batches"
    axes.set(yscale="log", xlabel="step", title=title)
    axes.legend(fontsize="small")


def main() -> None:
    config = read_config()
    if unknown := set(config.clip.split(",")) - set(CLIPS):
        raise SystemExit(f"--clip: {sorted(unknown)} are not among {list(CLIPS)}")
    texts = load_text(config.text)
    runs: dict[str, Run] = {}
    for name in config.clip.split(","):
        # One for all seeds, so that they compile once.
        tx = optaxclip.record_history(CLIPS[name](config), config.every)
        losses, logs = [], []
        for seed in range(config.seeds):
            path = Path(config.out, f"{name}-seed{seed}.jsonl")
            losses.append(train(config, name, tx, seed, texts, path))
            logs.append(read(path))
            report(logs[-1], path.with_suffix(".html"), title=f"char_lm, {name}")
        runs[label(config, name)] = Run(np.array(losses), logs)
    picture(runs, config, Path(config.out, "char_lm.png"))
    print("\n".join([HEADER, *(row(name, run) for name, run in runs.items())]))
    print(f"In {config.out}/ are char_lm.png and, of each run, log and report.")


if __name__ == "__main__":
    main()
