"""The named skips."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel import skip_by
from optaxclip._norms import AxisName, global_norm
from optaxclip._show import default
from optaxclip._thresholds import Number, window_zscore


def skip_nonfinite(
    inner: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Skips steps with a NaN or infinity in the gradients: a bad batch does no harm.

    This is ``skip_by(inner, global_norm, inf)``. Unlike ``optax.apply_if_finite``, it
    checks the gradients, not the updates, and never lets a NaN through, however many
    there are in a row. Put it around everything, including ``optax.MultiSteps``: a NaN
    never leaves the accumulator that it enters.

    Args:
      inner: The optimizer to guard.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.SkipState`, see :func:`optaxclip.skip_by`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optaxclip.skip_nonfinite(
      ...     optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-3))
      ... )
      >>> params = jnp.ones(2)
      >>> updates, state = tx.update(jnp.full(2, jnp.nan), tx.init(params), params)
      >>> print(updates, optaxclip.metrics(state)["skip_count"])
      [0. 0.] 1
    """
    with _checks.made("skip_nonfinite"):
        return skip_by(inner, global_norm, jnp.inf, axis_name=axis_name)


def skip_spikes(
    inner: optax.GradientTransformation,
    z_threshold: Number = 6.0,
    window: int = default(128),
    min_count: int = default(64),
    *,
    watch_loss: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose norm (or loss, if asked) is far above the recent ones.

    This is ``skip_by(inner, global_norm, window_zscore(...))``. The threshold is the
    mean plus ``z_threshold`` standard deviations, as in the training of OLMo. A streak
    of skips raises it, so that training continues if the norms stay high. Steps that
    are not finite are always skipped and never remembered. By default the first step
    that can be skipped for its size is the one at index 64; in OLMo-core it is the one
    at 63. For another rule use :func:`optaxclip.skip_by`.

    Args:
      inner: The optimizer to guard.
      z_threshold: As in :func:`optaxclip.window_zscore`.
      window: As in :func:`optaxclip.window_zscore`.
      min_count: As in :func:`optaxclip.window_zscore`.
      watch_loss: As in :func:`optaxclip.skip_by`.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.SkipState`, see :func:`optaxclip.skip_by`.

    Raises:
      ValueError: as :func:`optaxclip.window_zscore` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optaxclip.skip_spikes(optax.sgd(1.0), window=8, min_count=4)
      >>> params = jnp.zeros(1)
      >>> state = tx.init(params)
      >>> for grad in [1.0, 1.1, 0.9, 1.0, 1000.0]:
      ...     updates, state = tx.update(jnp.array([grad]), state, params)
      >>> print(updates, state.skip_count)
      [0.] 1

    References:
      OLMo Team, `2 OLMo 2 Furious <https://arxiv.org/abs/2501.00656>`_, 2024
    """
    with _checks.made("skip_spikes"):
        rule = window_zscore(z_threshold, window, min_count)
        return skip_by(
            inner, global_norm, rule, watch_loss=watch_loss, axis_name=axis_name
        )
