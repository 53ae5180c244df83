"""Clips that hold norms to their own running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel import Norm, clip_by, handing_over, measure
from optaxclip._norms import AxisName, along, global_norm, leaf_norm, split
from optaxclip._show import chosen, default
from optaxclip._thresholds import Number, Threshold, ema, zscore
from optaxclip._transforms.fixed import clip_by_global_norm
from optaxclip._transforms.percentile import capped

PyTree = Any


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

    It differs from the published code in what it remembers of a spike, because that
    code never recovers from a lasting rise of the norm. :func:`optaxclip.zscore` has
    the equations, the reason, and the options that give the published recursion. The
    published code also has a ``max_norm`` of 1 by default.

    On the eleven tasks of ``docs/choosing.md`` it is at most 27.0% worse than the
    best of nine constants (a recurrent network under SGD), and 6.4% on average.

    Args:
      z_threshold: :math:`z^* > 0`.
      decay: The decay of the running mean and deviation, in [0, 1).
      warmup: The number of norms to start from. Until then only ``max_norm`` clips.
      max_norm: A cap on the threshold: a number, an array of shape () or a schedule.
      norm: What to measure.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`; dtypes are kept. Norms that
      are 0 or not finite are not remembered.

    Raises:
      ValueError: ``z_threshold`` is not positive, ``decay`` is outside [0, 1),
        ``warmup`` is not an integer of at least 1, or ``max_norm`` is negative.

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
        return clip_by(norm, capped(rule, max_norm), axis_name=axis_name)


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

    For the first ``warmup`` steps, the whole gradient is clipped to a global norm, and
    :math:`\gamma_l` is the smallest norm of the leaf so far. (The AdaGC of
    pytorch_optimizer warms up for 99 steps where this one takes 100.)

    The published form has two limits. The cap lasts ``warmup`` steps, but each leaf
    waits for as many norms above 0, so a leaf that is unfrozen later has no threshold
    for its first ``warmup`` norms. And if norms are far above ``warmup_norm``,
    :math:`\gamma_l` starts at the capped norms and can grow only by a thousandth per
    step: set ``warmup_norm`` to the size of your norms.

    It is not a guard against rare events. It clips norms that vary by 10% in four of
    ten steps, and norms that vary by 30% in seven. Its mean sees clipped norms, so it
    takes at least 690 steps to double. ``clip_by(leaf_norm, optax.chain(quantile(0.5,
    100), optax.scale(2.0)))`` is such a guard.

    On the eleven tasks of ``docs/choosing.md`` it is at most 43.8% worse than the
    best of nine constants (PPO), and 5.4% on average.

    Args:
      ratio: :math:`\lambda > 1`.
      decay: :math:`\beta` in [0, 1).
      warmup: The number of steps to start from. For a leaf, norms of 0 do not count.
      warmup_norm: The largest global norm until then. ``None`` clips nothing in that
        time.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      Two clips in a row, by global norm and by leaf norm, that share one read of the
      gradients. Their state is a dict with the keys ``warmup`` and ``adagc``, which are
      also the prefixes of :func:`optaxclip.metrics`. :func:`optaxclip.record_history`
      needs the name of one of them, such as ``clip="0/adagc"`` if this is the first
      part of a chain. With ``warmup_norm=None``, it is the second clip alone.
      Norms that are 0 (frozen leaves, experts without tokens) or not finite are not
      remembered. In the published form it takes 2,000 steps to recover from 100 steps
      of 0.

    Raises:
      ValueError: ``ratio`` is not above 1, ``decay`` is outside [0, 1),
        ``warmup`` is not an integer of at least 1, or ``warmup_norm`` is negative.

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
    return _global_then_leaf(warmup_clip, clip, along(leaf_norm, axis_name))


def _global_then_leaf(
    warmup: optax.GradientTransformationExtraArgs,
    adagc: optax.GradientTransformationExtraArgs,
    norm: Norm,
) -> optax.GradientTransformationExtraArgs:
    """Two clips, one after the other, that share one read of the gradients.

    The norms of leaves give the global norm. Those after the first clip are what they
    were, times its scale.
    """

    def init(params: PyTree) -> dict[str, Any]:
        return {"warmup": warmup.init(params), "adagc": adagc.init(params)}

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, dict[str, Any]]:
        old: Mapping = state if isinstance(state, Mapping) else {}
        gradients = split(updates).gradients
        norms = measure(norm, gradients)
        first: Any
        with handing_over(norm, gradients, norms):
            updates, first = warmup.update(
                updates, old.get("warmup", state), params, **extra_args
            )
        scale = first.clip_metrics.clip_scale
        norms = jax.tree.map(lambda n: n * scale.astype(n.dtype), norms)
        with handing_over(norm, split(updates).gradients, norms):
            updates, second = adagc.update(
                updates, old.get("adagc", state), params, **extra_args
            )
        return updates, {"warmup": first, "adagc": second}

    return optax.GradientTransformationExtraArgs(init, update)
