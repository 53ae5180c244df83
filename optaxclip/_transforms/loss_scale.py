"""Dynamic loss scaling: gradients in 16 bits that neither vanish nor overflow for long.

The smallest float16 is 6e-8, and most gradients of a deep network are smaller. With a
loss that is multiplied by 2**15 they are not. They have to be divided again, in float32
and before anything looks at them, and steps that overflow have to be dropped. Both are
done here, around the optimizer, which sees true gradients and never a bad one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel import (
    count_if,
    handing_over,
    measure,
    not_made,
    own,
)
from optaxclip._norms import (
    AxisName,
    accumulator,
    along,
    global_norm,
    scaled,
    split,
    widen,
)
from optaxclip._show import chosen, default
from optaxclip._thresholds import Number
from optaxclip._transforms.scale_state import LossScaleState, warn_if_unknown

PyTree = Any

_SMALLEST, _LARGEST = 2.0**-126, 2.0**126  # whose inverses are normal float32, too
_FOREVER = 2**31 - 1  # steps: where the counters end


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    init_scale: Number = 2.0**15,
    growth_interval: int = default(2000),
    growth_factor: Number = 2.0,
    backoff_factor: Number = 0.5,
    min_scale: Number = 1.0,
    max_scale: Number = 2.0**24,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients of a scaled loss by the scale, and finds a scale that fits.

    .. math:: (u, x, s) \leftarrow \begin{cases}
              (\mathrm{inner}(g / s,\, x),\; \min(c s, s_{max})) &
              \|g\| \text{ finite, for the } kN\text{th time in a row} \\
              (\mathrm{inner}(g / s,\, x),\; s) & \|g\| \text{ finite} \\
              (0,\, x,\, \max(b s, s_{min})) & \text{else}\end{cases}

    for a state :math:`x` of ``inner`` and :math:`k = 1, 2, \dots`. Multiply the loss
    by :func:`loss_scale`, in float32, and pass the gradients as they are. Put this
    transformation outermost: every clip, rule and accumulator inside then sees true
    gradients in float32, and no step that overflowed. bfloat16 has the range of float32
    and needs no loss scale.

    The gradients are divided whether or not the loss was multiplied. If nothing in the
    process has called :func:`loss_scale` by the first update, a warning says so.

    Args:
      inner: The whole optimizer: clips, ``optax.MultiSteps``, :func:`skip_spikes`.
      init_scale: The first :math:`s`. The default is the largest power of two that
        float16 can hold, which the derivative of a float16 loss has to fit.
      growth_interval: :math:`N \ge 1`: the scale grows after this many steps without an
        overflow. At 2000, the usual value, one step in 2000 is lost to find out that a
        larger scale does not fit.
      growth_factor: :math:`c > 1`.
      backoff_factor: :math:`b` in (0, 1).
      min_scale: :math:`s_{min}`, at least 2**-126.
      max_scale: :math:`s_{max}`, at most 2**126. Powers of two for all five change no
        bit of a gradient but its exponent. Equal to ``min_scale``: a fixed scale.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`LossScaleState`. ``inner`` gets gradients and
      parameters as float32 where they have 16 bits or fewer, at ``init`` too, so that
      its moments are float32; float64 stays. What it returns is returned as it is:
      ``optax.apply_updates`` adds float32 to the parameters and rounds once, to their
      dtype. Leaves that are not gradients pass through to ``inner`` unscaled.

      ==========================  ==================================================
      gradients                   result
      ==========================  ==================================================
      finite                      what ``inner`` returns
      an infinity or a NaN        zeros; ``inner_state`` bit for bit what it was, as
                                  after a skip of :func:`skip_by`; a smaller scale
      the same at ``min_scale``   the same; the scale stays
      zero, or an empty tree      finite: what ``inner`` returns
      ==========================  ==================================================

      A NaN that comes from a bad batch and not from an overflow also lowers the scale;
      it does no other harm. Do not put this transformation inside
      :func:`skip_nonfinite` or ``optax.apply_if_finite``, where the scale could never
      come down, or inside ``optax.MultiSteps``, whose accumulator would keep the
      infinity. Put ``MultiSteps`` inside; the other two are not needed.

    Raises:
      ValueError: ``init_scale`` is not within ``min_scale`` and ``max_scale``, these
        are not within 2**-126 and 2**126, ``growth_interval`` is not an integer of at
        least 1, ``growth_factor`` not above 1, or ``backoff_factor`` outside (0, 1).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optaxclip.dynamic_loss_scale(
      ...     optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(1.0)),
      ...     growth_interval=2,
      ... )
      >>> params = jnp.zeros(1, jnp.float16)
      >>> state = tx.init(params)
      >>> for _ in range(5):
      ...     scale = optaxclip.loss_scale(state)
      ...     loss = lambda p: scale * jnp.sum(4 * p).astype(jnp.float32)
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     print(f"{scale:.0f} {updates} {state.overflow_count}")
      32768 [0.] 1
      16384 [0.] 2
      8192 [-1.] 2
      8192 [-1.] 2
      16384 [0.] 3

    References:
      Micikevicius et al., `Mixed Precision Training
      <https://arxiv.org/abs/1710.03740>`_, 2017
    """
    _checks.transformation("dynamic_loss_scale", "inner", inner)
    growth_interval = chosen(growth_interval)
    _check_arguments(
        init_scale, growth_interval, growth_factor, backoff_factor, min_scale, max_scale
    )
    inner = optax.with_extra_args_support(inner)
    norm = along(global_norm, axis_name)

    def init(params: PyTree) -> LossScaleState:
        return LossScaleState(
            loss_scale=like(init_scale),
            steps_since_overflow=jnp.zeros((), jnp.int32),
            overflow_count=jnp.zeros((), jnp.int32),
            inner_state=inner.init(_widened(params)),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, LossScaleState]:
        state = own(LossScaleState, state)
        warn_if_unknown()
        scale = state.loss_scale
        size = measure(norm, split(updates).gradients)
        good = jnp.isfinite(size)

        # Divides within the conditional, which else would be handed a float32 copy.
        def run(inner_state: PyTree) -> tuple[PyTree, PyTree]:
            true = _divided(updates, scale)
            true_size = size / scale.astype(size.dtype)
            with handing_over(norm, split(true).gradients, true_size):
                return inner.update(true, inner_state, _widened(params), **extra_args)

        stay = not_made(run, updates)
        result, inner_state = jax.lax.cond(good, run, stay, state.inner_state)
        steps = jnp.where(good, count_if(good, state.steps_since_overflow), 0)
        return result, LossScaleState(
            loss_scale=adjusted(scale, good, steps),
            steps_since_overflow=steps,
            overflow_count=count_if(~good, state.overflow_count),
            inner_state=inner_state,
        )

    def like(number: Number) -> jax.Array:
        return jnp.asarray(number, jnp.float32)

    def adjusted(scale: jax.Array, good: jax.Array, steps: jax.Array) -> jax.Array:
        larger = jnp.minimum(scale * like(growth_factor), like(max_scale))
        smaller = jnp.maximum(scale * like(backoff_factor), like(min_scale))
        is_time = steps % min(growth_interval, _FOREVER) == 0
        return jnp.where(good, jnp.where(is_time, larger, scale), smaller)

    return optax.GradientTransformationExtraArgs(init, update)


def _divided(updates: PyTree, scale: jax.Array) -> PyTree:
    """The gradients divided by the scale, in float32 or wider."""

    def divide(leaf: jax.Array) -> jax.Array:
        wide = scale.astype(accumulator(leaf.dtype))
        return scaled(leaf, 1 / wide)

    gradients, restore = split(updates)
    return restore(jax.tree.map(divide, gradients))


def _widened(tree: PyTree) -> PyTree:
    """The tree with its float leaves in float32 or wider."""
    gradients, restore = split(tree)
    return restore(
        jax.tree.map(lambda leaf: widen(leaf, accumulator(leaf.dtype)), gradients)
    )


def _check_arguments(
    init_scale: Number,
    growth_interval: int,
    growth_factor: Number,
    backoff_factor: Number,
    min_scale: Number,
    max_scale: Number,
) -> None:
    def check(argument: str, value: Number, holds: Callable, rule: str) -> None:
        _checks.check("dynamic_loss_scale", argument, value, holds, rule)

    def check_within(
        argument: str, value: Number, low: Any, high: Any, rule: str
    ) -> None:
        if not any(isinstance(bound, jax.core.Tracer) for bound in (low, high)):
            check(argument, value, lambda x: (x >= low) & (x <= high), rule)

    rule = "between 2**-126 and 2**126"
    check_within("min_scale", min_scale, _SMALLEST, _LARGEST, rule)
    rule = "between `min_scale` and 2**126"
    check_within("max_scale", max_scale, min_scale, _LARGEST, rule)
    rule = "between `min_scale` and `max_scale`"
    check_within("init_scale", init_scale, min_scale, max_scale, rule)
    _checks.count("dynamic_loss_scale", "growth_interval", growth_interval)
    check("growth_factor", growth_factor, lambda x: x > 1, "above 1")
    is_share = "above 0 and below 1"
    check("backoff_factor", backoff_factor, lambda x: (x > 0) & (x < 1), is_share)
