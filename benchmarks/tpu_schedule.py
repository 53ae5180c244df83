"""Which parts of a clip make a TPU move more bytes?

From the norm to the update, a TPU keeps what it can of the gradients in its vector
memory. The compiler's schedule of the whole program decides how much that is. This
script compiles clips written by hand, which differ from the first one by a single part.
Such a part reads only scalars, or uses the same read of the gradients. The package
avoids two that cost bytes: it adds sums in turn, and to XLA a single threshold in its
state is no constant. The script also compiles `clip_by_global_norm` with one sum of
squares in place of three.

    .venv-tpu/bin/python benchmarks/tpu_schedule.py

It needs the environment of `tpu_compile.py`, which says how to make it.
"""

import functools
from typing import Any, NamedTuple
from unittest import mock

# Before JAX: on import it sees to it that no TPU is looked for.
import tpu_compile

# isort: split

import _measure
import jax
import jax.numpy as jnp
import optax
from _optimizers import Entry

import optaxclip
from optaxclip._norms import euclidean, roots


class Parts(NamedTuple):
    """What a clip has, besides a norm and a scale that it keeps in its state."""

    divides: bool = False  # divides each element by the norm, as Optax does
    counts: bool = False  # counts the steps
    bounds: bool = False  # keeps the threshold, a constant, in its state, too
    in_pairs: bool = False  # adds up the sums of leaves, and not in turn
    in_three_units: bool = False  # takes each sum three times, in one read


VARIANTS = {
    "the norm and its scale in the state": Parts(),
    "and a counter of steps": Parts(counts=True),
    "and the threshold, a constant": Parts(bounds=True),
    "and sums added up in pairs": Parts(in_pairs=True),
    "and sums in three units": Parts(in_three_units=True),
    "all of these": Parts(counts=True, bounds=True, in_pairs=True, in_three_units=True),
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
    add_up = euclidean._in_pairs if parts.in_pairs else euclidean._in_turn

    def total(unit: float) -> jax.Array:
        return add_up(
            [jnp.sum(jnp.square(unit * x.astype(jnp.float32))) for x in leaves]
        )

    if not parts.in_three_units:
        return jnp.sqrt(total(1))
    large = 2.0**80
    plain, enlarged, reduced = total(1), total(large), total(1 / large)
    low, high = plain < large**-0.5, jnp.isinf(plain)
    chosen = jnp.where(high, reduced, jnp.where(low, enlarged, plain))
    return jnp.sqrt(chosen) * jnp.where(high, large, jnp.where(low, 1 / large, 1))


def with_one_sum(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The clip, whose norm is the root of one sum of plain squares."""

    def plain(leaves: Any, which: Any, take: Any) -> Any:
        return [jnp.sqrt(x) for x in take(which, leaves, [None], jnp.float32)[0]]

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
    tpu_compile.compare(__doc__, options, entries=entries)


if __name__ == "__main__":
    main()
