"""The rule `window_zscore`: so many standard deviations above the mean of a window."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._show import chosen, shown
from optaxclip._thresholds._memory import Number, PyTree, like, per_norm


class WindowZscoreState(NamedTuple):
    """State of :func:`window_zscore`: trees like the norms."""

    window_zscore_count: PyTree  # int32: norms recorded so far
    window_zscore_ring: PyTree  # (window, ...): the last of them

    __repr__ = shown


def window_zscore(
    z_threshold: Number = 6.0, window: int = 128, min_count: int = 64
) -> optax.GradientTransformation:
    r"""Mean plus so many standard deviations of the last norms: a rule to skip by.

    .. math::

        T_t = \bar n + z \sqrt{\tfrac{1}{m - 1} \textstyle\sum_i (n_i - \bar n)^2},
        \qquad r_t = \min(n_t, T_t)

    over the last :math:`m \le` ``window`` recorded norms :math:`r`, without the current
    one. OLMo and MaxText record the norm itself, so one spike hides the next: it stays
    in the window and inflates the deviation. This rule records a spike as if it were
    just at the threshold. Norms that rise and stay high still raise the threshold, step
    by step. With the defaults, the first step that it can bound is the one at index 64;
    in OLMo-core it is the one at 63.

    Args:
      z_threshold: The number of standard deviations :math:`z > 0`.
      window: How many norms to look back on, at least 2.
      min_count: The threshold is infinite until this many norms are recorded, at least
        2 and at most ``window``.

    Returns:
      A rule with ``WindowZscoreState``, from finite norms to thresholds of their
      shapes and dtypes. A norm of 0 is not recorded. If all norms recorded are equal,
      the threshold is 1.01 times that norm: the deviation counts as at least
      0.01 / z of the mean.

    Raises:
      ValueError: ``z_threshold`` is not positive, ``window`` is not an integer of
        at least 2, or ``min_count`` is not one from 2 to ``window``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> rule = optaxclip.window_zscore(z_threshold=3.0, window=4, min_count=3)
      >>> state = rule.init(jnp.float32(0.0))
      >>> for norm in [1.0, 1.1, 0.9, 50.0, 1.0]:
      ...     threshold, state = rule.update(jnp.float32(norm), state)
      ...     print(f"{norm:5.1f} {threshold:.2f}")
        1.0 inf
        1.1 inf
        0.9 inf
       50.0 1.30
        1.0 1.59

    References:
      OLMo Team, `2 OLMo 2 Furious <https://arxiv.org/abs/2501.00656>`_, 2024
    """
    call = "window_zscore"
    window, min_count = chosen(window), chosen(min_count)
    _checks.check(call, "z_threshold", z_threshold, lambda x: x > 0, "positive")
    _checks.count(call, "window", window, least=2)
    _checks.count(call, "min_count", min_count, least=2, most=window)

    def init_one(norm: jax.Array) -> WindowZscoreState:
        return WindowZscoreState(
            jnp.zeros_like(norm, jnp.int32),
            jnp.broadcast_to(jnp.zeros_like(norm), (window, *norm.shape)),
        )

    def update_one(
        norm: jax.Array, state: WindowZscoreState
    ) -> tuple[jax.Array, WindowZscoreState]:
        count, ring = state
        place = jnp.arange(window, dtype=jnp.int32).reshape(window, *[1] * norm.ndim)
        bound = _bound(ring, place < count[None], like(z_threshold, norm))
        threshold = jnp.where(count < min_count, jnp.inf, bound)
        recorded = jnp.minimum(jax.lax.stop_gradient(norm), threshold)
        here = (place == (count % window)[None]) & (norm > 0)[None]
        ring = jnp.where(here, recorded[None], ring)
        # Beyond two windows only the place in the ring matters: the count never ends.
        count = jnp.where(norm > 0, count + 1, count)
        count = jnp.where(count < 2 * window, count, count - window)
        return threshold, WindowZscoreState(count, ring)

    return per_norm(WindowZscoreState, init_one, update_one)


def _bound(ring: jax.Array, filled: jax.Array, z: jax.Array) -> jax.Array:
    """Mean plus z deviations of the filled places, in units of the largest norm."""
    largest = jnp.max(ring, axis=0)
    unit = jnp.where(largest > 0, largest, 1)
    norms = jnp.where(filled, ring / unit[None], 0)
    count = jnp.sum(filled, axis=0).astype(ring.dtype)
    mean = jnp.sum(norms, axis=0) / jnp.maximum(count, 1)
    squares = jnp.where(filled, (norms - mean[None]) ** 2, 0)
    deviation = jnp.sqrt(jnp.sum(squares, axis=0) / jnp.maximum(count - 1, 1))
    return unit * (mean + jnp.maximum(z * deviation, 0.01 * mean))
