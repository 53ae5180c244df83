"""The named clips that choose their own threshold."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _checks
from optaxclip._kernel import Norm, clip_by
from optaxclip._norms import (
    AxisName,
    global_norm,
    leaf_norm,
)
from optaxclip._show import chosen, default
from optaxclip._thresholds import (
    Number,
    Rule,
    Threshold,
    ema,
    lowest,
    quantile,
    zscore,
)
from optaxclip._transforms.fixed import clip_by_global_norm

PyTree = Any


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
    ``100 - percentile`` percent of ordinary steps are clipped, most of them by little,
    and spikes down to an ordinary norm. The window is a compromise: a lasting rise is
    followed within ``(1 - percentile / 100) * window`` steps, and as many spikes in a
    window are withstood.

    Median times k, the rule of the Zipformer recipes, is the same rule with another
    quantile and a factor: ``clip_by(global_norm, optax.chain(quantile(0.5, 100),
    optax.scale(2.0)))``.

    Args:
      percentile: :math:`p` in [0, 100].
      window: The number :math:`N \ge 1` of norms to look back on.
      max_norm: A cap on the threshold: a number, an array of shape () or a schedule.
      min_count: Until so many norms are recorded the threshold is ``max_norm``, or
        infinite without one.
      norm: What to measure; :func:`optaxclip.leaf_norm` gives every leaf a window of
        its own.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`, two windows of float32 large;
      dtypes are kept.

      ==========================  ==================================================
      step                        result
      ==========================  ==================================================
      the first                   not clipped, but for ``max_norm``
      a norm of 0                 not clipped and not recorded
      a norm not finite           not recorded; see :func:`optaxclip.clip_by`
      all norms equal             not clipped
      ==========================  ==================================================

    Raises:
      ValueError: ``percentile`` is outside [0, 100], ``window`` is no integer of at
        least 1, ``min_count`` none from 1 to ``window``, or ``max_norm`` is negative.

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
        return clip_by(norm, _capped(rule, max_norm), axis_name=axis_name)


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

    The original, as long as steps do not outnumber the window; then the oldest norms
    are forgotten, which the authors left as future work. (Theirs divides by
    :math:`n + 10^{-6}`.) At the percentile that they recommend, 10, nine steps in ten
    are clipped: a normaliser more than a guard, harmless before Adam and a lower
    learning rate before SGD. :func:`clip_by_percentile` is the guard.

    Args:
      percentile: :math:`p` in [0, 100].
      window: The number of norms to look back on, at least 1.
      max_norm: A cap on the threshold: a number, an array of shape () or a schedule.
      norm: What to measure.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`, two windows of float32 large;
      dtypes are kept. The first step is not clipped. A norm of 0 or not finite is not
      recorded: in the original a 0 can clip to 0 for ever, and a NaN turns every later
      gradient into NaN.

    Raises:
      ValueError: ``percentile`` is outside [0, 100], ``window`` is no integer of at
        least 1, or ``max_norm`` is negative.

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
        return clip_by(norm, _capped(rule, max_norm), axis_name=axis_name)


def zclip(
    z_threshold: Number = 2.5,
    decay: Number = 0.97,
    warmup: int = default(25),
    max_norm: Threshold | None = None,
    *,
    norm: Norm = default(global_norm),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ZClip: clips norms that lie many standard deviations above their running mean.

    .. math:: T_t = \mu_t + z^{*2} \sigma_t^2 / (n_t - \mu_t) \quad\text{where }
              n_t > \mu_t + z^* \sigma_t

    Differs from the published code in what it remembers of a spike, without which a
    lasting rise of the norm locks that code for ever; :func:`optaxclip.zscore` has the
    equations, the reason and the options for the published recursion, which takes a
    ``max_norm`` of 1 by default, too.

    Args:
      z_threshold: :math:`z^* > 0`.
      decay: Of the running mean and deviation, in [0, 1).
      warmup: The number of norms to start from; not clipped but for ``max_norm``.
      max_norm: A cap on the threshold: a number, an array of shape () or a schedule.
      norm: What to measure.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`; dtypes are kept. Norms of 0
      or not finite are not remembered.

    Raises:
      ValueError: ``z_threshold`` is not positive, ``decay`` outside [0, 1), ``warmup``
        no whole number of at least 1, or ``max_norm`` negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.zclip(warmup=4)
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in [1.0, 1.1, 0.9, 1.0, 1000.0, 1.05]:
      ...     updates, state = tx.update(jnp.array([grad]), state)
      >>> print(f"{updates[0]:.2f} {state.clip_count}")
      1.05 1

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    with _checks.made("zclip"):
        rule = zscore(z_threshold, decay, warmup)
        return clip_by(norm, _capped(rule, max_norm), axis_name=axis_name)


def adagc(
    ratio: Number = 1.05,
    decay: Number = 0.98,
    warmup: int = default(100),
    warmup_norm: float | None = 1.0,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGC: clips every leaf to a little above its own running mean.

    .. math:: g_l \leftarrow g_l \cdot \min(1, \lambda \gamma_l / \|g_l\|), \quad
              \gamma_l \leftarrow \beta \gamma_l + (1 - \beta) \min(\|g_l\|,
              \lambda \gamma_l)

    Before that, for ``warmup`` steps, the whole gradient is clipped to a global norm
    and :math:`\gamma_l` is the least norm of the leaf so far. The AdaGC of
    pytorch_optimizer warms up for one step less: 99 where this one takes 100.

    Two limits of the published form. The cap lasts ``warmup`` steps, but each leaf
    waits for as many norms above 0: one that unfreezes later has no threshold for its
    first. And where norms are far above ``warmup_norm``, :math:`\gamma_l` starts at the
    capped ones and can grow by a thousandth a step: set ``warmup_norm`` to their size.

    It is no guard against rare events: norms that vary by 10 % are clipped in four of
    ten steps, by 30 % in seven, and a mean that is fed clipped norms doubles in 690
    steps at best. ``clip_by(leaf_norm, optax.chain(quantile(0.5, 100),
    optax.scale(2.0)))`` is one.

    Args:
      ratio: :math:`\lambda > 1`.
      decay: :math:`\beta` in [0, 1).
      warmup: The number of steps to start from; per leaf, norms of 0 not counted.
      warmup_norm: The global norm until then. ``None`` clips nothing in that time, and
        saves a second read of the gradients.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A chain of a clip by global norm, ``warmup``, and one by leaf norm, ``adagc``, by
      whose names :func:`optaxclip.metrics` tells them apart: their states are a dict;
      without ``warmup_norm`` the second alone. Norms of 0 (frozen leaves, experts
      without tokens) or not finite are not remembered; in the published form 100
      steps of 0 take 2,000 to recover from.

    Raises:
      ValueError: ``ratio`` is not above 1, ``decay`` outside [0, 1), ``warmup`` no
        whole number of at least 1, or ``warmup_norm`` negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.adagc(ratio=2.0, warmup=2, warmup_norm=None)
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in [1.0, 1.5, 1000.0]:
      ...     updates, state = tx.update(jnp.array([grad]), state)
      >>> print(updates)
      [2.]

    References:
      Wang et al., `AdaGC: Improving Training Stability for Large Language Model
      Pretraining <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    warmup = chosen(warmup)
    with _checks.made("adagc"):
        clip = clip_by(leaf_norm, ema(ratio, decay, warmup), axis_name=axis_name)
    if warmup_norm is None:
        return clip
    _checks.non_negative("adagc", "warmup_norm", warmup_norm)

    def cap(step: jax.typing.ArrayLike) -> jax.Array:
        return jnp.where(jnp.asarray(step) < warmup, warmup_norm, jnp.inf)

    warmup_clip = clip_by_global_norm(cap, axis_name=axis_name)
    return _named_chain(warmup=warmup_clip, adagc=clip)


def _named_chain(
    **transforms: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """``optax.named_chain`` whose state is a plain dict; Flax saves no ordered one."""
    chained = optax.named_chain(*transforms.items())

    def init(params: PyTree) -> dict[str, Any]:
        state: Any = chained.init(params)
        return dict(state)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, dict[str, Any]]:
        updates, state = chained.update(updates, state, params, **extra_args)
        return updates, dict(state)

    return optax.GradientTransformationExtraArgs(init, update)


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


def _capped(rule: Rule, max_norm: Threshold | None) -> Rule:
    if max_norm is None:
        return rule
    _checks.threshold("lowest", "max_norm", max_norm)
    return lowest(rule, max_norm)
