"""The rule `lowest`: the smallest of several thresholds."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip._thresholds.constant import Rule, Threshold, as_rule
from optaxclip._thresholds.known import known

PyTree = Any


def lowest(*rules: Threshold | Rule) -> optax.GradientTransformationExtraArgs:
    r"""The smallest of several thresholds, norm by norm: a cap on any rule.

    .. math:: T = \min_k T_k

    Args:
      *rules: Rules, or numbers, arrays and schedules, which count as
        :func:`optaxclip.constant`. At least one.

    Returns:
      A rule; its state is the tuple of the states of ``rules``.

    Raises:
      ValueError: no rule is given.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> rule = optaxclip.lowest(optaxclip.constant(2.0), lambda step: 1.0 + step)
      >>> norms = jnp.float32(7.0)
      >>> state = rule.init(norms)
      >>> for _ in range(3):
      ...     thresholds, state = rule.update(norms, state)
      ...     print(thresholds)
      1.0
      2.0
      2.0
    """
    if not rules:
        raise ValueError("`lowest(*rules)` must be given at least one rule, got none.")
    parts = [as_rule("lowest", "rules", rule) for rule in rules]

    def init(params: PyTree) -> tuple[Any, ...]:
        return tuple(part.init(params) for part in parts)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> Any:
        results = [
            part.update(updates, part_state, params, **extra_args)
            for part, part_state in zip(parts, state, strict=True)
        ]
        thresholds, states = zip(*results, strict=True)
        smallest = functools.partial(functools.reduce, jnp.minimum)
        return jax.tree.map(lambda *ts: smallest(ts), *thresholds), states

    return known(optax.GradientTransformationExtraArgs(init, update), *parts)
