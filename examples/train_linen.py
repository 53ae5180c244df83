"""Train a character-level Transformer with a clip that chooses its own threshold.

    pip install "optaxclip[examples]"
    python train_linen.py                 # two minutes on a CPU
    python train_linen.py                 # killed? The same command goes on
    tensorboard --logdir runs/train_linen

The twin of `train.py` for Flax Linen, and a file to fork as well: a `TrainState`, an
optimizer that clips and skips, metrics to TensorBoard, a log of every step and its
report, checkpoints, a sample of text. The data are in `load_text`, the model in
`Transformer`, the clip in `new_optimizer`.

A name ends in the axes of its array: B batch, T time, T1 time and one more, D width,
H heads, K width of a head, V vocabulary.
"""

import argparse
import dataclasses
import functools
import itertools
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tqdm import tqdm

import optaxclip
from optaxclip.audit import ClipLog, LogData, read, report

COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # for colorblind people, too


def option(default: Any, comment: str) -> Any:
    """A field whose comment is also its line of `--help`."""
    return dataclasses.field(default=default, metadata={"help": comment})


@dataclasses.dataclass(frozen=True)
class Config:
    # The training.
    steps: int = option(1500, "optimizer steps")
    batch: int = option(16, "sequences a batch, a multiple of the number of devices")
    peak_rate: float = option(3e-3, "learning rate after the warm-up")
    warmup: int = option(50, "steps of linear warm-up; a cosine decay follows")
    seeds: int = option(1, "train this many models, one after the other")
    # The model and the text.
    context: int = option(96, "characters a sequence")
    depth: int = option(3, "Transformer blocks")
    heads: int = option(4, "attention heads, a divisor of the width")
    width: int = option(96, "width of the residual stream")
    dtype: str = option("float32", "dtype of the computation; parameters stay float32")
    megabytes: float = option(8.0, "read at most this much text")
    # The output.
    every: int = option(100, "steps between two checkpoints, and two reads of metrics")
    sample: int = option(400, "characters to write at the end")
    out: str = option("runs/train_linen", "folder; in another all begins anew")


def read_config() -> Config:
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        text = field.metadata["help"]
        parser.add_argument(flag, type=field.type, default=field.default, help=text)
    config = Config(**vars(parser.parse_args()))
    if config.batch % jax.device_count():
        parser.error(f"--batch must be a multiple of {jax.device_count()} (devices)")
    return config


# --- data -----------------------------------------------------------------------------


def load_text(megabytes: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """The standard library as ASCII codes; every tenth file is kept for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Not the library itself, or tables of data.
    skip = {"site-packages", "dist-packages", "test", "tests", "encodings"}
    skip |= {"pydoc_data", "__pycache__"}
    paths = sorted(root.rglob("*.py"))
    paths = [p for p in paths if not skip & set(p.relative_to(root).parts)]
    if len(paths) < 10:
        raise SystemExit(f"There is next to no Python source in {root} to train on.")
    texts, room = [], int(megabytes * 1e6)
    for path in paths:
        texts.append(np.frombuffer(path.read_bytes()[:room], np.uint8))
        room -= len(texts[-1])
    train = np.concatenate([text for i, text in enumerate(texts) if i % 10])
    validation = np.concatenate(texts[::10])
    return np.minimum(train, 127), np.minimum(validation, 127)  # 127: not ASCII


def batches(
    text: np.ndarray, batch: int, context: int, seed: int, first: int = 0
) -> Iterator[np.ndarray]:
    """Batches of tokens_BT1 without end, from number `first` on."""
    for number in itertools.count(first):
        # Seeded by the number, so that a run that resumes sees what it would have seen.
        rng = np.random.default_rng((seed, number))
        starts_B = rng.integers(len(text) - context, size=batch)
        yield text[starts_B[:, None] + np.arange(context + 1)]


# --- model ----------------------------------------------------------------------------


class Block(nn.Module):
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        linear = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.RMSNorm, dtype=self.dtype)
        qkv_BTD3 = linear(3 * width, name="qkv")(norm()(x_BTD))
        q_BTHK, k_BTHK, v_BTHK = (
            part_BTD.reshape(*x_BTD.shape[:2], self.heads, -1)
            for part_BTD in jnp.split(qkv_BTD3, 3, axis=-1)
        )
        a_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True)
        x_BTD += linear(width, name="out")(a_BTHK.reshape(x_BTD.shape))
        # Squared ReLU: learns as well as GELU, at half the time on a CPU.
        up_BTD4 = nn.relu(linear(4 * width, name="up")(norm()(x_BTD))) ** 2
        return x_BTD + linear(width, name="down")(up_BTD4)


class Transformer(nn.Module):
    vocabulary: int
    width: int
    depth: int
    heads: int
    context: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        embed = functools.partial(nn.Embed, features=self.width, dtype=self.dtype)
        x_BTD = embed(self.vocabulary, name="characters")(tokens_BT)
        x_BTD += embed(self.context, name="positions")(jnp.arange(tokens_BT.shape[1]))
        for _ in range(self.depth):
            x_BTD = Block(self.heads, self.dtype)(x_BTD)
        x_BTD = nn.RMSNorm(dtype=self.dtype)(x_BTD)
        head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name="head")
        return head(x_BTD).astype(jnp.float32)


def cross_entropy(apply: Callable, params: Any, tokens_BT1: jax.Array) -> jax.Array:
    """The mean loss of a next character in nats."""
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(
        apply({"params": params}, tokens_BT1[:, :-1]),
        tokens_BT1[:, 1:].astype(jnp.int32),
    )
    return jnp.mean(losses_BT)


# --- training -------------------------------------------------------------------------


def new_optimizer(config: Config) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.peak_rate, config.warmup, config.steps, config.peak_rate / 10
    )
    tx = optax.chain(optaxclip.clip_by_percentile(), optax.adamw(rate))
    # A step that is not finite changes nothing at all. The recorder is for the log.
    tx = optaxclip.skip_nonfinite(tx)
    return optaxclip.record_history(tx, length=config.every, leaf_norms=True)


@functools.partial(jax.jit, donate_argnames="state")
def train_step(
    state: TrainState, tokens_BT1: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(cross_entropy, argnums=1)(
        state.apply_fn, state.params, tokens_BT1
    )
    # In place of `state.apply_gradients`, which would not pass the loss on.
    tx = optax.with_extra_args_support(state.tx)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=loss)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, {"loss": loss} | optaxclip.metrics(state)


@jax.jit
def validation_loss(state: TrainState, tokens_BT1: jax.Array) -> jax.Array:
    return cross_entropy(state.apply_fn, state.params, tokens_BT1)


def new_state(config: Config, seed: int) -> TrainState:
    model = Transformer(
        vocabulary=128,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        context=config.context,
        dtype=jnp.dtype(config.dtype),
    )
    tokens_BT = jnp.zeros((1, config.context), jnp.int32)
    params = model.init(jax.random.key(seed), tokens_BT)["params"]
    tx = new_optimizer(config)
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def train(config: Config, text: np.ndarray, seed: int, folder: Path) -> TrainState:
    """The trained model; metrics, log and checkpoints are written to the folder."""
    # The model is on every device there is, and a batch is shared out among them.
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), (AxisType.Auto,))
    state = new_state(config, seed)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    by_sequence = NamedSharding(mesh, PartitionSpec("batch"))

    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    checkpoints = ocp.CheckpointManager(folder.absolute() / "checkpoints", options=keep)
    done = checkpoints.latest_step() or 0
    if done:
        saved = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
        state = cast(TrainState, saved)
        print(f"Going on from step {done}, found in {folder}/")
    log = ClipLog(
        folder / "clip.jsonl",
        params=state.params,
        hyperparameters=dataclasses.asdict(config) | {"seed": seed},
    )
    log.update(state)  # takes back what came after the checkpoint
    board = SummaryWriter(str(folder), purge_step=done)  # does so, too
    stream = batches(text, config.batch, config.context, seed, first=done)
    bar = tqdm(desc=f"seed {seed}", total=config.steps, initial=done, unit="step")
    for first in range(done, config.steps, config.every):
        steps = range(first, min(first + config.every, config.steps))
        pending = []
        for _ in steps:
            tokens_BT1 = jax.device_put(next(stream), by_sequence)
            state, metrics = train_step(state, tokens_BT1)
            pending.append(metrics)
        # The metrics stay on the device until here: fetched at each step, they would
        # make each step wait for the one before.
        for step, metrics in zip(steps, jax.device_get(pending), strict=True):
            for name, value in metrics.items():
                if np.isfinite(value):  # the threshold of the first steps is not
                    board.add_scalar(name, value.item(), step)
        # The log first: what it has beyond a checkpoint it can take back.
        log.update(state)
        checkpoints.save(steps.stop, args=ocp.args.StandardSave(state))
        bar.set_postfix_str(f"loss {pending[-1]['loss']:.3f}", refresh=False)
        bar.update(len(steps))
    bar.close()
    board.close()
    checkpoints.close()
    return state


# --- output ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="count")
def written(
    state: TrainState, prompt_T: jax.Array, key: jax.Array, count: int
) -> jax.Array:
    """What the model writes after a prompt as long as its context, as codes."""

    def write(window_T: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_V = state.apply_fn({"params": state.params}, window_T[None])[0, -1]
        code = jax.random.categorical(key, logits_V / 0.7).astype(window_T.dtype)
        return jnp.append(window_T[1:], code), code

    return jax.lax.scan(write, prompt_T, jax.random.split(key, count))[1]


def picture(logs: list[LogData], path: Path) -> None:
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    for seed, (log, color) in enumerate(zip(logs, itertools.cycle(COLORS))):
        width = min(20, len(log.loss))
        losses = np.convolve(log.loss, np.ones(width) / width, "valid")
        label = f"seed {seed}, mean of {width} steps"
        top.plot(log.step, log.loss, color=color, lw=0.5, alpha=0.4)
        top.plot(log.step[width - 1 :], losses, color=color, lw=2, label=label)
    top.set(title="Training loss", ylabel="nats a character")
    top.legend()
    log = logs[0]
    bottom.plot(log.step, log.norm, color=COLORS[0], lw=1, label="before the clip")
    held, norms = log.step[log.clipped], log.norm[log.clipped]
    bottom.plot(held, norms, "o", color=COLORS[1], ms=4, label="clipped steps")
    bottom.plot(log.step, log.threshold, color="black", lw=1.5, label="threshold")
    title = f"Norm of the gradient, seed 0: {log.clipped.mean():.1%} of steps clipped"
    bottom.set(title=title, xlabel="step", yscale="log")
    bottom.legend(ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    config = read_config()
    text, validation_text = load_text(config.megabytes)
    prompt_T = jnp.asarray(validation_text[: config.context])
    logs, rows = [], []
    for seed in range(config.seeds):
        folder = Path(config.out, f"seed{seed}")
        state = train(config, text, seed, folder)
        # The same for every seed.
        held_out = batches(validation_text, config.batch, config.context, seed=0)
        losses = [validation_loss(state, jnp.asarray(next(held_out))) for _ in range(8)]
        log = read(folder / "clip.jsonl")
        report(log, folder / "report.html", title=f"train_linen.py, seed {seed}")
        logs.append(log)
        loss = np.mean(log.loss[-50:]), np.mean(losses)
        rows.append((seed, *loss, log.clipped.mean(), log.skipped.sum()))
        codes = written(state, prompt_T, jax.random.key(seed), config.sample)
        print(f"\nSeed {seed} writes:\n{''.join(map(chr, codes.tolist()))}\n")
    picture(logs, Path(config.out, "train_linen.png"))
    print("seed  training loss  validation loss  clipped  skipped")
    for row in rows:
        print("{:<4}{:>15.3f}{:>17.3f}{:>9.1%}{:>9}".format(*row))
    print(f"In {config.out}/ are a picture and, of each seed, log, report and metrics.")


if __name__ == "__main__":
    main()
