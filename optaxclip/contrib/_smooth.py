"""A clip without a corner."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel import Norm, Scaling, clip_by, is_unbounded
from optaxclip._norms import AxisName, global_norm
from optaxclip._show import default
from optaxclip._thresholds import Rule, Threshold


@Scaling
def _smooth(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """1 / (1 + norm / threshold), 1 for 0 / 0 and where nothing bounds."""
    as_is = is_unbounded(threshold) | (norm == 0)
    bound = jnp.where(as_is | (threshold == 0), 1, threshold)
    scale = 1 / (1 + jnp.where(as_is, 0, norm / bound))
    return jnp.where((threshold == 0) & ~as_is, 0, scale)


def smooth_clip(
    threshold: Threshold | Rule,
    *,
    norm: Norm = default(global_norm),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens every norm, more the larger it is, and keeps it below the threshold.

    .. math:: g \leftarrow \frac{g}{1 + \|g\| / T}, \quad
              \|g\| \mapsto \frac{\|g\|}{1 + \|g\| / T} < T

    The norm after it grows with the norm before it, without a corner at the threshold.
    It shortens small gradients, too: a norm at the threshold is halved, and one of a
    tenth of it becomes 9% smaller.

    On the two tasks of the study that it was run on (``docs/choosing.md``), it is at
    most 1.0% worse than the best of nine constants, and nowhere better than
    :func:`optaxclip.clip_by_percentile`. It is about as good there as
    :func:`optaxclip.clip_by_global_norm` with the same threshold.

    Args:
      threshold: :math:`T`: a number, an array, a schedule or a rule, as in
        :func:`optaxclip.clip_by`.
      norm: What to measure.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`; dtypes are kept.
      ``clip_count`` counts every update whose norm it made smaller: nearly all.

      =======================  =======================================================
      norm                     result
      =======================  =======================================================
      0                        zeros
      any, infinite threshold  the updates, bit for bit
      above 0, threshold 0     zeros
      infinite, NaN            as in :func:`optaxclip.clip_by`
      =======================  =======================================================

    Raises:
      ValueError: ``threshold`` is a concrete negative number or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import contrib
      >>> tx = contrib.smooth_clip(1.0)
      >>> for norm in [0.1, 1.0, 1000.0]:
      ...     updates, _ = tx.update(jnp.array([norm]), tx.init(jnp.zeros(1)))
      ...     print(f"{norm:6} {updates[0]:.3f}")
         0.1 0.091
         1.0 0.500
      1000.0 0.999
    """
    with _checks.made("smooth_clip"):
        return clip_by(norm, threshold, apply=_smooth, axis_name=axis_name)
