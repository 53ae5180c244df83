"""Trees of gradients, and the plain reductions that say how fast they can be read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def gpt_like(parameters: int, dtype: Any) -> PyTree:
    """The shapes of a decoder-only Transformer: few large leaves.

    A layer has 12 width² parameters, and there are width / 64 layers, up to 24, as
    GPT-2 and GPT-3 have it; the vocabulary is 32 times the width.
    """
    width = 64
    while _count(width + 64) <= parameters:
        width += 64

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    layer = {
        "qkv": of(width, 3 * width),
        "out": of(width, width),
        "up": of(width, 4 * width),
        "down": of(4 * width, width),
        "up_bias": of(4 * width),
        "down_bias": of(width),
        "norm_1": of(width),
        "norm_2": of(width),
    }
    layers = [dict(layer) for _ in range(_layers(width))]
    return {"embedding": of(32 * width, width), "norm": of(width), "layers": layers}


def small_leaves(parameters: int, dtype: Any, leaves: int) -> PyTree:
    """As many parameters in many equal leaves."""
    side = max(8, round((parameters / leaves) ** 0.5))
    shape = jax.ShapeDtypeStruct((side, side), dtype)
    return {f"leaf_{i}": shape for i in range(leaves)}


def _layers(width: int) -> int:
    return min(24, max(2, width // 64))


def _count(width: int) -> int:
    return _layers(width) * 12 * width**2 + 32 * width**2


def cast(shapes: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def fill(shapes: PyTree, size: float = 1e-2) -> PyTree:
    """Arrays of these shapes: numbers of both signs, none of them 0."""

    @jax.jit
    def make() -> PyTree:
        def one(x: jax.ShapeDtypeStruct) -> jax.Array:
            axes = [
                jax.lax.broadcasted_iota(jnp.float32, x.shape, a)
                for a in range(len(x.shape))
            ]
            return (size * jnp.cos(sum(axes) + 0.5)).astype(x.dtype)

        return jax.tree.map(one, shapes)

    return make()


def zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def nbytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _each(reduce: Callable[[jax.Array], jax.Array]) -> Callable[[PyTree], jax.Array]:
    def read(tree: PyTree) -> jax.Array:
        # The barrier keeps XLA from making one slow kernel of all reductions.
        scalars = [reduce(x) for x in jax.tree.leaves(tree)]
        return jnp.stack(jax.lax.optimization_barrier(scalars))

    return read


# Each reads every leaf once and leaves a scalar for it; the fastest of them shows the
# bandwidth of reading, as the compiler can reach it.
READS = {
    "sum": _each(jnp.sum),
    "max": _each(jnp.max),
    "sum of squares": _each(
        lambda x: jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
    ),
}
