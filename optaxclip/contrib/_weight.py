"""How much of a running mean is known after its first steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optaxclip._thresholds import Number, like


def weight(decay: Number, count: jax.Array, norm: jax.Array) -> jax.Array:
    """1 - decay ** count, without the cancellation of a decay near 1."""
    steps = count.astype(norm.dtype)
    return -jnp.expm1(steps * jnp.log1p(-like(1 - decay, norm)))
