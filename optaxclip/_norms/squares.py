"""Sums of squares of leaves, as they are and in other units."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._norms.gradients import widen

Axes = tuple[int, ...] | None
Units = Sequence[float | None]  # None for 1


def sums_of_squares(
    leaves: Sequence[jax.Array], axes: Sequence[Axes], units: Units, dtype: Any
) -> list[list[jax.Array]]:
    """For each of the units, and each leaf, the sum of ``(leaf * unit) ** 2``.

    Over the axes of the leaf; over all of it where they are None. The sums of a leaf in
    several units are side by side, so that XLA for GPU and TPU takes them in one read.
    """
    sums: list[list[jax.Array]] = [[] for _ in units]
    for leaf, axis in zip(leaves, axes, strict=True):
        # The barrier keeps XLA from writing arrays that several fusions could share: a
        # widened copy of the leaf, or one full of a unit for leaves of one shape. And
        # it keeps XLA from multiplying by the square of a unit, which overflows.
        leaf, factors = lax.optimization_barrier((leaf, [unit or 1 for unit in units]))
        wide = widen(leaf, dtype)
        parts = [wide.real, wide.imag] if jnp.iscomplexobj(wide) else [wide]
        for unit, factor, found in zip(units, factors, sums, strict=True):
            scaled = parts if unit is None else [part * factor for part in parts]
            square = functools.reduce(operator.add, map(lax.square, scaled))
            found.append(jnp.sum(square, axis=axis, keepdims=axis is not None))
    return sums
