"""The max-norm: NaN where there is one, on every device, and differentiable.

A maximum of floats over several devices may lose a NaN (XLA for CPU does), so that one
device clips and another does not. So the maximum is taken of the bits: as integers, the
bits of non-negative floats have the order of the floats, with infinity above every
number and NaN above infinity. XLA for CPU writes the integers to memory before it
reduces them, so a single device uses floats. Neither integers nor `lax.pmax` have a
derivative, so it is given here: the mean over the places of the maximum.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._norms.shares import MeshAxes, reduce_max, reduce_sum

ArrayAxes = tuple[int, ...] | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def largest(modulus: jax.Array, axis: ArrayAxes, share: MeshAxes) -> jax.Array:
    """The largest of non-negative numbers, over ``axis`` or all; 0 if there is none."""
    keepdims = axis is not None
    if jax.device_count() == 1:
        top = jnp.max(modulus, axis=axis, keepdims=keepdims, initial=0)
        return reduce_max(top, share)
    integer = jnp.int64 if modulus.dtype == jnp.float64 else jnp.int32
    bits = lax.bitcast_convert_type(modulus, integer)
    bits &= jnp.iinfo(integer).max  # a NaN may have a sign
    top = jnp.max(bits, axis=axis, keepdims=keepdims, initial=0)
    return lax.bitcast_convert_type(reduce_max(top, share), modulus.dtype)


@largest.defjvp
def _largest_jvp(
    axis: ArrayAxes,
    share: MeshAxes,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    (modulus,), (direction,) = primals, tangents
    norm = largest(modulus, axis, share)
    here = modulus == norm

    def total(x: jax.Array) -> jax.Array:
        x = jnp.sum(x, axis=axis, keepdims=axis is not None)
        return reduce_sum(x, share)

    places = total(here.astype(norm.dtype))
    return norm, total(jnp.where(here, direction, 0)) / jnp.maximum(places, 1)
