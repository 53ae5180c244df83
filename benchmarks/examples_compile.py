"""The training steps of the examples, compiled for a TPU or a GPU that is not there.

Compiled, not timed: that an example compiles for a device is nearly all that is needed
for it to run there, and the program tells what a step moves, holds and communicates.
Needs one of the environments that `tpu_compile.py` and `gpu_compile.py` describe, with
what the examples need; compiles for the device whose compiler it finds there:

    .venv-tpu/bin/pip install ".[examples]"
    .venv-tpu/bin/python benchmarks/examples_compile.py
    .venv-gpu/bin/pip install ".[examples]"
    .venv-gpu/bin/python benchmarks/examples_compile.py --only train,fsdp --devices 4

All sizes are an example's defaults. Bytes are those of one device, and of the body of a
loop once: `temporal_order` and `ppo` are loops, whose steps one call takes by hundreds.
"""

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

# Before JAX: on import these see to it that no TPU or GPU is looked for.
if importlib.util.find_spec("libtpu"):
    import tpu_compile as target
elif importlib.util.find_spec("jax_cuda13_plugin"):
    import gpu_compile as target
else:
    raise SystemExit("Neither libtpu nor jax_cuda13_plugin is installed.")

import _measure
import jax
import numpy as np
from _hlo import figures
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

COLUMNS = {
    "name": "",
    "state": "arguments, MB",
    "moved": "HBM, MB",
    "temp": "temporary, MB",
    "fusions": "fusions",
    "all_reduces": "all-reduces",
    "others": "other collectives",
}


# --- the step of each example, lowered for the shapes of its arguments ----------------


def train(chips: Any) -> Any:
    import train as example

    config, mesh = example.Config(), Mesh(chips, ("batch",))
    model = nnx.eval_shape(lambda: example.new_model(config, seed=0))
    tokens = split(mesh, (config.batch, config.context + 1), np.uint8)
    return example.train_step.lower(*whole(mesh, model), tokens)


def train_linen(chips: Any) -> Any:
    import train_linen as example

    config, mesh = example.Config(), Mesh(chips, ("batch",))
    state = jax.eval_shape(lambda: example.new_state(config, seed=0))
    tokens = split(mesh, (config.batch, config.context + 1), np.uint8)
    return example.train_step.lower(whole(mesh, state), tokens)


def char_lm(chips: Any) -> Any:
    import char_lm as example

    config, mesh = example.Config(), Mesh(chips, ("batch",))
    tx = optaxclip.record_history(example.CLIPS["skip"](config), config.every)

    def new_model() -> Any:
        model = example.Transformer(config, nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model = nnx.eval_shape(new_model)
    tokens = split(mesh, (config.batch, config.context + 1), np.uint8)
    weights = split(mesh, (config.batch, config.context), np.float32)
    return example.train_step.lower(*whole(mesh, model), tokens, weights)


def temporal_order(chips: Any) -> Any:
    import temporal_order as example

    config, mesh = example.Config(), Mesh(chips, ("seed",))
    tx = example.CLIPS["skip"](config)
    states = jax.eval_shape(lambda: example.new_states(config, tx))
    states = jax.tree.map(lambda x: split(mesh, x.shape, x.dtype), states)
    return example.stretch_of(config, tx, length=20).lower(*states, 0)


def digits_cnn(chips: Any) -> Any:
    import digits_cnn as example

    config, n = example.Config(), len(chips)
    tx = example.CLIPS["skip"](config)
    step = example.train_step_of(config, tx).__wrapped__
    _, params = nnx.eval_shape(lambda: example.new_model(config, seed=0))
    state = params, jax.eval_shape(tx.init, params)
    images = np.zeros((config.batch // n, 8, 8, 1), np.float32)
    labels = np.zeros(config.batch // n, np.int32)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), (state, images, labels)
    )
    on_chips = jax.pmap(step, "devices", donate_argnums=0, devices=list(chips))
    return on_chips.lower(*arguments)


def ppo(chips: Any) -> Any:
    import ppo as example

    config, mesh = example.Config(), Mesh(chips, ("seed",))
    tx = example.CLIPS["percentile"](config)
    train = jax.jit(jax.vmap(lambda key: example.run(config, tx, key)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.seeds))
    return train.lower(split(mesh, keys.shape, keys.dtype))


def diffusion(chips: Any) -> Any:
    import diffusion as example

    config, mesh = example.Config(), Mesh(chips, ("batch",))
    tx = example.CLIPS["skip"](config)
    network = nnx.eval_shape(
        lambda: example.Denoiser(width=config.width, rngs=nnx.Rngs(0))
    )
    graph, params = nnx.split(network)
    state = params, params, jax.eval_shape(tx.init, params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state, key = whole(mesh, (state, key))
    images = split(mesh, (config.batch, 64), np.float32)
    return example.train_step.lower(graph, tx, config.ema_rate, state, images, key)


def lora(chips: Any) -> Any:
    import lora as example

    config, mesh = example.Config(), Mesh(chips, ("batch",))
    base = example.new_base
    model = nnx.eval_shape(
        lambda: example.new_model(config, base(config), "percentile", 0)
    )
    tokens = split(mesh, (config.batch, config.context + 1), np.uint8)
    weights = split(mesh, (config.batch, config.context), np.float32)
    return example.tune_step.lower(*whole(mesh, model), tokens, weights)


def fsdp(chips: Any) -> Any:
    import fsdp as example

    config = example.Config()
    mesh = Mesh(chips, ("data",), axis_types=(AxisType.Explicit,))
    tokens = split(mesh, (config.batch, config.context + 1), np.int32)
    weights = split(mesh, (config.batch, config.context), np.float32)
    batch = {"tokens": tokens, "weights": weights}
    model = example.abstract_model(config, example.Run("bfloat16", "leaf", 0), mesh)
    with jax.set_mesh(mesh):
        return example.train_step.lower(*model, batch)


EXAMPLES = {
    make.__name__: make
    for make in (
        train,
        train_linen,
        char_lm,
        temporal_order,
        digits_cnn,
        ppo,
        diffusion,
        lora,
        fsdp,
    )
}


def whole(mesh: Mesh, tree: Any) -> Any:
    """On every device."""
    replicated = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), tree
    )


def split(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shared out along the first axis."""
    sharding = NamedSharding(mesh, P(*mesh.axis_names))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


# --- the tables -----------------------------------------------------------------------


def topology(count: int) -> Any:
    if target.__name__ == "tpu_compile":
        name = {1: "v5e:1x1", 4: "v5e:2x2"}[count]
        found = topologies.get_topology_desc(topology_name=name, platform="tpu")
    else:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target.H100, topology=f"1x1x{count}"
        )
    return np.array(found.devices)


def row(name: str, chips: Any) -> dict[str, Any]:
    print(f"{len(chips)} x {chips[0].device_kind}, {name}", file=sys.stderr)
    program = EXAMPLES[name](chips).compile()
    counts = figures(program)
    others = dict(counts["collectives"])
    memory = program.memory_analysis()
    return {
        **counts,
        **(target.launches(program) if hasattr(target, "launches") else {}),
        "name": name,
        "state": memory.argument_size_in_bytes / 1e6,
        "moved": counts["bytes_moved"] / 1e6,
        "temp": counts["temp_bytes"] / 1e6,
        "all_reduces": others.pop("all-reduce", {"count": 0})["count"],
        "others": sum(entry["count"] for entry in others.values()),
    }


def main() -> None:
    tpu = target.__name__ == "tpu_compile"
    options = _measure.arguments(
        __doc__,
        devices=("1,4" if tpu else "1", "1", "numbers of devices to compile for"),
        only=(",".join(EXAMPLES), "fsdp", "examples to compile"),
    )
    columns = {**COLUMNS, **getattr(target, "COLUMNS", {})}
    tables = []
    for count in map(int, options.devices.split(",")):
        chips = topology(count)
        title = f"{count} x {chips[0].device_kind}: compiled, not timed"
        rows = [row(name, chips) for name in options.only.split(",")]
        tables.append((title, rows, columns))
    compiler = "libtpu" if tpu else "jax-cuda13-plugin"
    also = {compiler.replace("-", "_"): importlib.metadata.version(compiler)}
    also["flax"] = importlib.metadata.version("flax")
    if hasattr(target, "DUMP"):
        shutil.rmtree(target.DUMP)
    _measure.save(__doc__, options, tables, device="tpu" if tpu else "gpu", **also)


if __name__ == "__main__":
    main()
