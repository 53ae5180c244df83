"""The 2-norm: one read of the gradients, right at the extremes, differentiable.

Squares of float32 overflow above 1.8e19 and vanish below 1e-19. Guarding every sum
would cost a second read, so the plain sum is taken first. Only if it overflowed or
nearly vanished, a conditional takes the sum again in a unit (a power of two) that fits.
The conditional adds a second set of sums to the program. But XLA for GPU records it in
one CUDA graph with the rest of a step (on several devices too, if told to record
collectives), where a loop would make the host wait, and XLA for TPU keeps the gradients
that it has fetched. The derivative, g / |g|, is given in closed form, which makes it
finite at zero.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._norms.gradients import accumulator, widen
from optaxclip._norms.shares import MeshAxes, reduce_sum, reduce_totals, whole_size

Axes = tuple[int, ...] | None
Shares = tuple[MeshAxes, ...]  # for each leaf
Arrays = list[jax.Array]
Sums = Callable[[Arrays, Arrays | None], Arrays]  # of the leaves, in these units


class Groups(NamedTuple):
    """Leaves that share a norm: each leaf's group, counted from 0 without a gap."""

    of: tuple[int, ...]

    def members(self, values: Sequence[Any]) -> list[list[Any]]:
        """What belongs to the leaves of each group."""
        members: list[list[Any]] = [[] for _ in range(max(self.of) + 1)]
        for group, value in zip(self.of, values, strict=True):
            members[group].append(value)
        return members


By = Groups | tuple[Axes, ...]  # of each leaf: its group, or the axes of its units


def joint_norm(leaves: Sequence[jax.Array], shares: Sequence[MeshAxes]) -> jax.Array:
    """The norm of all leaves together, a scalar."""
    return group_norms(leaves, (0,) * len(leaves), shares)[0]


def group_norms(
    leaves: Sequence[jax.Array], groups: tuple[int, ...], shares: Sequence[MeshAxes]
) -> Arrays:
    """For each group of leaves a scalar: the norm of these leaves together."""
    return _norms(list(leaves), Groups(groups), tuple(shares)) if leaves else []


def separate_norms(
    leaves: Sequence[jax.Array], axes: Sequence[Axes], shares: Sequence[MeshAxes]
) -> Arrays:
    """For each leaf a scalar if its axes are None, else the norms over its axes."""
    return _norms(list(leaves), tuple(axes), tuple(shares)) if leaves else []


# Compiled by itself when called eagerly: an eager loop would compile at every call.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _norms(leaves: Arrays, by: By, shares: Shares) -> Arrays:
    return _closed_form(leaves, by, shares)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _closed_form(leaves: Arrays, by: By, shares: Shares) -> Arrays:
    if isinstance(by, Groups):
        sizes = [whole_size(x, share) for x, share in zip(leaves, shares, strict=True)]
        counts = [sum(group) for group in by.members(sizes)]
        dtypes = [
            accumulator(*group) for group in by.members([x.dtype for x in leaves])
        ]
        sums = functools.partial(_group_sums, groups=by, shares=shares)
    else:
        counts = [_count(*row) for row in zip(leaves, by, shares, strict=True)]
        dtypes = [accumulator(x.dtype) for x in leaves]
        sums = functools.partial(_separate_sums, axes=by, shares=shares)
    norms = _roots(leaves, sums, counts)
    return [norm.astype(dtype) for norm, dtype in zip(norms, dtypes, strict=True)]


@_closed_form.defjvp
def _closed_form_jvp(
    by: By, shares: Shares, primals: Any, tangents: Any
) -> tuple[Arrays, Arrays]:
    (leaves,), (directions,) = primals, tangents
    norms = _closed_form(leaves, by, shares)
    divisors = [jnp.where(norm == 0, 1, norm) for norm in norms]

    def slope(
        x: jax.Array, dx: jax.Array, norm: jax.Array, axis: Axes, share: MeshAxes
    ) -> jax.Array:
        x, dx = widen(x, norm.dtype), widen(dx, norm.dtype)
        # Inverses of norms above 2^126 would be subnormal, which XLA counts as 0.
        unit = jnp.where(norm > 2.0**64, 2.0**-64, jnp.ones_like(norm))
        product = (x.real * unit) / (norm * unit) * dx.real
        if jnp.iscomplexobj(x):
            product += (x.imag * unit) / (norm * unit) * dx.imag
        partial = jnp.sum(product, axis=axis, keepdims=axis is not None)
        return reduce_sum(partial, share)

    if not isinstance(by, Groups):
        rows = zip(leaves, directions, divisors, by, shares, strict=True)
        return norms, [slope(*row) for row in rows]
    of_leaves = [divisors[group] for group in by.of]
    rows = zip(leaves, directions, of_leaves, shares, strict=True)
    slopes = [slope(x, dx, norm, None, share) for x, dx, norm, share in rows]
    return norms, [functools.reduce(operator.add, x) for x in by.members(slopes)]


def _roots(leaves: Arrays, sums: Sums, counts: Sequence[int]) -> Arrays:
    """The roots of ``sums(leaves, units)``, each in a unit in which it is sound.

    ``counts`` has the number of squares in each sum, over all devices. A sum of 0 needs
    no second look as long as another sum is positive.
    """
    totals = sums(leaves, None)
    roots = [jnp.sqrt(total) for total in totals]
    if all(_squares_fit(x.dtype) for x in leaves):
        return roots
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
        rows = zip(sums(leaves, units), units, strict=True)
        return [jnp.sqrt(total) / unit for total, unit in rows]

    with jax.named_scope(RARE):
        return lax.cond(off | zero, again, lambda _: roots, totals)


# The scope of a compiled program, and of a profile, that a step ordinarily leaves out.
RARE = "sums_in_other_units"


def _any_of(totals: Arrays, seen: Sequence[float]) -> jax.Array:
    """Whether any sum is off (overflowed or lost squares), 0, or positive: 3 flags."""
    rows = list(zip(totals, seen, strict=True))
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


def _group_sums(
    leaves: Arrays, units: Arrays | None, groups: Groups, shares: Shares
) -> Arrays:
    units = units and [units[group] for group in groups.of]
    sums = list(_sums(leaves, [None] * len(leaves), units))
    return reduce_totals(groups.members(sums), groups.members(shares), _total)


def _total(sums: Arrays) -> jax.Array:
    return jnp.sum(lax.optimization_barrier(jnp.stack(sums)))


def _separate_sums(
    leaves: Arrays, units: Arrays | None, axes: Sequence[Axes], shares: Shares
) -> Arrays:
    sums = _sums(leaves, axes, units)
    return [reduce_sum(x, of) for x, of in zip(sums, shares, strict=True)]


def _sums(
    leaves: Arrays, axes: Sequence[Axes], units: Arrays | None
) -> Iterator[jax.Array]:
    """The sum of the squares over ``axis`` of every leaf, or of ``leaf * unit``."""
    dtype = accumulator(*(x.dtype for x in leaves))
    for i, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)):
        # The barrier keeps XLA from writing arrays that several fusions could share: a
        # widened copy of the leaf, or one full of `unit` for leaves of one shape.
        leaf, unit = lax.optimization_barrier((leaf, units[i] if units else 1))
        wide = widen(leaf, dtype)
        parts = [wide.real, wide.imag] if jnp.iscomplexobj(wide) else [wide]
        if units:
            parts = [part * unit for part in parts]
        square = functools.reduce(operator.add, map(lax.square, parts))
        yield jnp.sum(square, axis=axis, keepdims=axis is not None)


def _count(leaf: jax.Array, axis: Axes, share: MeshAxes) -> int:
    """The number of elements that one norm measures, over all devices."""
    if axis is None:
        return whole_size(leaf, share)
    return math.prod(leaf.shape[i] for i in axis)


def _squares_fit(dtype: Any) -> bool:
    """Whether sums of squares of this dtype can neither overflow nor vanish."""
    wide = jnp.finfo(accumulator(dtype))
    return 2 * jnp.finfo(dtype).maxexp + 40 < wide.maxexp
