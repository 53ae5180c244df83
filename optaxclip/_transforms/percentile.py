"""Clips to a percentile of the norms so far."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _checks
from optaxclip._kernel import Norm, clip_by
from optaxclip._norms import AxisName, global_norm
from optaxclip._show import chosen, default
from optaxclip._thresholds import (
    Number,
    Rule,
    Threshold,
    elementwise,
    known,
    lowest,
    quantile,
)


def clip_by_percentile(
    percentile: float = 10.0,
    window: int = default(1000),
    max_norm: Threshold | None = None,
    *,
    factor: Number = 1.5,
    ramp: int = default(100),
    include_current: bool = default(True),
    min_count: int = default(1),
    norm: Norm = default(global_norm),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips to 1.5 times the 10th percentile of the last norms: no threshold to tune.

    .. math:: T_t = c \cdot \min(1, m / R) \cdot P_p(n_{t-N+1}, \dots, n_t), \quad
              g \leftarrow g \cdot \min(1, T_t / n_t)

    where :math:`m \le N` is the number of norms recorded so far, before clipping.

    On the eleven tasks of ``docs/choosing.md`` it is at most 3.3% worse than the
    best of nine constants, and 0.2% on average.

    The defaults come from there, and each has its reason:

    * A low percentile of a long window follows falling norms quickly, within
      ``percentile / 100 * window`` steps (100), and rising norms slowly, within the
      rest of the window (900). A burst of spikes does not raise it.
    * The factor leaves the smaller steps unchanged and shortens the others only a
      little, so that plain SGD keeps most of its learning rate. A spike is clipped to
      the size of an ordinary step.
    * The ramp makes the first steps small. Norms are largest there, and Adam's second
      moment remembers them for :math:`1 / (1 - \beta_2)` steps.

    ``clip_by_percentile(95, factor=1.0, ramp=0, include_current=False)`` only guards
    against spikes: about one ordinary step in twenty is clipped, most of them by
    little. The rule of the Zipformer recipes, twice the median, is
    ``clip_by_percentile(50, 100, factor=2.0, ramp=0, include_current=False)``.

    Args:
      percentile: :math:`p` in [0, 100].
      window: The number :math:`N \ge 1` of norms to look back on.
      max_norm: A cap on the threshold: a number, an array of shape () or a schedule.
      factor: :math:`c`, a positive number that multiplies the percentile. A traced
        one below 0 counts as 0.
      ramp: :math:`R`, the number of norms over which the threshold rises from 0 to its
        full value; 0 means no ramp. A number above ``window`` counts as ``window``.
      include_current: Whether the current norm counts for its own threshold. If not,
        the first step has no threshold except ``max_norm``.
      min_count: The number of norms to record before the percentile is used. Until
        then the threshold is ``max_norm``, or infinite if there is none, so the first
        steps, which the ramp would make small, are not clipped.
      norm: What to measure; :func:`optaxclip.leaf_norm` gives every leaf a window of
        its own.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`, which holds two windows of
      the dtype of the norms; dtypes are kept.

      ==========================  ==================================================
      step                        result
      ==========================  ==================================================
      the first                   scaled to ``factor / ramp`` of itself, 1.5%; without
                                  ``include_current`` clipped by ``max_norm`` only
      a norm of 0                 not clipped and not recorded
      NaN, infinite               not recorded; see :func:`optaxclip.clip_by`
      all norms equal             not clipped, once the ramp is over
      ==========================  ==================================================

    Raises:
      ValueError: ``percentile`` is outside [0, 100], ``window`` is not an integer of
        at least 1, ``min_count`` is not one from 1 to ``window``, ``ramp`` is not one
        of at least 0, ``factor`` is not a finite number above 0, or ``max_norm`` is
        negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_percentile(50, window=100, factor=1.0, ramp=0)
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

      Merad and Gaïffas, `Robust Stochastic Optimization via Gradient Quantile Clipping
      <https://arxiv.org/abs/2309.17316>`_, 2024
    """
    with _checks.made("clip_by_percentile"):
        window, ramp = chosen(window), chosen(ramp)
        _checks.count("quantile", "window", window)
        _checks.count("quantile", "ramp", ramp, least=0)
        rule = quantile(
            _fraction(percentile),
            window,
            include_current=chosen(include_current),
            min_count=min_count,
            ramp=min(ramp, window),
        )
        rule = capped(_multiplied(rule, factor), max_norm)
        return clip_by(norm, rule, axis_name=axis_name)


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
    before SGD the same as a lower learning rate.

    On the eleven tasks of ``docs/choosing.md`` it is at most 9.1% worse than the
    best of nine constants (Lion), and 2.1% on average.

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


def _multiplied(rule: Rule, factor: Number) -> Rule:
    """The rule with its thresholds times a factor; its state is the rule's own."""
    _checks.check(
        "quantile",
        "factor",
        factor,
        lambda x: not x.ndim and 0 < x < np.inf,
        "a number above 0 and below infinity",
    )

    def times(threshold: jax.Array) -> jax.Array:
        # A factor that is scheduled may reach 0, and 0 times no bound is no bound.
        bounded = jnp.maximum(jnp.asarray(factor, threshold.dtype), 0) * threshold
        return jnp.where(jnp.isinf(threshold), threshold, bounded)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        thresholds, state = rule.update(updates, state, params)
        return elementwise(times, thresholds), state

    return known(optax.GradientTransformation(rule.init, update), rule)


def capped(rule: Rule, max_norm: Threshold | None) -> Rule:
    """The rule with a cap on its thresholds, if there is one."""
    if max_norm is None:
        return rule
    _checks.threshold("lowest", "max_norm", max_norm)
    return lowest(rule, max_norm)
