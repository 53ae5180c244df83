"""The 2-norm: one read of the gradients, right at the extremes, differentiable.

Squares of float32 overflow above 1.8e19 and vanish below 1e-19. Guarding every sum
would cost a second read, so the plain sum comes first, and only where it overflowed or
nearly vanished is it taken again, in a unit (a power of two) that fits. That is a
conditional: it costs a second set of sums in the program, but XLA for GPU records it in
one CUDA graph with the rest of a step, where a loop makes the host wait, and XLA for
TPU keeps the gradients that it has fetched. The derivative, g / |g|, is given in closed
form, which makes it finite at zero.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip import _gradients, _mesh

Axes = tuple[int, ...] | None
Shares = tuple[_mesh.Axes, ...]  # for each leaf
Arrays = list[jax.Array]
Sums = Callable[[Arrays, Arrays | None], Arrays]  # of the leaves, in these units


def joint_norm(leaves: Sequence[jax.Array], shares: Sequence[_mesh.Axes]) -> jax.Array:
    """The norm of all leaves together, a scalar."""
    return _norms(list(leaves), None, tuple(shares))[0]


def separate_norms(
    leaves: Sequence[jax.Array], axes: Sequence[Axes], shares: Sequence[_mesh.Axes]
) -> Arrays:
    """A scalar for a leaf whose axes are None, else the norms over these axes."""
    return _norms(list(leaves), tuple(axes), tuple(shares)) if leaves else []


# Compiled by itself when called eagerly: an eager loop would compile at every call.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _norms(leaves: Arrays, axes: tuple[Axes, ...] | None, shares: Shares) -> Arrays:
    return _closed_form(leaves, axes, shares)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _closed_form(
    leaves: Arrays, axes: tuple[Axes, ...] | None, shares: Shares
) -> Arrays:
    if axes is None:
        count = sum(x.size for x in leaves)
        sums = functools.partial(_joint_sum, shares=shares)
        return _roots(leaves, sums, [count], False)
    counts = [_count(x, axis) for x, axis in zip(leaves, axes, strict=True)]
    sums = functools.partial(_separate_sums, axes=axes, shares=shares)
    norms = _roots(leaves, sums, counts, True)
    dtypes = [_gradients.accumulator(x.dtype) for x in leaves]
    return [norm.astype(dtype) for norm, dtype in zip(norms, dtypes, strict=True)]


@_closed_form.defjvp
def _closed_form_jvp(
    axes: tuple[Axes, ...] | None, shares: Shares, primals: Any, tangents: Any
) -> tuple[Arrays, Arrays]:
    (leaves,), (directions,) = primals, tangents
    norms = _closed_form(leaves, axes, shares)
    divisors = [jnp.where(norm == 0, 1, norm) for norm in norms]

    def slope(
        x: jax.Array, dx: jax.Array, norm: jax.Array, axis: Axes, share: _mesh.Axes
    ) -> jax.Array:
        x, dx = _gradients.widen(x, norm.dtype), _gradients.widen(dx, norm.dtype)
        product = x.real / norm * dx.real
        if jnp.iscomplexobj(x):
            product += x.imag / norm * dx.imag
        partial = jnp.sum(product, axis=axis, keepdims=axis is not None)
        return _mesh.reduce_sum(partial, share)

    if axes is None:
        rows = zip(leaves, directions, shares, strict=True)
        slopes = [slope(x, dx, divisors[0], None, share) for x, dx, share in rows]
        return norms, [functools.reduce(operator.add, slopes)]
    rows = zip(leaves, directions, divisors, axes, shares, strict=True)
    return norms, [slope(*row) for row in rows]


def _roots(
    leaves: Arrays, sums: Sums, counts: Sequence[int], zero_fits: bool
) -> Arrays:
    """The roots of ``sums(leaves, units)``, each in a unit in which it is sound.

    ``counts`` has the number of squares in each sum. ``zero_fits``: beside others a sum
    of 0 is nothing to look into.
    """
    totals = sums(leaves, None)
    roots = [jnp.sqrt(total) for total in totals]
    if all(_squares_fit(x.dtype) for x in leaves):
        return roots
    dtype = totals[0].dtype
    large = 2.0 ** (3 * jnp.finfo(dtype).maxexp // 4)
    some = _any([total > 0 for total in totals]) if zero_fits else jnp.zeros((), bool)
    units = []
    for total, count in zip(totals, counts, strict=True):
        vanished = _vanished(total, count) & ((total > 0) | ~some)
        unit = jnp.where(vanished, large, jnp.ones((), dtype))
        units.append(jnp.where(jnp.isinf(total), 1 / large, unit))

    def again(units: Arrays) -> Arrays:
        rows = zip(sums(leaves, units), units, strict=True)
        return [jnp.sqrt(total) / unit for total, unit in rows]

    with jax.named_scope(RARE):
        is_rare = _any([unit != 1 for unit in units])
        return lax.cond(is_rare, again, lambda _: roots, units)


# The scope of a compiled program, and of a profile, that a step ordinarily leaves out.
RARE = "sums_in_other_units"


def _any(flags: Arrays) -> jax.Array:
    # The barrier keeps XLA from unrolling this into a chain, slow to compile.
    stacked = jnp.stack([jnp.any(flag) for flag in flags])
    return jnp.any(lax.optimization_barrier(stacked))


def _vanished(total: jax.Array, count: int) -> jax.Array:
    """Whether the squares that underflowed could be seen in their sum.

    At most ``count`` did, each below the smallest normal number.
    """
    info = jnp.finfo(total.dtype)
    return total < max(count, 1) * float(info.tiny) / float(info.eps)


def _joint_sum(leaves: Arrays, units: Arrays | None, shares: Shares) -> Arrays:
    units = units and units * len(leaves)
    sums = list(_sums(leaves, [None] * len(leaves), units))
    return [_mesh.reduce_total(sums, shares, _total)]


def _total(sums: Arrays) -> jax.Array:
    return jnp.sum(lax.optimization_barrier(jnp.stack(sums)))


def _separate_sums(
    leaves: Arrays, units: Arrays | None, axes: Sequence[Axes], shares: Shares
) -> Arrays:
    sums = _sums(leaves, axes, units)
    return [_mesh.reduce_sum(x, of) for x, of in zip(sums, shares, strict=True)]


def _sums(
    leaves: Arrays, axes: Sequence[Axes], units: Arrays | None
) -> Iterator[jax.Array]:
    """The sum of the squares over ``axis`` of every leaf, or of ``leaf * unit``."""
    dtype = _gradients.accumulator(*(x.dtype for x in leaves))
    for i, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)):
        # The barrier keeps XLA from writing arrays that several fusions could share: a
        # widened copy of the leaf, or one full of `unit` for leaves of one shape.
        leaf, unit = lax.optimization_barrier((leaf, units[i] if units else 1))
        wide = _gradients.widen(leaf, dtype)
        parts = [wide.real, wide.imag] if jnp.iscomplexobj(wide) else [wide]
        if units:
            parts = [part * unit for part in parts]
        square = functools.reduce(operator.add, map(lax.square, parts))
        yield jnp.sum(square, axis=axis, keepdims=axis is not None)


def _count(leaf: jax.Array, axis: Axes) -> int:
    """How many elements of a leaf one norm is of."""
    return leaf.size if axis is None else math.prod(leaf.shape[i] for i in axis)


def _squares_fit(dtype: Any) -> bool:
    """Whether sums of squares of this dtype can neither overflow nor vanish."""
    wide = jnp.finfo(_gradients.accumulator(dtype))
    return 2 * jnp.finfo(dtype).maxexp + 40 < wide.maxexp
