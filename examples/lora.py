"""Fine-tune LoRA adapters on a frozen Transformer, with a clip only on the adapters.

    pip install "optaxclip[examples]"
    python lora.py                  # one base, three fine-tunings: minutes on a CPU
    python lora.py --seeds 3 --rank 4 --outlier 100
    python lora.py --text notes.txt      # your own text

A Transformer learns Python source with `train.py`, in the same folder. Then it is
frozen, and adapters on its linear layers learn the Python language reference, in
capital letters. The optimizer gets only the adapters (`wrt=nnx.LoRAParam`): the clip
measures nothing else, the log has one norm for each factor of an adapter, and Adam
keeps moments only for the adapters.

In a few batches one sequence counts a thousand times, as if someone had stored counts
where sample weights belong. Every clip gets the same base, batches and outliers.

With `--seeds 3`, the output ends like this:

clip        loss before     after         clipped  largest norm
none              3.215     2.748 ± 0.082     0.0%         305.7
global 1          3.215     2.340 ± 0.010     1.1%         142.7
percentile        3.215     2.297 ± 0.008    43.4%         128.7

Without NNX, `optax.partition({"adapter": tx, "base": optax.set_to_zero()}, labels)`
does the same: a clip within it measures the leaves of its label.

The suffix of a name lists the axes of its array: B batch, T time, T1 time and one more.
"""

import argparse
import dataclasses
import functools
import inspect
import re
import statistics
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm
from train import Transformer, batches, cross_entropy, load_text, train_step

import optaxclip
from optaxclip.audit import ClipLog, LogData, read, report


@dataclasses.dataclass(frozen=True)
class Config:
    # The comparison.
    clip: str = "none,global,percentile"  # runs to make, from CLIPS
    seeds: int = 1  # fine-tune with each clip this many times
    max_norm: float = 1.0  # global: largest norm of the adapters' gradient
    outliers: float = 0.01  # share of the batches with an outlier
    outlier: float = 1000.0  # weight of an outlier sequence; the others count 1
    # The fine-tuning.
    text: str = ""  # file to fine-tune on; the Python language reference if empty
    rank: int = 8  # rank of an adapter
    steps: int = 300  # steps of a fine-tuning
    rate: float = 3e-3  # its learning rate, constant
    batch: int = 16  # sequences per batch, a multiple of the number of devices
    every: int = 20  # steps between two validations, and two updates of the log
    # The base.
    base_steps: int = 400  # steps of the pre-training
    base_rate: float = 3e-3  # its learning rate, with a cosine decay
    context: int = 64  # characters per sequence
    depth: int = 3  # Transformer blocks
    heads: int = 4  # attention heads, a divisor of the width
    width: int = 96  # width of the residual stream
    dtype: str = "float32"  # dtype of the computation; parameters stay float32
    # The output.
    out: str = "runs/lora"  # folder for logs, reports and picture


def read_config() -> Config:
    """Options of the command line for all fields; the comments above are their help."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag, type=field.type, default=field.default, help=text)
    return Config(**vars(parser.parse_args()))


# One line per run: from the configuration to the clip.
CLIPS = {
    # An infinite threshold clips nothing, but the norm is still measured.
    "none": lambda c: optaxclip.clip_by_global_norm(jnp.inf),
    "global": lambda c: optaxclip.clip_by_global_norm(c.max_norm),
    "percentile": lambda c: optaxclip.clip_by_percentile(),
}


def label(config: Config, name: str) -> str:
    """The name of a run, with its threshold if somebody had to choose one."""
    return f"global {config.max_norm:g}" if name == "global" else name


# --- data -----------------------------------------------------------------------------


def other_text(megabytes: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Another style than the pre-training's: the language reference, in capitals.

    ASCII codes; of the reference's sections, every tenth is kept for validation.
    """
    from pydoc_data.topics import topics

    sections = [topics[name].upper().encode("ascii", "replace") for name in topics]
    sections = [np.frombuffer(section, np.uint8) for section in sorted(sections)]
    validation = np.concatenate(sections[::10])
    train = np.concatenate([text for i, text in enumerate(sections) if i % 10])
    room = int(megabytes * 1e6)
    return train[:room], validation[:room]


def tuning_text(config: Config) -> tuple[np.ndarray, np.ndarray]:
    return load_text(config.text) if config.text else other_text()


def broken(
    batches: Iterable[np.ndarray], steps: Collection[int], weight: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches and their weights; at these steps the first sequence has another one."""
    for step, tokens_BT1 in enumerate(batches):
        weights_BT = np.ones(tokens_BT1[:, 1:].shape, np.float32)
        if step in steps:
            weights_BT[0] = weight
        yield tokens_BT1, weights_BT


def outlier_steps(config: Config, seed: int) -> list[int]:
    count = round(config.outliers * config.steps)
    # Not at the start: before it has learned something, it has nothing to lose.
    late = np.arange(config.steps // 4, config.steps)
    rng = np.random.default_rng(seed)
    return sorted(rng.choice(late, count, replace=False).tolist())


# --- model ----------------------------------------------------------------------------


def new_base(config: Config) -> Transformer:
    return Transformer(config, nnx.Rngs(0))


def add_lora(model: Transformer, rank: int, rngs: nnx.Rngs) -> None:
    """Puts an adapter on every linear layer; with a zero factor it does nothing yet."""
    for _, module in list(nnx.iter_modules(model)):
        for name, layer in list(vars(module).items()):
            if isinstance(layer, nnx.Linear):
                adapter = nnx.LoRA(
                    layer.in_features,
                    rank,
                    layer.out_features,
                    base_module=layer,
                    dtype=layer.dtype,
                    rngs=rngs,
                )
                setattr(module, name, adapter)


@functools.cache  # one for all seeds, so that they compile once
def new_optimizer(config: Config, clip: str) -> optax.GradientTransformation:
    tx = optax.chain(CLIPS[clip](config), optax.adamw(config.rate, weight_decay=0.0))
    tx = optaxclip.skip_nonfinite(tx)
    return optaxclip.record_history(tx, config.every, leaf_norms=True)


def new_model(
    config: Config, base: Transformer, clip: str, seed: int
) -> tuple[Transformer, nnx.Optimizer]:
    model = nnx.clone(base)
    add_lora(model, config.rank, nnx.Rngs(seed))
    return model, nnx.Optimizer(model, new_optimizer(config, clip), wrt=nnx.LoRAParam)


# --- training -------------------------------------------------------------------------


def on_every_device(mesh: Mesh, *modules: Any) -> None:
    """Places them as a step returns them: otherwise, the step would compile twice."""
    state = jax.device_put(nnx.state(modules), NamedSharding(mesh, P()))
    nnx.update(modules, state)


def pretrain(config: Config, sharding: NamedSharding) -> Transformer:
    base = new_base(config)
    rate = optax.cosine_decay_schedule(config.base_rate, config.base_steps, 0.1)
    tx = optax.chain(optaxclip.clip_by_percentile(), optax.adamw(rate))
    tx = optaxclip.skip_nonfinite(tx)
    optimizer = nnx.Optimizer(base, tx, wrt=nnx.Param)
    on_every_device(sharding.mesh, base, optimizer)
    text, _ = load_text()
    stream = batches(text, config.batch, config.context, seed=0)
    for _ in tqdm(range(config.base_steps), desc="base", unit="step"):
        train_step(base, optimizer, jax.device_put(next(stream), sharding))
    return base


# The base is not donated: all runs share it. Only the adapters are differentiated.
@nnx.jit(donate_argnames="optimizer")
def tune_step(
    model: Transformer,
    optimizer: nnx.Optimizer,
    tokens_BT1: jax.Array,
    weights_BT: jax.Array,
) -> None:
    adapters = nnx.DiffState(0, nnx.LoRAParam)
    loss_and_grads = nnx.value_and_grad(cross_entropy, argnums=adapters)
    loss, grads = loss_and_grads(model, tokens_BT1, weights_BT)
    optimizer.update(model, grads, loss=loss)


validation_loss = nnx.jit(cross_entropy)


def fine_tune(
    config: Config,
    base: Transformer,
    clip: str,
    seed: int,
    path: Path,
    sharding: NamedSharding,
) -> list[float]:
    """The validation losses, before the first step too; a log is left at the path."""
    text, validation_text = tuning_text(config)
    held_out = batches(validation_text, config.batch, config.context, seed=0)
    held_out = jax.device_put([next(held_out) for _ in range(8)], sharding)
    model, optimizer = new_model(config, base, clip, seed)
    on_every_device(sharding.mesh, model, optimizer)

    def validate() -> float:
        return statistics.fmean(validation_loss(model, x).item() for x in held_out)

    path.unlink(missing_ok=True)  # an existing log would be continued
    log = ClipLog(
        path,
        params=nnx.state(model, nnx.LoRAParam),
        transform=clip,
        hyperparameters=dataclasses.asdict(config) | {"seed": seed},
    )
    stream = batches(text, config.batch, config.context, seed)
    stream = broken(stream, outlier_steps(config, seed), config.outlier)
    losses = [validate()]
    bar = tqdm(total=config.steps, desc=f"{clip}, seed {seed}", unit="step")
    for first in range(0, config.steps, config.every):
        steps = range(first, min(first + config.every, config.steps))
        for _ in steps:
            batch = jax.device_put(next(stream), sharding)
            tune_step(model, optimizer, *batch)
        log.update(optimizer)
        losses.append(validate())
        bar.set_postfix_str(f"validation {losses[-1]:.3f}", refresh=False)
        bar.update(len(steps))
    bar.close()
    return losses


# --- output ---------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    losses: np.ndarray  # one row per seed, one column per validation
    logs: list[LogData]


def table(results: dict[str, Result]) -> str:
    lines = ["clip        loss before     after         clipped  largest norm"]
    for clip, result in results.items():
        first, last = result.losses[:, 0], result.losses[:, -1]
        clipped = np.mean([log.clipped.mean() for log in result.logs])
        norm = max(np.nanmax(log.norm) for log in result.logs)
        lines.append(
            f"{clip:<12}{first.mean():>11.3f}{spread(last):>18}"
            f"{clipped:>9.1%}{norm:>14.1f}"
        )
    return "\n".join(lines)


def spread(values: np.ndarray) -> str:
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


# Color-blind readers can tell them apart.
COLORS = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


def picture(config: Config, results: dict[str, Result], path: Path) -> None:
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.add_gridspec(2, len(results), height_ratios=[1.4, 1])
    top = figure.add_subplot(grid[0, :])
    panel = None
    for i, (clip, result) in enumerate(results.items()):
        draw_losses(config, top, clip, result, COLORS[i % len(COLORS)])
        panel = figure.add_subplot(grid[1, i], sharey=panel)
        draw_norms(panel, clip, result.logs[0], COLORS[i % len(COLORS)])
        for step in outlier_steps(config, seed=0):
            for axes in (top, panel):
                axes.axvline(step, color="0.85", lw=4, zorder=0)
    title = "Adapters learn another text; gray: seed 0's batches with an outlier"
    top.set(title=title, xlabel="step", ylabel="validation loss, nats per character")
    top.legend(title="clip: final loss")
    figure.savefig(path, dpi=90)


def draw_losses(
    config: Config, axes: Any, clip: str, result: Result, color: str
) -> None:
    n = result.losses.shape[1]
    steps = np.minimum(np.arange(n) * config.every, config.steps)
    label = f"{clip}: {result.losses[:, -1].mean():.3f}"
    axes.plot(steps, result.losses.mean(0), ".-", color=color, lw=2, label=label)
    low, high = result.losses.min(0), result.losses.max(0)
    axes.fill_between(steps, low, high, color=color, alpha=0.15)


def draw_norms(axes: Any, clip: str, log: LogData, color: str) -> None:
    axes.plot(log.step, log.norm, color=color, lw=1, label="norm")
    if np.isfinite(log.threshold).any():
        limits = np.where(np.isfinite(log.threshold), log.threshold, np.nan)
        axes.plot(log.step, limits, color="black", lw=1, ls="--", label="threshold")
    axes.set(yscale="log", xlabel="step", title=clip)
    axes.set(ylabel="gradient of the adapters")
    axes.legend(fontsize="small")


def main() -> None:
    config = read_config()
    if unknown := set(config.clip.split(",")) - set(CLIPS):
        raise SystemExit(f"--clip: {sorted(unknown)} are not among {list(CLIPS)}")
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    # Every device has the model, and the devices share each batch.
    sharding = NamedSharding(Mesh(jax.devices(), "batch"), P("batch"))
    base = pretrain(config, sharding)
    results = {}
    for clip in config.clip.split(","):
        losses, logs = [], []
        for seed in range(config.seeds):
            path = folder / f"{clip}-seed{seed}.jsonl"
            losses.append(fine_tune(config, base, clip, seed, path, sharding))
            logs.append(read(path))
            report(logs[-1], path.with_suffix(".html"), title=f"lora, {path.stem}")
        results[label(config, clip)] = Result(np.array(losses), logs)
    picture(config, results, folder / "lora.png")
    adapters = next(iter(results.values())).logs[0].metadata["parameter_count"]
    whole = sum(x.size for x in jax.tree.leaves(nnx.state(base, nnx.Param)))
    print(f"Adapters of {adapters:,} parameters on a base of {whole:,}.")
    print(table(results))
    print(f"In {folder}/ are lora.png and, of each run, log and report.")


if __name__ == "__main__":
    main()
