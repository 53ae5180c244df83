"""Completing a reduction over the mesh axes on which its value differs."""

import jax
from jax import lax


def varying_axes(x: jax.Array) -> tuple[str, ...]:
    """The manual mesh axes over which ``x`` is known, from its type, to differ."""
    return tuple(sorted(jax.typeof(x).manual_axis_type.varying))


def whole_size(x: jax.Array) -> int | jax.Array:
    """The number of elements of ``x`` on all devices that hold shares of it."""
    axes = varying_axes(x)
    return x.size * lax.axis_size(axes) if axes else x.size


def reduce_sum(x: jax.Array) -> jax.Array:
    """Sums over the devices that hold different shares of ``x``."""
    axes = varying_axes(x)
    return lax.psum(x, axes) if axes else x


def reduce_max(x: jax.Array) -> jax.Array:
    """The maximum over the devices that hold different shares of ``x``."""
    axes = varying_axes(x)
    return lax.pmax(x, axes) if axes else x
