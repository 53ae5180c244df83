"""Roots of sums of squares that overflow or vanish.

Squares of float32 overflow above 1.8e19 and vanish below 1e-19. They do neither in
float64, nor if the numbers are first multiplied by a power of two, a unit, that fits.

XLA for GPU and TPU takes several sums in one read, whose time is that of memory. There,
each sum is taken in three units, and the one that is sound is chosen. The host never
waits for a norm, and a TPU can keep the gradients from the norm to the update. But of
columns, XLA for GPU takes one sum in a read, so on a GPU the norms of units are sums in
float64.

XLA for CPU would read three times. There, a sum is taken in float32, and a conditional
of its own takes it again, in float64, if it overflowed or nearly vanished. So no norm
waits for another one, and a leaf is scaled while it is in the cache. Sums of few
squares are taken in float64 at once, which costs less than a conditional. So are those
of columns if there are several devices, which would need an all-reduce to agree on one.
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
# From the numbers of sums, and all leaves, to these sums in each unit, in a dtype.
Take = Callable[[Sequence[int], Arrays, Units, Any], list[Arrays]]

# The scope of a compiled program, and of a profile, that a step ordinarily leaves out.
RARE = "sums_taken_again"


def roots(
    leaves: Arrays,
    take: Take,
    counts: Sequence[int],
    few: Sequence[int],
    of_columns: bool,
) -> Arrays:
    """The roots of all sums, each from a sum that is sound.

    ``counts`` has the number of squares in each sum, over all devices. ``few`` numbers
    the sums that a CPU takes in float64 at once. A GPU takes those ``of_columns`` so.
    """
    dtype = accumulator(*(x.dtype for x in leaves))
    every = range(len(counts))
    if all(_squares_fit(x.dtype) for x in leaves):
        return [jnp.sqrt(total) for total in take(every, leaves, [None], dtype)[0]]
    if dtype != jnp.float32:
        few, of_columns = [], False
    ways = {"cpu": functools.partial(_on_cpu, take=take, counts=counts, few=few)}
    if of_columns:
        on_gpu = functools.partial(_in_float64, which=every, take=take)
        ways |= {"cuda": on_gpu, "rocm": on_gpu}
    default = functools.partial(_in_three_units, which=every, take=take)
    return lax.platform_dependent(leaves, **ways, default=default)


def _squares_fit(dtype: Any) -> bool:
    """Whether sums of squares of this dtype can neither overflow nor vanish."""
    wide = jnp.finfo(accumulator(dtype))
    return 2 * jnp.finfo(dtype).maxexp + 40 < wide.maxexp


def _in_three_units(leaves: Arrays, which: Sequence[int], take: Take) -> Arrays:
    dtype = accumulator(*(x.dtype for x in leaves))
    large = 2.0 ** (5 * jnp.finfo(dtype).maxexp // 8)
    sums = take(which, leaves, [None, large, 1 / large], dtype)
    norms = []
    for plain, enlarged, reduced in zip(*sums, strict=True):
        # Above this, squares that vanished are too small to be seen in the sum. Below
        # it, the enlarged ones do not overflow.
        low, high = plain < large**-0.5, jnp.isinf(plain)
        total = jnp.where(high, reduced, jnp.where(low, enlarged, plain))
        unit = jnp.where(high, large, jnp.where(low, 1 / large, 1))
        norms.append(jnp.sqrt(total) * unit)
    return norms


def _in_float64(leaves: Arrays, which: Sequence[int], take: Take) -> Arrays:
    with jax.enable_x64(True):
        (totals,) = take(which, leaves, [None], jnp.float64)
        return [jnp.sqrt(total).astype(jnp.float32) for total in totals]


def _on_cpu(
    leaves: Arrays, take: Take, counts: Sequence[int], few: Sequence[int]
) -> Arrays:
    dtype = accumulator(*(x.dtype for x in leaves))
    exact = _in_float64 if dtype == jnp.float32 else _in_three_units
    norms = dict(zip(few, exact(leaves, few, take), strict=True))
    many = [i for i in range(len(counts)) if i not in norms]
    for i, total in zip(many, take(many, leaves, [None], dtype)[0], strict=True):
        again = functools.partial(exact, leaves, [i], take)
        (norms[i],) = _sound(total, counts[i], again)
    return [norms[i] for i in range(len(counts))]


def _sound(total: jax.Array, count: int, again: Callable[[], Arrays]) -> Arrays:
    """The root of a sum, which is taken again if it is not sound.

    Sums of columns are taken again together. One of 0 needs no second look as long as
    another one is positive: it may be that of a dead unit.
    """
    info = jnp.finfo(total.dtype)
    # Only in a sum below this do squares that underflowed matter: each was smaller than
    # the smallest normal number.
    seen = count * float(info.tiny) / float(info.eps)
    off = jnp.any(jnp.isinf(total) | ((total > 0) & (total < seen)))
    with jax.named_scope(RARE):
        return lax.cond(off | ~jnp.any(total > 0), again, lambda: [jnp.sqrt(total)])
