"""Sums of squares that hold every norm from the smallest to the largest number.

Squares of float32 overflow above 1.8e19 and vanish below 1e-19. So a sum of squares is
three numbers: the sum of the squares as they are, of the squares of the numbers times
2^80, and of the squares times 2^-80. At least one of them is sound. XLA for GPU and TPU
takes the three in one read of the gradients, whose time is that of memory. XLA for CPU
would read three times. There, one sum in float64, which no square of a float32 leaves,
is turned into the same three numbers.

There is no branch: nothing has to wait for a norm, and nothing ties a leaf to another.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._norms.gradients import accumulator, widen

Axes = tuple[int, ...] | None
Sums = tuple[jax.Array, ...]  # the sum in each unit, or, if no square overflows, one


def sums_of_squares(leaves: Sequence[jax.Array], axes: Sequence[Axes]) -> list[Sums]:
    """For each leaf the sums of its squares over its axes (None: over all of it)."""
    dtype = accumulator(*(leaf.dtype for leaf in leaves))
    units = (1.0,) if all(_fits(x.dtype, dtype) for x in leaves) else _units(dtype)
    # The barrier keeps XLA from writing a widened copy that several fusions could share.
    leaves = [lax.optimization_barrier(leaf) for leaf in leaves]
    one_read = functools.partial(_in_each_unit, axes=axes, units=units, dtype=dtype)
    if len(units) == 1 or dtype == jnp.float64:
        return one_read(leaves)
    in_float64 = functools.partial(_in_float64, axes=axes, units=units)
    return lax.platform_dependent(leaves, cpu=in_float64, default=one_read)


def root(sums: Sums) -> jax.Array:
    """The square root of a sum of squares, from the unit in which it is sound."""
    if len(sums) == 1:
        return jnp.sqrt(sums[0])
    plain, enlarged, reduced = sums
    _, large, small = _units(plain.dtype)
    # Above this, squares that underflowed are too small to be seen in the sum. Below
    # it, the enlarged ones do not overflow.
    low, high = plain < small**0.5, jnp.isinf(plain)
    total = jnp.where(high, reduced, jnp.where(low, enlarged, plain))
    return jnp.sqrt(total) * jnp.where(high, large, jnp.where(low, small, 1))


def _in_each_unit(
    leaves: Sequence[jax.Array],
    axes: Sequence[Axes],
    units: Sequence[float],
    dtype: Any,
) -> list[Sums]:
    wide = [_parts(widen(leaf, dtype)) for leaf in leaves]
    rows = list(zip(wide, axes, strict=True))
    return [
        tuple(_sum([part * unit for part in parts], axis) for unit in units)
        for parts, axis in rows
    ]


def _in_float64(
    leaves: Sequence[jax.Array], axes: Sequence[Axes], units: Sequence[float]
) -> list[Sums]:
    with jax.enable_x64(True):
        sums = [
            _sum([part.astype(jnp.float64) for part in _parts(leaf)], axis)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        return [
            tuple((total * unit**2).astype(jnp.float32) for unit in units)
            for total in sums
        ]


def _parts(leaf: jax.Array) -> list[jax.Array]:
    return [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]


def _sum(parts: Sequence[jax.Array], axis: Axes) -> jax.Array:
    square = functools.reduce(operator.add, map(lax.square, parts))
    return jnp.sum(square, axis=axis, keepdims=axis is not None)


def _units(dtype: Any) -> tuple[float, float, float]:
    """Powers of two: 1, and those that bring small and large numbers to the middle."""
    large = 2.0 ** (5 * jnp.finfo(dtype).maxexp // 8)
    return 1.0, large, 1 / large


def _fits(dtype: Any, wide: Any) -> bool:
    """Whether sums of squares of a dtype can neither overflow nor vanish in another."""
    return 2 * jnp.finfo(dtype).maxexp + 40 < jnp.finfo(wide).maxexp
