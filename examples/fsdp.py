"""Train a Transformer whose parameters are sharded, and check it against one device.

    pip install "optaxclip[examples]"
    python fsdp.py                  # 4 devices, virtual ones on a CPU
    python fsdp.py --processes 2    # two processes; one is killed, both resume
    python fsdp.py --clip global --dtype float32 --seeds 3
    python fsdp.py --clip leaf      # a norm for each parameter

Fully sharded data parallelism (FSDP) takes three things here, each in one place: the
metadata of a parameter says along which axis it is split, `gathered` collects a layer
while it is in use, and the batch is split by sequences. On a mesh with Explicit axes,
Adam's moments and the gradients are then sharded like their parameters, and a clip
needs no argument to measure all of them: the norm is the same as on one device, up to
rounding.

One batch in the run has a sequence with a weight of 1,000, and another one has a
sequence with a weight of NaN. Both sequences are on the last device only, but all
devices clip, or skip.

Every run is made twice, on all devices and on one, and the two are compared step by
step: the largest relative differences in the norm of any parameter's gradient at any
step, and in all weights at the end. One clip has a norm for each layer. The output ends
like this (the table of layers for bfloat16 is left out):

                              state on   final                  largest difference
dtype     clip       seed devs a device    loss clipped skipped of a norm of weights
float32   percentile    0    4    25.2%  2.8108      39       1   6.6e-07    4.1e-07
float32   layer 0.5     0    4    25.1%  2.8196      37       1   2.2e-06    1.5e-06
bfloat16  percentile    0    4    25.2%  2.8113      39       1   5.4e-03    5.9e-04
bfloat16  layer 0.5     0    4    25.1%  2.8200      37       1   5.2e-03    4.0e-04

float32, layer 0.5      median norm  at step 15   difference
blocks/0                      0.303        61.73     8.9e-07
blocks/1                      0.204        57.05     6.4e-07
characters/embedding          0.141        35.28     2.2e-06
head/kernel                   0.650       130.97     8.9e-07
norm/scale                    0.061        12.85     8.3e-07
positions/embedding           0.114        22.27     1.1e-06

The suffix of a name lists the axes of its array: B batch, T time, 1 one more, D width,
H heads, K width of a head, V vocabulary.
"""

import argparse
import dataclasses
import functools
import inspect
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm

import optaxclip
from optaxclip.audit import ClipLog, read, report

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    # The comparison.
    dtype: str = "float32,bfloat16"  # of the computation, one or several
    clip: str = "percentile,layer"  # one or several, from CLIPS
    seeds: int = 1  # repeat every run with this many seeds
    max_norm: float = 1.0  # global: largest norm of the whole gradient
    max_layer_norm: float = 0.5  # layer: largest norm of a layer's gradient
    max_leaf_norm: float = 0.5  # leaf: largest norm of a parameter's gradient
    spike: int = 15  # step at which one sequence counts a thousandfold
    nan: int = 25  # step at which one sequence counts NaN
    # The devices.
    cpu_devices: int = 4  # virtual devices in all, where there is only a CPU
    processes: int = 1  # processes that share the devices, on this machine
    kill: int = 18  # with several: step at which the last process is killed
    coordinator: str = ""  # address of process 0; set for each of several
    process_id: int = 0  # which of several processes this is
    # The training.
    steps: int = 40  # optimizer steps of a run
    batch: int = 16  # sequences a batch, a multiple of the number of devices
    rate: float = 3e-3  # learning rate
    save: int = 10  # steps between two checkpoints
    every: int = 5  # steps between two updates of the log
    # The model.
    context: int = 64  # characters a sequence
    depth: int = 2  # Transformer blocks
    heads: int = 4  # attention heads, a divisor of the width
    width: int = 128  # width, a multiple of the number of devices
    # Output.
    out: str = "runs/fsdp"  # folder for checkpoints, logs, reports and picture


def read_config() -> Config:
    """Options of the command line for all fields; the comments above are their help."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for field in dataclasses.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument(flag, type=field.type, default=field.default, help=text)
    return Config(**vars(parser.parse_args()))


ORANGE, BLUE, GREEN = "#E69F00", "#0072B2", "#009E73"  # told apart by everybody
LAYERS = (ORANGE, BLUE, GREEN, "#CC79A7", "#D55E00", "#56B4E9", "#767676")

# A line a run: from the configuration to the clip.
CLIPS = {
    "percentile": lambda c: optaxclip.clip_by_percentile(),
    "global": lambda c: optaxclip.clip_by_global_norm(c.max_norm),
    # All of a Transformer block has one norm, however its parameters are cut.
    "layer": lambda c: optaxclip.clip_by_subtree_norm(c.max_layer_norm, depth=2),
    "leaf": lambda c: optaxclip.clip_by_leaf_norm(c.max_leaf_norm),
}


def label(config: Config, name: str) -> str:
    """The name of a run, with the one threshold that somebody had to choose."""
    bounds = {"global": config.max_norm, "layer": config.max_layer_norm}
    bounds["leaf"] = config.max_leaf_norm
    return f"{name} {bounds[name]:g}" if name in bounds else name


class Run(NamedTuple):
    dtype: str
    clip: str
    seed: int


def runs(config: Config) -> list[Run]:
    return [
        Run(dtype, clip, seed)
        for dtype in config.dtype.split(",")
        for clip in config.clip.split(",")
        for seed in range(config.seeds)
    ]


# --- data -----------------------------------------------------------------------------


def load_text(megabytes: float = 2.0) -> np.ndarray:
    """Python's own standard library as ASCII codes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))
    return np.minimum(np.frombuffer(text, np.uint8)[: int(megabytes * 1e6)], 127)


def batches(config: Config, seed: int, first: int) -> Iterator[tuple[int, Batch]]:
    text = load_text()
    for step in range(first, config.steps):
        # Seeded by the step: a run that resumes sees what it would have seen.
        rng = np.random.default_rng((seed, step))
        starts_B = rng.integers(len(text) - config.context, size=config.batch)
        tokens_BT1 = text[starts_B[:, None] + np.arange(config.context + 1)]
        weights_BT = np.ones((config.batch, config.context), np.float32)
        yield step, {"tokens": tokens_BT1.astype(np.int32), "weights": weights_BT}


def broken(
    config: Config, batches: Iterable[tuple[int, Batch]]
) -> Iterator[tuple[int, Batch]]:
    """Breaks the last sequence of two batches: it lies on the last device alone."""
    weights = {config.spike: 1000.0, config.nan: np.nan}
    for step, batch in batches:
        batch["weights"][-1] *= weights.get(step, 1.0)
        yield step, batch


def killed(
    config: Config, batches: Iterable[tuple[int, Batch]]
) -> Iterator[tuple[int, Batch]]:
    """The last of several processes dies in front of a batch, as a machine may."""
    for step, batch in batches:
        if step == config.kill and is_last_of_several(config):
            # Done here is done there: this process is not ahead of the others.
            jax.block_until_ready(jax.live_arrays())
            os.kill(os.getpid(), signal.SIGKILL)
        yield step, batch


def spread(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Puts a batch on the mesh; each process holds the sequences of its own devices."""
    by_sequence = NamedSharding(mesh, P("data"))
    return {
        name: jax.make_array_from_callback(x.shape, by_sequence, x.__getitem__)
        for name, x in batch.items()
    }


# --- model ----------------------------------------------------------------------------

CUT = {"out_sharding": ("data", None)}  # a matrix is cut by its rows


def gathered(module: Any, dtype: Any) -> Any:
    """The layer with its whole weights on every device; gradients go the way back."""
    graphdef, params = nnx.split(module)
    whole = jax.tree.map(lambda x: jax.reshard(x.astype(dtype), P()), params)
    return nnx.merge(graphdef, whole)


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        linear = functools.partial(
            nnx.Linear, use_bias=False, kernel_metadata=CUT, rngs=rngs
        )
        self.heads = heads
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        q_BTHK, k_BTHK, v_BTHK = (
            part_BTD.reshape(*x_BTD.shape[:2], self.heads, -1)
            for part_BTD in jnp.split(self.qkv(self.norm1(x_BTD)), 3, axis=-1)
        )
        a_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True)
        x_BTD += self.out(a_BTHK.reshape(x_BTD.shape))
        return x_BTD + self.down(nnx.relu(self.up(self.norm2(x_BTD))) ** 2)


class Transformer(nnx.Module):
    def __init__(self, config: Config, dtype: str, rngs: nnx.Rngs):
        width, embed = config.width, functools.partial(nnx.Embed, rngs=rngs)
        self.dtype = jnp.dtype(dtype)
        self.characters = embed(128, width, embedding_metadata=CUT)
        self.positions = embed(config.context, width, embedding_metadata=CUT)
        self.blocks = nnx.List(
            Block(width, config.heads, rngs) for _ in range(config.depth)
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(
            width, 128, use_bias=False, kernel_metadata=CUT, rngs=rngs
        )

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        whole = functools.partial(gathered, dtype=self.dtype)
        positions_TD = whole(self.positions)(jnp.arange(tokens_BT.shape[1]))
        x_BTD = whole(self.characters)(tokens_BT, out_sharding=P("data"))
        x_BTD += positions_TD
        for block in self.blocks:
            x_BTD = whole(block)(x_BTD)
        return whole(self.head)(whole(self.norm)(x_BTD)).astype(jnp.float32)


def loss_of(model: Transformer, batch: Batch) -> jax.Array:
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(
        model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:]
    )
    return jnp.mean(losses_BT * batch["weights"])


# --- training -------------------------------------------------------------------------


@functools.cache  # one for all seeds, so that they compile once
def new_optimizer(config: Config, clip: str) -> optax.GradientTransformation:
    tx = optax.chain(CLIPS[clip](config), optax.adamw(config.rate))
    tx = optaxclip.skip_nonfinite(tx)
    return optaxclip.record_history(tx, config.every, leaf_norms=True)


def new_model(config: Config, run: Run) -> tuple[Transformer, nnx.Optimizer]:
    model = Transformer(config, run.dtype, nnx.Rngs(run.seed))
    return model, nnx.Optimizer(model, new_optimizer(config, run.clip), wrt=nnx.Param)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: Transformer, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads, loss=loss)
    return loss


def train(config: Config, run: Run, path: Path, devices: Any) -> None:
    """Leaves a log and checkpoints; goes on from the last one there is."""
    mesh = mesh_of(devices)
    with (
        jax.set_mesh(mesh),
        ocp.CheckpointManager(checkpoints_of(path)) as checkpoints,
    ):
        # Under jit no device ever holds the whole of it.
        model, optimizer = nnx.jit(lambda: new_model(config, run))()
        state = nnx.state((model, optimizer))
        log = ClipLog(
            path,
            params=nnx.state(model, nnx.Param),
            transform=run.clip,
            hyperparameters=dataclasses.asdict(config)
            | run._asdict()
            | {"devices": len(devices), "bytes": bytes_on_a_device(state)},
        )
        first = checkpoints.latest_step() or 0
        if first:
            nnx.update((model, optimizer), restore(checkpoints, state))
            log.update(optimizer)  # takes back what the log has of later steps
            if jax.process_index() == 0:
                print(f"{path.stem} goes on from step {first}", flush=True)
        bar = tqdm(
            killed(config, broken(config, batches(config, run.seed, first))),
            desc=f"{path.stem}, {len(devices)} devices",
            initial=first,
            total=config.steps,
            disable=jax.process_index() > 0,
        )
        for step, batch in bar:
            train_step(model, optimizer, spread(batch, mesh))
            done = step + 1
            if done % config.every == 0 or done == config.steps:
                log.update(optimizer)
            if done % config.save == 0 or done == config.steps:
                state = nnx.state((model, optimizer))
                checkpoints.save(done, args=ocp.args.StandardSave(state))
                checkpoints.wait_until_finished()


def restore(checkpoints: ocp.CheckpointManager, like: Any) -> Any:
    """The last checkpoint, on the devices and in the layout of another state."""
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    step = checkpoints.latest_step()
    return checkpoints.restore(step, args=ocp.args.StandardRestore(shapes))


def mesh_of(devices: Any) -> jax.sharding.Mesh:
    kind = (AxisType.Explicit,)
    return jax.make_mesh((len(devices),), ("data",), kind, devices=devices)


def one_device() -> Any:
    return jax.local_devices()[:1]


def bytes_on_a_device(state: Any) -> int:
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(state)]
    return sum(shard.nbytes for shard in shards)


# --- several processes ----------------------------------------------------------------


def is_last_of_several(config: Config) -> bool:
    return 1 < config.processes == config.process_id + 1


def train_in_processes(config: Config) -> None:
    """Starts the processes, and starts them again after one was killed."""
    if succeed(start_processes(config, config.kill)):
        raise SystemExit(f"No process reached step {config.kill}, to be killed there.")
    print("A process was killed; all of them start again.", file=sys.stderr)
    if not succeed(start_processes(config, kill=-1)):
        raise SystemExit("A process failed; what it said stands above.")


def start_processes(config: Config, kill: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *sys.argv[1:], f"--kill={kill}"]
    command.append(f"--coordinator={coordinator}")
    return [
        subprocess.Popen([*command, f"--process-id={index}"])
        for index in range(config.processes)
    ]


def succeed(processes: list[subprocess.Popen]) -> bool:
    """Waits for all; once one has failed, the others cannot go on and are ended."""
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                return False
            time.sleep(0.1)
        return not any(process.returncode for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


# --- output ---------------------------------------------------------------------------


class Comparison(NamedTuple):
    run: Run
    sharded: Any  # the log
    alone: Any
    norms: np.ndarray  # of each step: the largest relative difference of a leaf's norm
    params: float  # in the end: the norm of the difference, relative to the norm


def compare(config: Config, run: Run, sharded: Path, alone: Path) -> Comparison:
    logs = read(sharded), read(alone)
    a, b = (np.asarray(log.leaf_norms, np.float64) for log in logs)
    both_nan = np.isnan(a) & np.isnan(b)
    norms = np.max(np.where(both_nan, 0, np.abs(a - b) / b), axis=1)
    a, b = (last_params(config, run, path) for path in (sharded, alone))
    difference = np.linalg.norm(a - b) / np.linalg.norm(b)
    return Comparison(run, *logs, norms, float(difference))


def abstract_model(config: Config, run: Run, mesh: jax.sharding.Mesh) -> Any:
    """Shapes of the model and of the optimizer, and their layout on the mesh."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        layout = NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.tree.map(place, nnx.eval_shape(lambda: new_model(config, run)))


def layer_norms(log: Any) -> dict[str, np.ndarray]:
    """Of each step, from the norms of the parameters: layers as `layer` clips them."""
    layers = ["/".join(name.split("/")[:2]) for name in log.leaf_names]
    squares = np.asarray(log.leaf_norms, np.float64) ** 2
    return {
        layer: np.sqrt(squares[:, [name == layer for name in layers]].sum(1))
        for layer in dict.fromkeys(layers)
    }


def layer_differences(c: Comparison) -> dict[str, np.ndarray]:
    """Of each step, relative to one device."""
    alone = layer_norms(c.alone)
    differences = {
        layer: np.abs(norms - alone[layer]) / alone[layer]
        for layer, norms in layer_norms(c.sharded).items()
    }
    return {layer: np.where(x > 0, x, np.nan) for layer, x in differences.items()}


def layer_table(config: Config, c: Comparison) -> str:
    name = f"{c.run.dtype}, {label(config, c.run.clip)}"
    lines = [f"{name:<24}median norm  at step {config.spike:<4} difference"]
    differences = layer_differences(c)
    for layer, norms in layer_norms(c.sharded).items():
        worst = np.nanmax(differences[layer], initial=0.0)
        lines.append(
            f"{layer:<24}{np.nanmedian(norms):>11.3f}{norms[config.spike]:>13.2f}"
            f"{worst:>12.1e}"
        )
    return "\n".join(lines)


def last_params(config: Config, run: Run, path: Path) -> np.ndarray:
    """Those of the last checkpoint, of however many devices, on one."""
    like = nnx.state(abstract_model(config, run, mesh_of(one_device())))
    with ocp.CheckpointManager(checkpoints_of(path)) as checkpoints:
        state = restore(checkpoints, like)
    leaves = jax.tree.leaves(nnx.filter_state(state[0], nnx.Param))
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])


HEADER = """\
                              state on   final                  largest difference
dtype     clip       seed devs a device    loss clipped skipped of a norm of weights"""


def line(config: Config, c: Comparison) -> str:
    facts = c.sharded.metadata["hyperparameters"]
    share = facts["bytes"] / c.alone.metadata["hyperparameters"]["bytes"]
    clip, loss = label(config, c.run.clip), np.nanmean(c.sharded.loss[-5:])
    return (
        f"{c.run.dtype:<10}{clip:<11}{c.run.seed:>4}{facts['devices']:>5}{share:>9.1%}"
        f"{loss:>8.4f}{c.sharded.clipped.sum():>8}{c.sharded.skipped.sum():>8}"
        f"{c.norms.max():>10.1e}{c.params:>11.1e}"
    )


def picture(config: Config, compared: list[Comparison], path: Path) -> None:
    clips = config.clip.split(",")
    columns = len(clips) + ("layer" in clips)
    figure = Figure(figsize=(5 * columns, 6.5), layout="constrained")
    axes = figure.subplots(2, columns, sharex=True, squeeze=False)
    first_seed = [c for c in compared if c.run.seed == 0]
    for (top, bottom), clip in zip(axes.T, clips, strict=False):
        of_clip = [c for c in first_seed if c.run.clip == clip]
        draw_norms(config, top, of_clip[0])
        draw_differences(bottom, of_clip)
    if "layer" in clips:
        of_clip = [c for c in first_seed if c.run.clip == "layer"]
        top, bottom = axes[:, -1]
        draw_layers(config, top, bottom, of_clip[0])
    n = compared[0].sharded.metadata["hyperparameters"]["devices"]
    figure.suptitle(
        f"A clip on {n} devices that share a model does what it does on one"
    )
    figure.savefig(path, dpi=90)


def draw_norms(config: Config, axes: Any, c: Comparison) -> None:
    steps = c.sharded.step
    n = c.sharded.metadata["hyperparameters"]["devices"]
    axes.plot(
        steps, c.sharded.norm, color=ORANGE, lw=5, alpha=0.5, label=f"{n} devices"
    )
    axes.plot(steps, c.alone.norm, color="black", lw=1, label="one device")
    limited = np.where(np.isfinite(c.alone.threshold), c.alone.threshold, np.nan)
    axes.plot(steps, limited, color=BLUE, lw=1.5, ls="--", label="threshold")
    axes.set(yscale="log", title=f"{label(config, c.run.clip)}, {c.run.dtype}")
    axes.set(ylabel="norm that is clipped")
    marks = [(config.nan, "NaN, skipped")]
    if config.processes > 1:
        marks.append((config.kill, "killed"))
    for step, text in marks:
        axes.axvline(step, color=GREEN, lw=1.5, ls=":")
        place = {"xy": (step, 0.98), "xycoords": ("data", "axes fraction")}
        axes.annotate(f" {text}", **place, color=GREEN, va="top")
    axes.legend(fontsize="small")


def draw_layers(config: Config, top: Any, bottom: Any, c: Comparison) -> None:
    """A color and a mark for each layer: its norms, and how far one device differs."""
    differences, marks = layer_differences(c), "osv^DX*P"
    for i, (layer, norms) in enumerate(layer_norms(c.sharded).items()):
        style = {"color": LAYERS[i % len(LAYERS)], "marker": marks[i % len(marks)]}
        style |= {"lw": 1.2, "ms": 4, "markevery": (i, 6)}
        top.plot(c.sharded.step, norms, label=layer, **style)
        bottom.plot(c.sharded.step, differences[layer], **style)
    top.axhline(config.max_layer_norm, color="black", lw=1.5, ls="--")
    top.set(yscale="log", ylabel="norm", title=f"Each layer, {c.run.dtype}")
    top.legend(fontsize="small")
    bottom.axhline(jnp.finfo(c.run.dtype).eps, color="black", lw=1, ls=":")
    bottom.set(yscale="log", xlabel="step", ylabel="relative difference")
    bottom.set_title("Difference of each layer from one device")


def draw_differences(axes: Any, compared: list[Comparison]) -> None:
    for c, color in zip(compared, (ORANGE, BLUE), strict=False):
        differences = np.where(c.norms > 0, c.norms, np.nan)
        axes.plot(c.sharded.step, differences, ".-", color=color, label=c.run.dtype)
        axes.axhline(jnp.finfo(c.run.dtype).eps, color=color, lw=1, ls=":")
    axes.set(yscale="log", xlabel="step", ylabel="relative difference")
    axes.set_title("Largest difference (dotted: one rounding)")
    axes.legend(fontsize="small")


def log_of(config: Config, run: Run, where: str) -> Path:
    return Path(config.out, f"{run.dtype}-{run.clip}-seed{run.seed}-{where}.jsonl")


def checkpoints_of(log: Path) -> Path:
    return log.with_suffix(".orbax").absolute()


def train_all(config: Config, where: str, devices: Any) -> None:
    if config.batch % len(devices) or config.width % len(devices):
        raise SystemExit(
            f"--batch and --width must be multiples of {len(devices)} (devices)"
        )
    for run in runs(config):
        train(config, run, log_of(config, run, where), devices)


def main() -> None:
    config = read_config()
    if unknown := set(config.clip.split(",")) - set(CLIPS):
        raise SystemExit(f"--clip: {sorted(unknown)} are not among {list(CLIPS)}")
    if not 0 <= config.spike < config.steps:
        raise SystemExit(f"--spike must be between 0 and {config.steps - 1}")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", config.cpu_devices // config.processes)
    if config.coordinator:
        jax.distributed.initialize(
            config.coordinator, config.processes, config.process_id
        )
        return train_all(config, "sharded", jax.devices())

    Path(config.out).mkdir(parents=True, exist_ok=True)
    for run, where in itertools.product(runs(config), ("sharded", "alone")):
        # Of an earlier call, which this one would continue.
        log_of(config, run, where).unlink(missing_ok=True)
        shutil.rmtree(checkpoints_of(log_of(config, run, where)), ignore_errors=True)
    if config.processes > 1:
        train_in_processes(config)
    else:
        train_all(config, "sharded", jax.devices())
    train_all(config, "alone", one_device())
    compared = []
    for run in runs(config):
        path = log_of(config, run, "sharded")
        compared.append(compare(config, run, path, log_of(config, run, "alone")))
        report(read(path), path.with_suffix(".html"), title=f"fsdp, {path.stem}")
    picture(config, compared, Path(config.out, "fsdp.png"))
    print(HEADER, *(line(config, c) for c in compared), sep="\n")
    layered = [c for c in compared if c.run.clip == "layer" and c.run.seed == 0]
    for c in layered:
        print("", layer_table(config, c), sep="\n")
    print(
        f"In {config.out}/ are fsdp.png and, of each run, checkpoints, log and report."
    )


if __name__ == "__main__":
    main()
