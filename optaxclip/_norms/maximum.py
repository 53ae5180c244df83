"""The max-norm: NaN where there is one, on every device, and differentiable.

A maximum of floats over several devices may lose a NaN (XLA for CPU does), so that one
device clips and another does not. On a GPU or a TPU, the maximum is therefore taken of
the bits: as integers, the bits of non-negative floats have the order of the floats,
with infinity above every number and NaN above infinity. XLA for CPU would write these
integers to memory. There, the maximum is taken of floats, and with several devices a
sum, which costs a second read, tells whether there was a NaN.

Neither integers nor `lax.pmax` has a derivative, so it is given here: the mean over
the places of the maximum.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._norms.gradients import accumulator, widen
from optaxclip._norms.shares import MeshAxes, reduce_max, reduce_sum

ArrayAxes = tuple[int, ...] | None


def largest(
    x: jax.Array, axis: ArrayAxes, share: MeshAxes, dtype: Any = None
) -> jax.Array:
    """The largest modulus, over ``axis`` or all, in ``dtype``; 0 if there is none."""
    return _largest(x, axis, share, dtype or accumulator(x.dtype))


def _modulus(x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.abs(widen(x, dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _largest(x: jax.Array, axis: ArrayAxes, share: MeshAxes, dtype: Any) -> jax.Array:
    of_all = {"axis": axis, "keepdims": axis is not None}

    def of_floats(x: jax.Array) -> jax.Array:
        top = jnp.max(_modulus(x, dtype), **of_all, initial=0)
        top = reduce_max(top, share)
        if jax.device_count() == 1:
            return top
        # A sum of squares is NaN only if an element is. Not one of moduli: if both
        # reductions used those, XLA would write them to memory.
        squares = _modulus(x, dtype) if jnp.iscomplexobj(x) else widen(x, dtype) ** 2
        total = reduce_sum(jnp.sum(squares, **of_all), share)
        return jnp.where(jnp.isnan(total), jnp.nan, top)

    def of_bits(x: jax.Array) -> jax.Array:
        integer = jnp.int64 if dtype == jnp.float64 else jnp.int32
        bits = lax.bitcast_convert_type(_modulus(x, dtype), integer)
        bits &= jnp.iinfo(integer).max  # a NaN may have a sign
        top = jnp.max(bits, **of_all, initial=0)
        return lax.bitcast_convert_type(reduce_max(top, share), dtype)

    return lax.platform_dependent(x, cpu=of_floats, default=of_bits)


@_largest.defjvp
def _largest_jvp(
    axis: ArrayAxes,
    share: MeshAxes,
    dtype: Any,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    (x,) = primals
    norm = _largest(x, axis, share, dtype)
    to_modulus = functools.partial(_modulus, dtype=dtype)
    modulus, direction = jax.jvp(to_modulus, primals, tangents)
    here = modulus == norm

    def total(x: jax.Array) -> jax.Array:
        x = jnp.sum(x, axis=axis, keepdims=axis is not None)
        return reduce_sum(x, share)

    places = total(here.astype(norm.dtype))
    return norm, total(jnp.where(here, direction, 0)) / jnp.maximum(places, 1)
