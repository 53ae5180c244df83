"""Clips on several devices: collectives, memory and time.

Gradients as data-parallel training has them under each way to say it:

- jit: an automatic mesh, parameters and gradients sharded along their longest axis;
- shard_map: the same shards by hand, with JAX's default checks;
- pmap: whole gradients on every device, after `pmean`.

Each program is one clip and `optax.trace`, its state donated, on 1, 2, 4 and 8 devices:
real ones, or virtual ones of a CPU, whose times say little, since they share its cores;
collectives and memory are those of the program of one device all the same.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --devices 4,8 --parameters 100000000
"""

import functools
from collections.abc import Callable
from typing import Any

import _measure
import _trees
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _hlo import figures
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optaxclip

# name -> axis_name -> clip
CLIPS: dict[str, Callable[[Any], Any]] = {
    "optax.clip_by_global_norm": lambda _: optax.clip_by_global_norm(1.0),
    "clip_by_global_norm": lambda axis: optaxclip.clip_by_global_norm(
        1.0, axis_name=axis
    ),
    "clip_by_percentile": lambda axis: optaxclip.clip_by_percentile(
        95, 100, axis_name=axis
    ),
    "optax.clip_by_block_rms": lambda _: optax.clip_by_block_rms(1.0),
    "clip_by_leaf_norm": lambda axis: optaxclip.clip_by_leaf_norm(1.0, axis_name=axis),
}
# Under shard_map optax clips every share by its own norm, which is another function.
ONLY_WHOLE = "optax.clip_by_global_norm", "optax.clip_by_block_rms"
COLUMNS = {
    "devices": "devices",
    "way": "",
    "name": "",
    "collectives": "collectives",
    "collective_bytes": "their bytes",
    "temp": "temporary ÷ gradient bytes",
    "milliseconds": "time, ms",
    "ratio": "time ÷ optax.clip_by_global_norm",
}


def spec(x: Any, devices: int) -> PartitionSpec:
    """The longest axis over all devices; scalars, windows and odd lengths whole."""
    if len(x.shape) < 2 or max(x.shape) % devices:
        return PartitionSpec()
    axis = int(np.argmax(x.shape))
    return PartitionSpec(*[None] * axis, "devices")


def placed(tree: Any, mesh: Mesh) -> Any:
    def put(x: jax.Array) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, spec(x, mesh.size)))

    return jax.tree.map(put, tree)


def by_jit(step: Callable, grads: Any, state: Any, mesh: Mesh) -> Any:
    grads, state = placed(grads, mesh), placed(state, mesh)
    places = jax.tree.map(lambda x: x.sharding, (grads, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=places)
    return jitted.lower(grads, state).compile(), grads, state


def by_shard_map(step: Callable, grads: Any, state: Any, mesh: Mesh) -> Any:
    specs = jax.tree.map(lambda x: spec(x, mesh.size), (grads, state))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs)
    grads, state = placed(grads, mesh), placed(state, mesh)
    return (
        jax.jit(mapped, donate_argnums=(0, 1)).lower(grads, state).compile(),
        grads,
        state,
    )


def by_pmap(step: Callable, grads: Any, state: Any, mesh: Mesh) -> Any:
    def averaged(grads: Any, state: Any) -> Any:
        return step(jax.lax.pmean(grads, "devices"), state)

    devices = list(mesh.devices)
    mapped = jax.pmap(averaged, "devices", devices=devices, donate_argnums=(0, 1))

    def repeat(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (len(devices), *x.shape))

    grads, state = jax.tree.map(repeat, (grads, state))
    compiled = mapped.lower(grads, state).compile()
    return compiled, *mapped(grads, state)


WAYS = {"jit": by_jit, "shard_map": by_shard_map, "pmap": by_pmap}


def call_of(program: Any, grads: Any, state: Any) -> Callable[[], Any]:
    def call() -> Any:
        nonlocal grads, state
        grads, state = program(grads, state)
        return grads

    return call


def measure(devices: int, way: str, options: Any) -> list[dict[str, Any]]:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",))
    shapes = _trees.gpt_like(options.parameters, jnp.float32)
    # The gradients of one device: all of them under pmap, its shards else.
    grad_bytes = _trees.nbytes(shapes) / (1 if way == "pmap" else devices)
    calls, costs = {}, {}
    for name, make in CLIPS.items():
        if way == "shard_map" and name in ONLY_WHOLE:
            continue
        # Under pmap no type says that averaged gradients are whole.
        axis = () if way == "pmap" else None
        tx = optax.chain(make(axis), optax.trace(0.9))
        grads = _trees.fill(shapes)
        step = functools.partial(lambda tx, g, s: tx.update(g, s), tx)
        program, grads, state = WAYS[way](step, grads, tx.init(grads), mesh)
        costs[name] = figures(program)
        calls[name] = call_of(program, grads, state)
    times = _measure.interleave(calls, options.rounds)
    rows = []
    for name, cost in costs.items():
        entries = cost["collectives"].values()
        row = {
            "devices": devices,
            "way": way,
            "name": name,
            **cost,
            "collectives": sum(entry["count"] for entry in entries),
            "collective_bytes": sum(entry["bytes"] for entry in entries),
            "kinds": cost["collectives"],
            "temp": cost["temp_bytes"] / grad_bytes,
            "milliseconds": _measure.spread([1e3 * t for t in times[name]]),
        }
        if (reference := ONLY_WHOLE[0]) in times:
            row["ratio"] = _measure.ratio(times[name], times[reference])
        rows.append(row)
    return rows


def main() -> None:
    options = _measure.arguments(
        __doc__,
        parameters=(10_000_000, 50_000, "how many parameters"),
        devices=("1,2,4,8", "2", "numbers of devices"),
        ways=(",".join(WAYS), "jit,shard_map", "how devices are addressed"),
    )
    counts = [int(count) for count in options.devices.split(",")]
    jax.config.update("jax_num_cpu_devices", max(counts))  # if the CPU is the device
    rows: list[dict[str, Any]] = []
    for count in counts:
        for way in options.ways.split(","):
            rows += measure(count, way, options)
    _measure.save(__doc__, options, [("One clip and momentum, float32", rows, COLUMNS)])


if __name__ == "__main__":
    main()
