"""The norm-growth limiter of Fira and APOLLO."""

from __future__ import annotations

import optax

from optaxclip import _checks
from optaxclip._kernel import Norm, clip_by
from optaxclip._norms import AxisName, leaf_norm
from optaxclip._show import default
from optaxclip._thresholds import Number, ema


def limit_growth(
    ratio: Number = 1.01,
    floor: Number = 1e-3,
    *,
    norm: Norm = default(leaf_norm),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets a norm grow by at most a given factor from one step to the next.

    .. math:: T_t = \max(\gamma r_{t-1}, \epsilon), \quad r_t = \min(n_t, T_t)

    This is :func:`optaxclip.ema` without averaging: ``ema(ratio, 0.0, warmup=1)``. Fira
    applies it to a residual of a low-rank optimizer. On whole gradients it is not a
    guard against rare events. It starts again from every small norm, so it clips nearly
    every step of a norm that varies: 83, 93 and 96% of lognormal norms with
    log-deviation 0.1, 0.3 and 0.5. After a lasting rise by the factor 10 it takes
    :math:`\ln 10 / \ln 1.01 = 231` steps to follow.

    On the two tasks of the study that it was run on (``docs/choosing.md``), it is at
    most 6.9% worse than the best of nine constants, and nowhere better than
    :func:`optaxclip.clip_by_percentile`.

    Args:
      ratio: :math:`\gamma > 1`, the largest growth in a step.
      floor: :math:`\epsilon \ge 0`, the least threshold, in the units of the norm. The
        published code has none: after one gradient of nearly 0 it holds a norm down
        for :math:`\ln(n / n_0) / \ln \gamma` steps, 1,850 from 1e-8 to 1. With a floor
        it is :math:`\ln(n / \epsilon) / \ln \gamma`.
      norm: What to measure.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`; dtypes are kept. The first
      norm passes, norms that are 0 or not finite are not remembered.

    Raises:
      ValueError: ``ratio`` is not above 1, or ``floor`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import contrib
      >>> tx = contrib.limit_growth(ratio=2.0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in [1.0, 0.0, 1000.0, 1000.0, 3.0]:
      ...     updates, state = tx.update(jnp.array([grad]), state)
      ...     print(updates[0])
      1.0
      0.0
      2.0
      4.0
      3.0

    References:
      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024

      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    with _checks.made("limit_growth"):
        rule = ema(ratio, decay=0.0, warmup=1, floor=floor)
        return clip_by(norm, rule, axis_name=axis_name)
