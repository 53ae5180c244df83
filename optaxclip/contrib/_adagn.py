"""AdaGN, or GradientStabilizer: norms set to their running mean over their RMS."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel import Norm, clip_by, normalize
from optaxclip._norms import AxisName, leaf_norm
from optaxclip._show import default, shown
from optaxclip._thresholds import Number, like, per_norm
from optaxclip.contrib._weight import weight

PyTree = Any


class AdagnState(NamedTuple):
    """State of :func:`adagn`: for each norm, or one array for several."""

    adagn_count: PyTree  #: how many norms were recorded, int32
    adagn_mean: (
        PyTree  #: running mean of the norms, before its correction for the start
    )
    adagn_rms: PyTree  #: root of the running mean of their squares, before it, too

    __repr__ = shown


def adagn(
    decay: Number = 0.7,
    square_decay: Number = 0.9,
    eps: Number = 1e-8,
    *,
    norm: Norm = default(leaf_norm),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGN: gives every leaf a norm near 1, by running moments of its norms.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) n_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) n_t^2 \\
        g &\leftarrow \frac{g}{n_t} \cdot
        \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    It is Adam on the norm: ``clip_by(leaf_norm, ..., apply=normalize)`` with this
    quotient as the threshold. Small gradients are scaled up, so it changes what a
    learning rate means, except for optimizers like Adam that are invariant to the scale
    of a leaf.

    A spike of any size gets at most the norm
    :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}`, 0.95 with the defaults. But :math:`v`
    remembers it as it was. After one spike of 10,000 times a steady norm, the norms are
    0.70, 0.52 and 0.38, fall to 0.002, and need 166 steps to come back within 10%.

    On the five tasks of the study that it was run on (``docs/choosing.md``), it is at
    most 7.0% worse than the best of nine constants, and nowhere better than
    :func:`optaxclip.clip_by_percentile`.

    Args:
      decay: :math:`\beta_1` in [0, 1).
      square_decay: :math:`\beta_2` in [0, 1).
      eps: :math:`\epsilon \ge 0`, in the units of the norm.
      norm: What to measure.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`; dtypes are kept. In the
      metrics the scale may be above 1, see :func:`optaxclip.normalize`. Norms that are
      0 or not finite are not remembered.

    Raises:
      ValueError: ``decay`` or ``square_decay`` is outside [0, 1), or ``eps`` is
        negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import contrib
      >>> tx = contrib.adagn()
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in [0.02, 0.03, 0.0, 20.0, 0.02]:
      ...     updates, state = tx.update(jnp.array([grad]), state)
      ...     print(f"{updates[0]:.2f}")
      1.00
      1.01
      0.00
      0.75
      0.54

    References:
      Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
      <https://arxiv.org/abs/2502.17055>`_, 2025
    """
    call = "adagn"
    for name, value in (("decay", decay), ("square_decay", square_decay)):
        _checks.check(call, name, value, lambda x: (x >= 0) & (x < 1), "in [0, 1)")
    _checks.non_negative(call, "eps", eps)

    def init_one(norm: jax.Array) -> AdagnState:
        return AdagnState(
            adagn_count=jnp.zeros_like(norm, jnp.int32),
            adagn_mean=jnp.zeros_like(norm, norm.dtype),
            adagn_rms=jnp.zeros_like(norm, norm.dtype),
        )

    def update_one(norm: jax.Array, state: AdagnState) -> tuple[jax.Array, AdagnState]:
        known = jax.lax.stop_gradient(norm)
        recorded = known > 0
        count = jnp.where(
            recorded, optax.safe_increment(state.adagn_count), state.adagn_count
        )
        # A decay near 1 loses digits in float32 that its distance from 1 keeps.
        mean = state.adagn_mean + like(1 - decay, norm) * (known - state.adagn_mean)
        # The root is kept, and taken in units of the larger term: squares overflow.
        unit = jnp.maximum(jnp.maximum(state.adagn_rms, known), like(1e-30, norm))
        past, now = (state.adagn_rms / unit) ** 2, (known / unit) ** 2
        rms = unit * jnp.sqrt(past + like(1 - square_decay, norm) * (now - past))
        new = AdagnState(count, mean, rms)
        new = jax.tree.map(lambda a, b: jnp.where(recorded, a, b), new, state)
        steps = jnp.maximum(count, 1)
        fair_mean = new.adagn_mean / weight(decay, steps, norm)
        fair_rms = new.adagn_rms / jnp.sqrt(weight(square_decay, steps, norm))
        fair_rms += like(eps, norm)
        quotient = fair_mean / jnp.where(count > 0, fair_rms, 1)
        return jnp.where(count > 0, quotient, jnp.inf), new

    rule = per_norm(AdagnState, init_one, update_one)
    return clip_by(norm, rule, apply=normalize, axis_name=axis_name)
