"""The rule `constant`: a threshold that does not look at the norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._show import shown
from optaxclip._thresholds.known import Rule as Rule
from optaxclip._thresholds.known import known

PyTree = Any
Threshold = jax.typing.ArrayLike | optax.Schedule


class ScheduleState(NamedTuple):
    """State of :func:`constant` on a schedule."""

    schedule_step: jax.Array  # int32 scalar: how often the schedule was asked

    __repr__ = shown


def constant(value: Threshold) -> optax.GradientTransformation:
    r"""The same threshold for every norm: a number, an array or a schedule.

    .. math:: T_t = v \quad\text{or}\quad T_t = v(t), \; t = 0, 1, \dots

    Args:
      value: A non-negative number; an array that broadcasts against every norm; or a
        schedule ``step -> number``, called with the number of earlier updates. Steps
        with a norm that is not finite do not count. A traced or scheduled number
        that is negative clips as 0 does.

    Returns:
      A rule, that is, a transformation from norms to thresholds of their shapes and
      dtypes.

    Raises:
      ValueError: ``value`` is a concrete negative number or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> rule = optaxclip.constant(2.0)
      >>> norms = jnp.float32(7.0)
      >>> thresholds, state = rule.update(norms, rule.init(norms))
      >>> print(thresholds)
      2.0
    """
    _checks.threshold("constant", "value", value)
    if callable(value):
        return _scheduled(value)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> Any:
        del params
        return _filled_like(updates, value), state

    return known(optax.GradientTransformation(optax.init_empty_state, update))


def as_rule(
    call: str, argument: str, threshold: Threshold | Rule
) -> optax.GradientTransformationExtraArgs:
    """A rule as it is; a number, an array or a schedule as a :func:`constant`."""
    if not isinstance(threshold, optax.GradientTransformation):
        _checks.threshold(call, argument, threshold)
        threshold = constant(threshold)
    return optax.with_extra_args_support(threshold)


def _scheduled(schedule: Callable) -> optax.GradientTransformation:
    def init(params: PyTree) -> ScheduleState:
        del params
        return ScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> Any:
        del params
        thresholds = _filled_like(updates, schedule(state.schedule_step))
        step = jnp.asarray(optax.safe_increment(state.schedule_step))
        return thresholds, ScheduleState(step)

    return known(optax.GradientTransformation(init, update))


def _filled_like(norms: PyTree, value: jax.typing.ArrayLike) -> PyTree:
    array = jnp.asarray(float(value) if isinstance(value, int) else value)

    def fill(norm: jax.Array) -> jax.Array:
        if not array.ndim:
            return jnp.full_like(norm, array.astype(norm.dtype))
        if not _checks.broadcasts(array.shape, norm.shape):
            raise ValueError(
                "A threshold must broadcast against every norm, got an array of shape "
                f"{array.shape} for a norm of shape {norm.shape}."
            )
        value = jnp.broadcast_to(array.astype(norm.dtype), norm.shape)
        return jnp.zeros_like(norm) + value

    return jax.tree.map(fill, norms)
