"""Roots of sums of squares that overflow or vanish.

Squares of float32 overflow above 1.8e19 and vanish below 1e-19. Numbers times a power
of two, a unit, have squares that do not, and neither have float32 numbers in float64.

XLA for GPU and TPU takes several sums in one read, whose time is that of memory. There,
each sum is taken in three units, and the one that is sound is chosen. No device waits
for a norm, and a TPU keeps gradients that it has fetched. But of columns, XLA for GPU
takes one sum in a read, so on a GPU the norms of units are sums in float64.

XLA for CPU would read three times. There, most sums are taken in float64. No norm then
waits for another one, and the program is short, but the sum of a leaf takes a third
longer than in float32, and sums of its columns take longer still. So two kinds are
taken in float32: the one sum of a large tree, and, on a single device, those of the
columns of large leaves. Only if such a sum overflowed or nearly vanished, a conditional
takes it again. (Several devices would need one more all-reduce to agree on it.)
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._norms.gradients import accumulator
from optaxclip._norms.squares import Units

Arrays = list[jax.Array]
# From leaves, units for each sum, and a dtype, to the sums in each of these units.
Sums = Callable[[Arrays, Sequence[Units], Any], list[Arrays]]

# The scope of a compiled program, and of a profile, that a step ordinarily leaves out.
RARE = "sums_taken_again"


def roots(
    leaves: Arrays, sums: Sums, counts: Sequence[int], in_float64: Collection[str]
) -> Arrays:
    """The roots of all sums, each from a sum that is sound.

    ``counts`` has the number of squares in each sum, over all devices, and
    ``in_float64`` the platforms on which float64 is the best way to take these sums.
    """
    dtype = accumulator(*(x.dtype for x in leaves))
    if all(_squares_fit(x.dtype) for x in leaves):
        return [jnp.sqrt(total) for total in sums(leaves, [None], dtype)[0]]
    ways = {"cpu": functools.partial(_with_branch, sums=sums, counts=counts)}
    if dtype == jnp.float32:
        way = functools.partial(_in_float64, sums=sums)
        ways |= dict.fromkeys(in_float64, way)
    default = functools.partial(_in_three_units, sums=sums, count=len(counts))
    return lax.platform_dependent(leaves, **ways, default=default)


def _squares_fit(dtype: Any) -> bool:
    """Whether sums of squares of this dtype can neither overflow nor vanish."""
    wide = jnp.finfo(accumulator(dtype))
    return 2 * jnp.finfo(dtype).maxexp + 40 < wide.maxexp


def _in_three_units(leaves: Arrays, sums: Sums, count: int) -> Arrays:
    dtype = accumulator(*(x.dtype for x in leaves))
    large = 2.0 ** (5 * jnp.finfo(dtype).maxexp // 8)
    units: list[Units] = [None, [large] * count, [1 / large] * count]
    norms = []
    for plain, enlarged, reduced in zip(*sums(leaves, units, dtype), strict=True):
        # Above this, squares that vanished are too small to be seen in the sum. Below
        # it, the enlarged ones do not overflow.
        low, high = plain < large**-0.5, jnp.isinf(plain)
        total = jnp.where(high, reduced, jnp.where(low, enlarged, plain))
        unit = jnp.where(high, large, jnp.where(low, 1 / large, 1))
        norms.append(jnp.sqrt(total) * unit)
    return norms


def _in_float64(leaves: Arrays, sums: Sums) -> Arrays:
    with jax.enable_x64(True):
        (totals,) = sums(leaves, [None], jnp.float64)
        return [jnp.sqrt(total).astype(jnp.float32) for total in totals]


def _with_branch(leaves: Arrays, sums: Sums, counts: Sequence[int]) -> Arrays:
    """A sum of 0 needs no second look as long as another sum is positive."""
    dtype = accumulator(*(x.dtype for x in leaves))
    info = jnp.finfo(dtype)
    (totals,) = sums(leaves, [None], dtype)
    # Squares that underflowed, each below the smallest normal number, can be seen in a
    # sum below this.
    seen: Any = [max(count, 1) * float(info.tiny) / float(info.eps) for count in counts]
    rows = list(zip(totals, seen, strict=True))
    if len(totals) > 1 and not any(total.ndim for total in totals):
        # Asked once of a vector: of many scalars it would be as many kernels.
        whole = lax.optimization_barrier(jnp.stack(totals))
        rows = [(whole, jnp.asarray(seen, dtype))]
    off, some = jnp.zeros((2,), bool)
    for total, least in rows:
        off |= jnp.any(jnp.isinf(total) | ((total > 0) & (total < least)))
        some |= jnp.any(total != 0)
    again = functools.partial(_in_float64, sums=sums)
    if dtype == jnp.float64:
        again = functools.partial(_in_three_units, sums=sums, count=len(counts))
    with jax.named_scope(RARE):
        plain = [jnp.sqrt(total) for total in totals]
        return lax.cond(off | ~some, again, lambda _: plain, leaves)
