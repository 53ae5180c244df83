"""Why does a clip move other bytes on a TPU than Optax's, which reads as much?

From the norm to the update, a TPU keeps what it can of the gradients in its vector
memory. The compiler's schedule of the whole program decides how much that is. This
script compiles clips written by hand, which differ from the first one by a single part.
Such a part reads only scalars, or uses the same read of the gradients. The script also
compiles `clip_by_global_norm` with one sum of squares in place of three.

    .venv-tpu/bin/python benchmarks/tpu_schedule.py

It needs the environment of `tpu_compile.py`, which says how to make it.
"""

import functools
import importlib.metadata
import operator
from typing import Any, NamedTuple
from unittest import mock

# Before JAX: on import it sees to it that no TPU is looked for.
from tpu_compile import topologies

# isort: split

import _measure
import jax
import jax.numpy as jnp
import optax
from _deviceless import measure
from _optimizers import Entry

import optaxclip
from optaxclip._norms import roots


class Parts(NamedTuple):
    """What a clip has on top of a norm, its scale and both in the state."""

    divides: bool = False  # each element by the norm, as Optax does
    counts: bool = False  # the steps
    bounds: bool = False  # the threshold, a constant, in the state, too
    in_pairs: bool = False  # adds up the sums of the leaves
    in_three_units: bool = False  # takes each sum, in the same read


VARIANTS = {
    "the norm and its scale in the state": Parts(),
    "and a counter of steps": Parts(counts=True),
    "and the threshold, a constant": Parts(bounds=True),
    "and sums added up in pairs": Parts(in_pairs=True),
    "and sums in three units": Parts(in_three_units=True),
    "all of these": Parts(False, True, True, True, True),
    "Optax's formula, the norm in the state": Parts(divides=True),
}


def clip(parts: Parts) -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        return jnp.zeros(()), jnp.ones(()), jnp.zeros((), jnp.int32), jnp.ones(())

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        norm = norm_of(jax.tree.leaves(updates), parts)
        scale = jnp.minimum(1, 1 / norm)

        def scaled(x: jax.Array) -> jax.Array:
            wide = x.astype(jnp.float32)
            smaller = wide / norm if parts.divides else wide * scale
            return jnp.where(scale >= 1, x, smaller.astype(x.dtype))

        count = state[2] + 1 if parts.counts else state[2]
        bound = jnp.ones(()) if parts.bounds else state[3]
        return jax.tree.map(scaled, updates), (norm, scale, count, bound)

    return optax.GradientTransformation(init, update)


def norm_of(leaves: list[jax.Array], parts: Parts) -> jax.Array:
    def total(unit: float) -> jax.Array:
        sums = [jnp.sum(jnp.square(unit * x.astype(jnp.float32))) for x in leaves]
        while parts.in_pairs and len(sums) > 1:
            pairs = zip(sums[::2], sums[1::2], strict=False)
            sums = [a + b for a, b in pairs] + sums[len(sums) // 2 * 2 :]
        return functools.reduce(operator.add, sums)

    if not parts.in_three_units:
        return jnp.sqrt(total(1))
    large = 2.0**80
    plain, enlarged, reduced = total(1), total(large), total(1 / large)
    low, high = plain < large**-0.5, jnp.isinf(plain)
    chosen = jnp.where(high, reduced, jnp.where(low, enlarged, plain))
    return jnp.sqrt(chosen) * jnp.where(high, large, jnp.where(low, 1 / large, 1))


def with_one_sum(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The clip, whose norm is the root of one sum of plain squares."""

    def plain(leaves: Any, sums: Any, count: int) -> Any:
        return [jnp.sqrt(total) for total in sums(leaves, [None], jnp.float32)[0]]

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        jax.clear_caches()  # of the norm as it is
        with mock.patch.object(roots, "_in_three_units", plain):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


def main() -> None:
    options = _measure.arguments(
        __doc__,
        parameters=(100_000_000, 2_000_000, "how many parameters"),
        topologies=("v5e:1x1,v5e:2x2", "v5e:1x1", "topologies to compile for"),
        dtypes=("float32,bfloat16", "float32", "of parameters and gradients"),
    )
    ours = optaxclip.clip_by_global_norm(1.0)
    clips = {
        "optax.clip_by_global_norm": optax.clip_by_global_norm(1.0),
        "clip_by_global_norm": ours,
        "the same with one sum of plain squares": with_one_sum(ours),
    }
    clips |= {name: clip(parts) for name, parts in VARIANTS.items()}
    entries = {"adamw": Entry(lambda: optax.adamw(1e-3))}
    for name, tx in clips.items():
        make = functools.partial(optax.chain, tx, optax.adamw(1e-3))
        entries[name] = Entry(make, None)
    tables = []
    for name in options.topologies.split(","):
        topology = topologies.get_topology_desc(topology_name=name, platform="tpu")
        for dtype in options.dtypes.split(","):
            table = measure(topology.devices, dtype, options, entries=entries)
            tables.append(table)
    libtpu = importlib.metadata.version("libtpu")
    _measure.save(__doc__, options, tables, device="tpu", libtpu=libtpu)


if __name__ == "__main__":
    main()
