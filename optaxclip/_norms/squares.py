"""Sums of squares that hold every norm from the smallest to the largest number.

Squares of float32 overflow above 1.8e19 and vanish below 1e-19. XLA for CPU sums them
in float64, whose range has room for them. GPUs are slow in float64 and TPUs do not have
it, but both take several sums in one read, whose time is that of memory. There, a sum
of squares is three numbers: of the squares as they are, of the squares of the numbers
times 2^80, and of the squares times 2^-80. One of them is sound.

There is no branch: nothing waits for a norm, and nothing ties one leaf to another.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._norms.gradients import accumulator, widen

Axes = tuple[int, ...] | None
Sums = tuple[jax.Array, ...]  # the same sum in one unit or three


def with_room(take: Callable[..., Any], leaves: Sequence[jax.Array]) -> Any:
    """``take(leaves, dtype)``, in a dtype in which this platform can sum squares.

    Whatever comes back must be in the dtypes of :func:`accumulator`.
    """
    dtype = accumulator(*(leaf.dtype for leaf in leaves))
    if dtype == jnp.float64 or all(_fits(leaf.dtype, dtype) for leaf in leaves):
        return take(leaves, dtype)

    def in_float64(leaves: Sequence[jax.Array]) -> Any:
        with jax.enable_x64(True):
            # The barriers make one kernel of a root and its rounding, not one a use.
            return jax.tree.map(lax.optimization_barrier, take(leaves, jnp.float64))

    in_float32 = functools.partial(take, dtype=dtype)
    return lax.platform_dependent(leaves, cpu=in_float64, default=in_float32)


def sums_of_squares(
    leaves: Sequence[jax.Array], axes: Sequence[Axes], dtype: Any
) -> list[Sums]:
    """For each leaf the sums of its squares over its axes (None: over all of it)."""
    units = (1.0,) if all(_fits(x.dtype, dtype) for x in leaves) else _units(dtype)
    sums: list[Sums] = []
    for leaf, axis in zip(leaves, axes, strict=True):
        # The barrier keeps XLA from writing a widened copy that fusions could share,
        # and from multiplying by the square of a unit, which overflows, afterwards.
        leaf, others = lax.optimization_barrier((leaf, units[1:]))
        wide = widen(leaf, dtype)
        parts = [wide.real, wide.imag] if jnp.iscomplexobj(wide) else [wide]
        in_units = [parts, *([part * unit for part in parts] for unit in others)]
        sums.append(tuple(_sum(parts, axis) for parts in in_units))
    return sums


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
