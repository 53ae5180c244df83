"""Clips to a percentile of the norms so far."""

from __future__ import annotations

import warnings

import numpy as np
import optax

from optaxclip import _checks
from optaxclip._kernel import Norm, clip_by
from optaxclip._norms import AxisName, global_norm
from optaxclip._show import default
from optaxclip._thresholds import Rule, Threshold, lowest, quantile


def clip_by_percentile(
    percentile: float = 95.0,
    window: int = default(1000),
    max_norm: Threshold | None = None,
    *,
    min_count: int = default(1),
    norm: Norm = default(global_norm),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips to a percentile of the last norms: no threshold to tune.

    .. math:: T_t = P_p(n_{t-1}, \dots, n_{t-N}), \quad
              g \leftarrow g \cdot \min(1, T_t / n_t)

    Norms are recorded as they come, before clipping, so the threshold follows the
    training wherever it goes; the current norm has no say in its own threshold. About
    ``100 - percentile`` percent of ordinary steps are clipped, most of them by little.
    Spikes are clipped to an ordinary norm. The window is a compromise: the threshold
    follows a lasting rise within ``(1 - percentile / 100) * window`` steps, and
    withstands as many spikes in a window.

    Median times k, the rule of the Zipformer recipes, is the same rule with another
    quantile and a factor: ``clip_by(global_norm, optax.chain(quantile(0.5, 100),
    optax.scale(2.0)))``.

    Args:
      percentile: :math:`p` in [0, 100].
      window: The number :math:`N \ge 1` of norms to look back on.
      max_norm: A cap on the threshold: a number, an array of shape () or a schedule.
      min_count: The number of norms to record before the percentile is used. Until
        then the threshold is ``max_norm``, or infinite without one.
      norm: What to measure; :func:`optaxclip.leaf_norm` gives every leaf a window of
        its own.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`, which holds two windows of
      float32; dtypes are kept.

      ==========================  ==================================================
      step                        result
      ==========================  ==================================================
      the first                   clipped by ``max_norm`` only
      a norm of 0                 not clipped and not recorded
      a norm not finite           not recorded; see :func:`optaxclip.clip_by`
      all norms equal             not clipped
      ==========================  ==================================================

    Raises:
      ValueError: ``percentile`` is outside [0, 100], ``window`` is not an integer of
        at least 1, ``min_count`` is not one from 1 to ``window``, or ``max_norm`` is
        negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_percentile(50, window=100)
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in [1.0, 3.0, 2.0, 1000.0]:
      ...     updates, state = tx.update(jnp.array([grad]), state)
      ...     print(updates)
      [1.]
      [1.]
      [2.]
      [2.]

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks <https://arxiv.org/abs/2007.14469>`_, 2020

      Merad and Gaïffas, `Robust Stochastic Optimization via Gradient Quantile Clipping
      <https://arxiv.org/abs/2309.17316>`_, 2024
    """
    with _checks.made("clip_by_percentile"):
        rule = quantile(_fraction(percentile), window, min_count=min_count)
        return clip_by(norm, capped(rule, max_norm), axis_name=axis_name)


def autoclip(
    percentile: float = 10.0,
    window: int = default(10_000),
    max_norm: Threshold | None = None,
    *,
    norm: Norm = default(global_norm),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AutoClip: clips to a low percentile of all norms so far, this one included.

    .. math:: T_t = P_p(n_1, \dots, n_t), \quad
              g \leftarrow g \cdot \min(1, T_t / n_t)

    This is the original as long as the window holds all steps. After that the oldest
    norms are forgotten, which the authors left as future work. (The original divides by
    :math:`n + 10^{-6}`.) At the percentile that they recommend, 10, nine steps in ten
    are clipped. That makes it a normalizer more than a guard: harmless before Adam, and
    before SGD the same as a lower learning rate. :func:`clip_by_percentile` is a guard.

    Args:
      percentile: :math:`p` in [0, 100].
      window: The number of norms to look back on, at least 1.
      max_norm: A cap on the threshold: a number, an array of shape () or a schedule.
      norm: What to measure.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`, which holds two windows of
      float32; dtypes are kept. The first step is clipped by ``max_norm`` only. A norm
      that is 0 or not finite is not recorded: in the original a 0 can clip to 0
      forever, and a NaN turns every later gradient into NaN.

    Raises:
      ValueError: ``percentile`` is outside [0, 100], ``window`` is not an integer of
        at least 1, or ``max_norm`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.autoclip(50)
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in [1.0, 3.0, 2.0, 1000.0]:
      ...     updates, state = tx.update(jnp.array([grad]), state)
      ...     print(updates)
      [1.]
      [2.]
      [2.]
      [2.5]

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks <https://arxiv.org/abs/2007.14469>`_, 2020
    """
    with _checks.made("autoclip"):
        rule = quantile(_fraction(percentile), window, include_current=True)
        return clip_by(norm, capped(rule, max_norm), axis_name=axis_name)


def _fraction(percentile: float) -> float:
    call = _checks.call_made("clip_by_percentile")
    _checks.check(
        call,
        "percentile",
        percentile,
        lambda x: not x.ndim and 0 <= x <= 100,
        "in [0, 100]",
    )
    if isinstance(percentile, float | np.floating) and 0 < percentile < 1:
        warnings.warn(
            f"`{call}(percentile={percentile})` is the {percentile}th percentile of "
            "the norms and clips nearly every step. "
            f"Did you mean {100 * percentile:g}?",
            stacklevel=3,
        )
    return percentile / 100


def capped(rule: Rule, max_norm: Threshold | None) -> Rule:
    """The rule with a cap on its thresholds, if there is one."""
    if max_norm is None:
        return rule
    _checks.threshold("lowest", "max_norm", max_norm)
    return lowest(rule, max_norm)
