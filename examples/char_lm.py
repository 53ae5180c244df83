"""A character-level language model, trained under several gradient clips in turn.

    pip install "optaxclip[examples]"
    python char_lm.py     # four runs, a table, a picture, reports: minutes on a CPU
    python char_lm.py --clip value,global,leaf,zclip --nan-share 0 --seeds 3
    python char_lm.py --dtype bfloat16 --width 512 --batch 64    # on an accelerator

A decoder-only Transformer (Flax NNX) learns to predict the next character of Python's
own standard library. A small share of the training batches is broken: their gradient is
a thousand times too large, or, late in the run, NaN. Every clip meets the same model,
the same data and the same breaks. The optimizer records what its clip did; a log keeps
it, and a page for the browser reports on it.

A name ends in the axes of its array: B batch, T time, D width, H heads, K width of a
head, V vocabulary, N validation batches.
"""

import argparse
import csv
import dataclasses
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

import optaxclip
from optaxclip.audit import ClipLog, read, report

Batch = dict[str, Any]


def option(default: Any, comment: str) -> Any:
    """A field whose comment is also its line of `--help`."""
    return dataclasses.field(default=default, metadata={"help": comment})


@dataclasses.dataclass(frozen=True)
class Config:
    # The comparison. Each threshold is about twice what it bounds in an ordinary step.
    clip: str = option("none,global,percentile,skip", "runs to make, from CLIPS")
    seeds: int = option(1, "repeat every run with this many seeds")
    broken_share: float = option(0.01, "share of the batches with a huge gradient")
    nan_share: float = option(0.005, "share of the batches with a loss of 0/0")
    max_value: float = option(0.1, "value: largest element of the gradient")
    max_norm: float = option(1.0, "global: largest norm of the whole gradient")
    max_leaf_norm: float = option(0.75, "leaf: largest norm of a parameter's gradient")
    percentile: float = option(95.0, "percentile, skip: of the last norms")
    window: int = option(100, "percentile, skip: how many norms to look back on")
    # The training.
    steps: int = option(200, "optimizer steps of a run")
    batch: int = option(16, "sequences a batch, a multiple of the number of devices")
    peak_rate: float = option(3e-3, "learning rate after the warm-up")
    warmup: int = option(20, "steps of linear warm-up; a cosine decay follows")
    # The model.
    block: int = option(128, "characters a sequence")
    layers: int = option(4, "Transformer blocks")
    heads: int = option(4, "attention heads, a divisor of the width")
    width: int = option(128, "width of the residual stream")
    dtype: str = option("float32", "dtype of the computation; parameters stay float32")
    # Input and output.
    corpus_mb: float = option(8.0, "read at most this many megabytes of text")
    val_batches: int = option(4, "batches in the validation set")
    every: int = option(20, "steps between two validations, and two metrics transfers")
    out: str = option("runs/char_lm", "folder for metrics, logs, reports and picture")


def read_config() -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        text = field.metadata["help"]
        parser.add_argument(flag, type=field.type, default=field.default, help=text)
    config = Config(**vars(parser.parse_args()))
    if unknown := set(config.clip.split(",")) - set(CLIPS):
        parser.error(f"--clip: {sorted(unknown)} are not among {list(CLIPS)}")
    if config.batch % jax.device_count():
        parser.error(f"--batch must be a multiple of {jax.device_count()} (devices)")
    return config


# --- clips ----------------------------------------------------------------------------


def adamw(config: Config, clip: optax.GradientTransformation) -> Any:
    """AdamW behind a clip, and two gauges of the global norm around the clip."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.peak_rate, config.warmup, config.steps, config.peak_rate / 10
    )
    return optax.named_chain(
        ("before", optaxclip.clip_by_global_norm(jnp.inf)),
        ("clip", clip),
        ("after", optaxclip.clip_by_global_norm(jnp.inf)),
        ("adamw", optax.adamw(rate)),
    )


def percentile(config: Config) -> optax.GradientTransformation:
    return optaxclip.clip_by_percentile(config.percentile, config.window)


def recorded(config: Config, tx: Any) -> optax.GradientTransformation:
    """The optimizer, which keeps on the device what its clip does, for the log."""
    return optaxclip.record_history(tx, config.every, leaf_norms=True, clip="clip")


# A line a run: from the configuration to the optimizer.
CLIPS = {
    # An infinite threshold clips nothing, and measures all the same.
    "none": lambda c: adamw(c, optaxclip.clip_by_global_norm(jnp.inf)),
    "value": lambda c: adamw(c, optaxclip.clip_by_value(c.max_value)),
    "global": lambda c: adamw(c, optaxclip.clip_by_global_norm(c.max_norm)),
    "leaf": lambda c: adamw(c, optaxclip.clip_by_leaf_norm(c.max_leaf_norm)),
    "percentile": lambda c: adamw(c, percentile(c)),
    "zclip": lambda c: adamw(c, optaxclip.zclip()),
    # As percentile, and a step that is not finite changes nothing at all.
    "skip": lambda c: optaxclip.skip_nonfinite(adamw(c, percentile(c))),
}


# --- data -----------------------------------------------------------------------------


def read_corpus(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The standard library as ASCII codes; every tenth file is kept for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # What is not the library itself, and tables of data.
    skip = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "encodings",
        "pydoc_data",
    }
    paths = sorted(root.rglob("*.py"))
    paths = [p for p in paths if not skip & set(p.relative_to(root).parts)]
    texts, room = [], int(config.corpus_mb * 1e6)
    for path in paths:
        texts.append(np.frombuffer(path.read_bytes()[:room], np.uint8))
        room -= len(texts[-1])
    if len(paths) < 10:
        raise SystemExit(f"There is next to no Python source in {root} to train on.")
    train = np.concatenate([text for i, text in enumerate(texts) if i % 10])
    val = np.concatenate(texts[::10])
    return np.minimum(train, 127), np.minimum(val, 127)  # 127: all that is not ASCII


def cut(text: np.ndarray, starts_B: np.ndarray, block: int) -> Batch:
    codes = text[starts_B[:, None] + np.arange(block + 1)].astype(np.int32)
    return {"x_BT": codes[:, :-1], "y_BT": codes[:, 1:]}


def bad_steps(config: Config, seed: int) -> dict[int, int]:
    """The steps with a broken batch, and how many characters of it are left."""
    rng, steps = np.random.default_rng(seed), config.steps
    broken = rng.choice(steps, round(config.broken_share * steps), replace=False)
    # Late, since a run that does not skip them is over then.
    late = np.arange(steps * 4 // 5, steps)
    empty = rng.choice(late, round(config.nan_share * steps), replace=False)
    few = max(1, config.batch * config.block // 1000)
    return dict.fromkeys(broken.tolist(), few) | dict.fromkeys(empty.tolist(), 0)


def training_batch(
    config: Config, text: Any, seed: int, step: int, left: int | None
) -> Batch:
    # Seeded by the step, not drawn from a stream: every run sees the same batches.
    rng = np.random.default_rng((seed, step))
    starts_B = rng.integers(len(text) - config.block, size=config.batch)
    mask = np.ones(config.batch * config.block, np.float32)
    if left is not None:
        # As from records that are all prompt and no answer: next to nothing to learn.
        mask[rng.permutation(mask.size)[left:]] = 0
    mask_BT = mask.reshape(config.batch, config.block)
    return cut(text, starts_B, config.block) | {"mask_BT": mask_BT}


def validation_batches(config: Config, text: np.ndarray) -> list[Batch]:
    # The same windows for every run, spread over all of the text.
    last = len(text) - config.block - 1
    starts = np.linspace(0, last, config.val_batches * config.batch, dtype=int)
    starts_NB = starts.reshape(config.val_batches, config.batch)
    return [cut(text, starts_B, config.block) for starts_B in starts_NB]


# --- model ----------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.heads = config.heads
        self.norm1 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        qkv_BTD3 = self.qkv(self.norm1(x_BTD))
        q_BTHK, k_BTHK, v_BTHK = (
            part_BTD.reshape(*x_BTD.shape[:2], self.heads, -1)
            for part_BTD in jnp.split(qkv_BTD3, 3, axis=-1)
        )
        a_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True)
        x_BTD += self.out(a_BTHK.reshape(x_BTD.shape))
        # Squared ReLU: learns as well as GELU, at half the time on a CPU.
        return x_BTD + self.down(nnx.relu(self.up(self.norm2(x_BTD))) ** 2)


class Transformer(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.characters = nnx.Embed(128, width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(config.block, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, 128, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BT: jax.Array) -> jax.Array:
        x_BTD = self.characters(x_BT) + self.positions(jnp.arange(x_BT.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.head(self.norm(x_BTD))
        return logits_BTV.astype(jnp.float32)


def character_losses(model: Transformer, batch: Batch) -> jax.Array:
    logits_BTV = model(batch["x_BT"])
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["y_BT"])


def training_loss(model: Transformer, batch: Batch) -> jax.Array:
    # The bug, and a common one: the sum forgets the mask and the count does not. With
    # whole masks this is the mean and nobody notices; where a mask leaves 2 characters
    # of 2,048 it is the mean times 1,024, and so is the gradient. Of an empty batch
    # nothing is summed, and nothing counted: 0/0.
    mask_BT = batch["mask_BT"]
    losses_BT = character_losses(model, batch) * mask_BT.max()
    return losses_BT.sum() / mask_BT.sum()


# --- training -------------------------------------------------------------------------


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: Transformer, optimizer: nnx.Optimizer, batch: Batch) -> Batch:
    loss, grads = nnx.value_and_grad(training_loss)(model, batch)
    optimizer.update(model, grads, loss=loss)
    return {"train_loss": loss} | optaxclip.metrics(optimizer)


@nnx.jit
def validation_loss(model: Transformer, batch: Batch) -> jax.Array:
    return character_losses(model, batch).mean()


def new_model(config: Config, tx: Any, seed: int, sharding: NamedSharding) -> Any:
    model = Transformer(config, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = nnx.state((model, optimizer))
    nnx.update((model, optimizer), jax.device_put(state, sharding))
    return model, optimizer


def train(
    config: Config, name: str, tx: Any, seed: int, texts: Any, path: Path
) -> list[dict]:
    """The metrics of a run, a row a step; its log is written to the path."""
    text, val_text = texts
    # The model is on every device there is, and a batch is shared out among them.
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), auto)
    by_sequence = NamedSharding(mesh, PartitionSpec("batch"))
    model, optimizer = new_model(config, tx, seed, NamedSharding(mesh, PartitionSpec()))
    val_batches = jax.device_put(validation_batches(config, val_text), by_sequence)

    path.unlink(missing_ok=True)  # a log that exists would be gone on with
    log = ClipLog(
        path,
        params=nnx.state(model, nnx.Param),
        transform=name,
        hyperparameters=dataclasses.asdict(config) | {"seed": seed},
    )
    bad, rows = bad_steps(config, seed), []
    bar = tqdm(total=config.steps, desc=f"{name}, seed {seed}", unit="step")
    for first in range(0, config.steps, config.every):
        steps = range(first, min(first + config.every, config.steps))
        start, pending = time.perf_counter(), []
        for step in steps:
            batch = training_batch(config, text, seed, step, bad.get(step))
            batch = jax.device_put(batch, by_sequence)
            pending.append(train_step(model, optimizer, batch))
        # The metrics stay on the device until here: fetched at each step, they would
        # make each step wait for the one before.
        pending = jax.device_get(pending)
        log.update(optimizer)
        rate = len(steps) / (time.perf_counter() - start)
        for step, values in zip(steps, pending, strict=True):
            facts = {"step": step + 1, "bad": int(step in bad), "rate": rate}
            rows.append(facts | {key: value.item() for key, value in values.items()})
        losses = [validation_loss(model, batch) for batch in val_batches]
        rows[-1]["val_loss"] = float(np.mean(jax.device_get(losses)))
        bar.set_postfix_str(f"validation {rows[-1]['val_loss']:.3f}", refresh=False)
        bar.update(len(steps))
    bar.close()
    return rows


# --- output ---------------------------------------------------------------------------


def save(rows: list[dict], path: Path) -> None:
    with open(path, "w", newline="") as file:
        # The last row has all columns, most others no validation loss.
        writer = csv.DictWriter(file, rows[-1], restval="")
        writer.writeheader()
        writer.writerows(rows)


HEADER = (
    "clip         loss before NaN     final loss  clipped  skipped norm, after steps/s"
)


def table(runs: dict[str, list[list[dict]]]) -> str:
    """A line a run; the largest finite norms, the losses of the validation set."""
    lines = [HEADER]
    for name, repeats in runs.items():
        rows = [row for run in repeats for row in run]
        before = [row["before/grad_norm"] for row in rows]
        after = [row["after/grad_norm"] for row in rows]
        clipped = statistics.fmean(run[-1]["clip/clip_fraction"] for run in repeats)
        skipped = statistics.fmean(run[-1].get("skip_count", 0) for run in repeats)
        rate = statistics.median(row["rate"] for row in rows)
        last, final = zip(*map(last_losses, repeats), strict=True)
        lines.append(
            f"{name:<11}{spread(last):>17}{spread(final):>15}{clipped:>9.1%}"
            f"{skipped:>9.1f}{largest(before):>6.0f}{largest(after):>7.1f}{rate:>9.1f}"
        )
    return "\n".join(lines)


def last_losses(rows: list[dict]) -> tuple[float, float]:
    """The last validation loss before the first batch of 0/0, and the last of all."""
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    nan = [i for i, row in enumerate(rows) if np.isnan(row["train_loss"])]
    until = nan[0] if nan else len(rows)
    before = [row["val_loss"] for row in rows[:until] if "val_loss" in row]
    return (before or losses)[-1], losses[-1]


def spread(losses: tuple[float, ...]) -> str:
    deviation = f" ± {np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.3f}{deviation}"


def largest(norms: list[float]) -> float:
    return max(norm for norm in norms if np.isfinite(norm))


def picture(runs: dict[str, list[list[dict]]], path: Path) -> None:
    n_rows = (len(runs) + 1) // 2
    figure = Figure(figsize=(11, 4 + 2.6 * n_rows), layout="constrained")
    grid = figure.add_gridspec(1 + n_rows, 2, height_ratios=[1.5] + [1] * n_rows)
    top = figure.add_subplot(grid[0, :])
    for i, (name, repeats) in enumerate(runs.items()):
        draw_losses(top, name, repeats, f"C{i}")
        panel = figure.add_subplot(grid[1 + i // 2, i % 2])
        draw_norms(panel, name, repeats[0], f"C{i}")
    # A run that diverges must not flatten the others: log 128 is what guessing scores.
    top.set_ylim(top=min(top.get_ylim()[1], 1.05 * np.log(128)))
    top.set(xlabel="step", ylabel="validation loss, nats a character")
    top.legend(title="clip: final loss")
    figure.savefig(path, dpi=120)


def draw_losses(axes: Any, name: str, repeats: list[list[dict]], colour: str) -> None:
    validated = [[row for row in run if "val_loss" in row] for run in repeats]
    losses = np.array([[row["val_loss"] for row in run] for run in validated])
    steps, mean = [row["step"] for row in validated[0]], losses.mean(0)
    # A run that is dead stops at its last number.
    axes.plot(steps, mean, ".-", color=colour, lw=2, label=f"{name}: {mean[-1]:.3f}")
    axes.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.15)


def draw_norms(axes: Any, name: str, rows: list[dict], colour: str) -> None:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    for step in np.flatnonzero(columns["bad"]) + 1:
        axes.axvline(step, color="0.85", lw=5, zorder=0)
    for key, label, style in [
        ("grad_norm", "before", {"color": colour, "lw": 1, "alpha": 0.5}),
        ("clipped_grad_norm", "after", {"color": colour, "lw": 1.5}),
        ("clip_threshold", "threshold", {"color": "black", "lw": 1, "ls": "--"}),
    ]:
        axes.plot(columns["step"], columns[f"clip/{key}"], label=label, **style)
    axes.set(yscale="log", xlabel="step", ylabel="norm the clip bounds", title=name)
    axes.legend(ncols=3, fontsize="small")


def main() -> None:
    config = read_config()
    texts = read_corpus(config)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[list[dict]]] = {}
    for name in config.clip.split(","):
        # One for all seeds, so that they compile once.
        tx = recorded(config, CLIPS[name](config))
        for seed in range(config.seeds):
            path = folder / f"{name}-seed{seed}.jsonl"
            rows = train(config, name, tx, seed, texts, path)
            save(rows, path.with_suffix(".csv"))
            report(read(path), path.with_suffix(".html"), title=f"char_lm, {name}")
            runs.setdefault(name, []).append(rows)
    picture(runs, folder / "char_lm.png")
    print(table(runs))
    print(f"In {folder}/ are char_lm.png and, of each run, metrics, log and report.")


if __name__ == "__main__":
    main()
