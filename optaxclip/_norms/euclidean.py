"""The 2-norm: one read of the gradients, right at the extremes, differentiable.

The derivative, g / |g|, is given in closed form, which makes it finite at zero.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._norms.gradients import accumulator, widen
from optaxclip._norms.roots import roots
from optaxclip._norms.shares import MeshAxes, reduce_sum, reduce_totals, whole_size
from optaxclip._norms.squares import Axes, Units, sums_of_squares

Shares = tuple[MeshAxes, ...]  # for each leaf
Arrays = list[jax.Array]


class Groups(NamedTuple):
    """Leaves that share a norm: each leaf's group, counted from 0 without a gap."""

    of: tuple[int, ...]

    def members(self, values: Sequence[Any]) -> list[list[Any]]:
        """What belongs to the leaves of each group."""
        members: list[list[Any]] = [[] for _ in range(max(self.of) + 1)]
        for group, value in zip(self.of, values, strict=True):
            members[group].append(value)
        return members


# The number of squares from which on float64 costs more than a conditional.
MANY = 2**14

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
        dtypes = [accumulator(*x) for x in by.members([x.dtype for x in leaves])]
        take = functools.partial(_group_sums, groups=by, shares=shares)
        few, of_columns = [i for i, n in enumerate(counts) if _is_few(n)], False
    else:
        counts = [_count(*row) for row in zip(leaves, by, shares, strict=True)]
        dtypes = [accumulator(x.dtype) for x in leaves]
        take = functools.partial(_separate_sums, axes=by, shares=shares)
        few, of_columns = _few(leaves, by), len(leaves) > by.count(None)
    if few and any(shares):  # sums of two dtypes would be two all-reduces
        few = list(range(len(counts)))
    norms = roots(leaves, take, counts, few, of_columns)
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
        # XLA divides by multiplying with the inverse, which is subnormal, hence 0 to
        # it, for norms above 2^126.
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


def _group_sums(
    which: Sequence[int],
    leaves: Arrays,
    units: Units,
    dtype: Any,
    groups: Groups,
    shares: Shares,
) -> list[Arrays]:
    members = groups.members(range(len(leaves)))
    chosen = [members[group] for group in which]
    of_chosen = [leaves[i] for group in chosen for i in group]
    sums = sums_of_squares(of_chosen, [None] * len(of_chosen), units, dtype)
    rows, axes = [], [[shares[i] for i in group] for group in chosen]
    for of in map(iter, sums):
        rows += [list(itertools.islice(of, len(group))) for group in chosen]
    # Several units are for GPU and TPU, see `roots`.
    total = _in_pairs if len(units) == 1 else _in_turn
    # One reduction over devices for all groups in all units.
    totals = reduce_totals(rows, axes * len(units), total)
    starts = range(0, len(totals), max(len(which), 1))
    return [totals[i : i + len(which)] for i in starts] or [[] for _ in units]


# Of sums that are added, XLA makes one all-reduce of a single number; of stacked ones
# it does not. Adding them in pairs loses less to rounding. Added in turn, a TPU can
# keep more of the gradients for the update: `benchmarks/tpu_schedule.py` shows it.
def _in_turn(sums: Arrays) -> jax.Array:
    return functools.reduce(operator.add, sums)


def _in_pairs(sums: Arrays) -> jax.Array:
    while len(sums) > 1:
        pairs = zip(sums[::2], sums[1::2], strict=False)
        sums = [a + b for a, b in pairs] + sums[len(sums) // 2 * 2 :]
    return sums[0]


def _separate_sums(
    which: Sequence[int],
    leaves: Arrays,
    units: Units,
    dtype: Any,
    axes: Sequence[Axes],
    shares: Shares,
) -> list[Arrays]:
    of = [leaves[i] for i in which]
    return [
        [reduce_sum(x, shares[i]) for i, x in zip(which, row, strict=True)]
        for row in sums_of_squares(of, [axes[i] for i in which], units, dtype)
    ]


def _few(leaves: Arrays, axes: Sequence[Axes]) -> list[int]:
    """The leaves whose sums a CPU takes in float64 at once, see `roots`."""
    few = {i for i, leaf in enumerate(leaves) if _is_few(leaf.size)}
    of_columns = {i for i, axis in enumerate(axes) if axis is not None}
    # Asked only where it matters, since it starts the backend of JAX.
    if of_columns - few and jax.device_count() > 1:
        few |= of_columns
    return sorted(few)


def _is_few(count: Any) -> bool:
    """Whether float64 costs less than a conditional. It needs no count, if symbolic."""
    return not isinstance(count, int) or count < MANY


def _count(leaf: jax.Array, axis: Axes, share: MeshAxes) -> int:
    """The number of elements that one norm measures, over all devices."""
    if axis is None:
        return whole_size(leaf, share)
    return math.prod(leaf.shape[i] for i in axis)
