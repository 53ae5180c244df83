"""Roots of sums of squares that overflow or vanish.

Squares of float32 overflow above 1.8e19 and vanish below 1e-19. Numbers times a power
of two, a unit, have squares that do not.

XLA for GPU and TPU takes several sums in one read, whose time is that of memory. There,
each sum is taken in three units, and the one that is sound is chosen. No device waits
for a norm, and a TPU keeps gradients that it has fetched. XLA for CPU would read three
times. There, the plain sum is taken first. Only if one overflowed or nearly vanished, a
conditional takes the sums again in a unit that fits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._norms.gradients import accumulator
from optaxclip._norms.squares import Units

Arrays = list[jax.Array]
# From leaves, and units for each sum, to the sums in each of these units.
Sums = Callable[[Arrays, Sequence[Units]], list[Arrays]]

# The scope of a compiled program, and of a profile, that a step ordinarily leaves out.
RARE = "sums_in_other_units"


def roots(leaves: Arrays, sums: Sums, counts: Sequence[int]) -> Arrays:
    """The roots of all sums, each from a unit in which it is sound.

    ``counts`` has the number of squares in each sum, over all devices.
    """
    if all(_squares_fit(x.dtype) for x in leaves):
        return [jnp.sqrt(total) for total in sums(leaves, [None])[0]]

    return lax.platform_dependent(
        leaves,
        cpu=functools.partial(_with_branch, sums=sums, counts=counts),
        default=functools.partial(_in_three_units, sums=sums, count=len(counts)),
    )


def _in_three_units(leaves: Arrays, sums: Sums, count: int) -> Arrays:
    info = jnp.finfo(accumulator(*(x.dtype for x in leaves)))
    large = 2.0 ** (5 * info.maxexp // 8)
    units: list[Units] = [None, [large] * count, [1 / large] * count]
    norms = []
    for plain, enlarged, reduced in zip(*sums(leaves, units), strict=True):
        # Above this, squares that vanished are too small to be seen in the sum. Below
        # it, the enlarged ones do not overflow.
        low, high = plain < large**-0.5, jnp.isinf(plain)
        total = jnp.where(high, reduced, jnp.where(low, enlarged, plain))
        unit = jnp.where(high, large, jnp.where(low, 1 / large, 1))
        norms.append(jnp.sqrt(total) * unit)
    return norms


def _with_branch(leaves: Arrays, sums: Sums, counts: Sequence[int]) -> Arrays:
    """A sum of 0 needs no second look as long as another sum is positive."""
    (totals,) = sums(leaves, [None])
    plain = [jnp.sqrt(total) for total in totals]
    info = jnp.finfo(totals[0].dtype)
    large = 2.0 ** (3 * info.maxexp // 4)
    # Squares that underflowed, each below the smallest normal number, can be seen in a
    # sum below this.
    seen = [max(count, 1) * float(info.tiny) / float(info.eps) for count in counts]
    off, zero, some = _any_of(totals, seen)
    zero &= ~some

    def again(totals: Arrays) -> Arrays:
        units = []
        for total, bound in zip(totals, seen, strict=True):
            unit = jnp.where((total > 0) | zero, large, jnp.ones_like(total))
            unit = jnp.where(total < bound, unit, 1)
            units.append(jnp.where(jnp.isinf(total), 1 / large, unit))
        rows = zip(*sums(leaves, [units]), units, strict=True)
        return [jnp.sqrt(total) / unit for total, unit in rows]

    with jax.named_scope(RARE):
        return lax.cond(off | zero, again, lambda _: plain, totals)


def _any_of(totals: Arrays, seen: Sequence[float]) -> jax.Array:
    """Whether any sum is off (overflowed or lost squares), 0, or positive: 3 flags."""
    rows: list[tuple[jax.Array, Any]] = list(zip(totals, seen, strict=True))
    if all(total.ndim == 0 for total in totals):
        # Asked once of a vector: of many scalars it would be as many kernels.
        stacked = lax.optimization_barrier(jnp.stack(totals))
        rows = [(stacked, jnp.asarray(seen, stacked.dtype))]
    flags = []
    for total, bound in rows:
        off = jnp.isinf(total) | ((total > 0) & (total < bound))
        flags.append(jnp.stack([jnp.any(off), jnp.any(total == 0), jnp.any(total > 0)]))
    # The barrier keeps XLA from unrolling this into a chain, slow to compile.
    return jnp.any(lax.optimization_barrier(jnp.stack(flags)), axis=0)


def _squares_fit(dtype: Any) -> bool:
    """Whether sums of squares of this dtype can neither overflow nor vanish."""
    wide = jnp.finfo(accumulator(dtype))
    return 2 * jnp.finfo(dtype).maxexp + 40 < wide.maxexp
