"""The 2-norm: one read of the gradients, right at the extremes, differentiable.

Squares of float32 overflow above 1.8e19 and vanish below 1e-19. Guarding every sum
would cost a second read, so the plain sum comes first, and only where it overflowed or
nearly vanished is it taken again, in a unit (a power of two) that fits. A loop does it
whose body is compiled once and nearly always runs once; `lax.cond` would compile the
sum twice. A loop has no reverse derivative, so g / |g| is given in closed form, which
also makes it finite at zero.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip import _gradients, _mesh

Axes = tuple[int, ...] | None
Shares = tuple[_mesh.Axes, ...]  # for each leaf
Arrays = list[jax.Array]
Sums = Callable[[Arrays, jax.Array], Arrays]  # of leaves, in a unit


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
    widest = _gradients.accumulator(*(x.dtype for x in leaves))
    if axes is None:
        count = sum(x.size for x in leaves)
        sums = functools.partial(_joint_sum, shares=shares)
        return _roots(leaves, sums, [jnp.zeros((), widest)], [count], False)
    zeros = [_zeros(x, axis, widest) for x, axis in zip(leaves, axes, strict=True)]
    counts = [x.size // max(z.size, 1) for x, z in zip(leaves, zeros, strict=True)]
    sums = functools.partial(_separate_sums, axes=axes, shares=shares)
    norms = _roots(leaves, sums, zeros, counts, True)
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
    leaves: Arrays, sums: Sums, zeros: Arrays, counts: Sequence[int], zero_fits: bool
) -> Arrays:
    """The roots of ``sums(leaves, unit)``, each in the first unit in which it is sound.

    ``zeros`` has the shapes of the sums, ``counts`` the number of squares in each.
    """
    dtype = zeros[0].dtype
    if all(_squares_fit(x.dtype) for x in leaves):
        return [jnp.sqrt(total) for total in sums(leaves, jnp.ones((), dtype))]
    large = 2.0 ** (3 * jnp.finfo(dtype).maxexp // 4)

    def measure(carry: _Carry) -> _Carry:
        unit = jnp.asarray([1, large, 1 / large], dtype)[carry.attempt]
        totals = sums(leaves, unit)
        norms, sound = [], []
        some = _any_positive(totals) if zero_fits else jnp.zeros((), bool)
        rows = zip(totals, counts, carry.norms, carry.sound, strict=True)
        for total, count, norm, was_sound in rows:
            norms.append(jnp.where(was_sound, norm, jnp.sqrt(total) / unit))
            vanished = (carry.attempt == 0) & _vanished(total, count)
            vanished &= (total > 0) | ~some
            sound.append(was_sound | ~(jnp.isinf(total) | vanished))
        return _Carry(carry.attempt + 1, norms, sound)

    def unfinished(carry: _Carry) -> jax.Array:
        sound = jnp.stack([jnp.all(x) for x in carry.sound])
        return (carry.attempt < 3) & ~jnp.all(lax.optimization_barrier(sound))

    unsound = [jnp.zeros_like(zero, bool) for zero in zeros]
    carry = _Carry(jnp.int32(0), zeros, unsound)
    if sum(x.size for x in leaves) > _SMALL:
        return lax.while_loop(unfinished, measure, carry).norms
    for _ in range(3):
        carry = measure(carry)
    return carry.norms


# Up to so many elements all attempts are made in a row, which costs next to nothing:
# XLA for CPU turns loops over little data into one kernel, at minutes of compile time.
_SMALL = 2**20


class _Carry(NamedTuple):
    attempt: jax.Array
    norms: Arrays
    sound: Arrays  # whether a norm is final: neither overflowed nor vanished


def _any_positive(totals: Arrays) -> jax.Array:
    """Whether there is any gradient: then leaves and units of 0 are ordinary."""
    tops = jnp.stack([jnp.max(total, initial=0) for total in totals])
    return jnp.max(lax.optimization_barrier(tops)) > 0


def _vanished(total: jax.Array, count: int) -> jax.Array:
    """Whether the squares that underflowed could be seen in their sum.

    At most ``count`` did, each below the smallest normal number.
    """
    info = jnp.finfo(total.dtype)
    return total < max(count, 1) * float(info.tiny) / float(info.eps)


def _joint_sum(leaves: Arrays, unit: jax.Array, shares: Shares) -> Arrays:
    sums = list(_sums(leaves, [None] * len(leaves), unit))
    return [_mesh.reduce_total(sums, shares, _total)]


def _total(sums: Arrays) -> jax.Array:
    # The barrier keeps XLA from unrolling this into a chain, slow to compile.
    return jnp.sum(lax.optimization_barrier(jnp.stack(sums)))


def _separate_sums(
    leaves: Arrays, unit: jax.Array, axes: Sequence[Axes], shares: Shares
) -> Arrays:
    sums = _sums(leaves, axes, unit)
    return [_mesh.reduce_sum(x, of) for x, of in zip(sums, shares, strict=True)]


def _sums(leaves: Arrays, axes: Sequence[Axes], unit: jax.Array) -> Iterator[jax.Array]:
    """The sum of the squares of ``leaf * unit`` over ``axis``, for every leaf."""
    for leaf, axis in zip(leaves, axes, strict=True):
        # Without a barrier, leaves of one shape would share one array full of `unit`,
        # and a widened copy of each leaf would be made before the loop.
        leaf, factor = lax.optimization_barrier((leaf, unit))
        wide = _gradients.widen(leaf, factor.dtype)
        square = lax.square(wide.real * factor)
        if jnp.iscomplexobj(wide):
            square += lax.square(wide.imag * factor)
        yield jnp.sum(square, axis=axis, keepdims=axis is not None)


def _zeros(leaf: jax.Array, axis: Axes, dtype: Any) -> jax.Array:
    """Zeros of the shape, and on a mesh the layout, of the norms of a leaf."""
    if axis is None:
        return jnp.zeros((), dtype)
    return jnp.sum(jnp.zeros_like(leaf, dtype), axis=axis, keepdims=True)


def _squares_fit(dtype: Any) -> bool:
    """Whether sums of squares of this dtype can neither overflow nor vanish."""
    wide = jnp.finfo(_gradients.accumulator(dtype))
    return 2 * jnp.finfo(dtype).maxexp + 40 < wide.maxexp
