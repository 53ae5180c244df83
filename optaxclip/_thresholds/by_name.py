"""The rule `by_name`: norms of different names are held to different thresholds."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._show import shown
from optaxclip._thresholds.constant import Rule, Threshold, as_rule
from optaxclip._thresholds.known import known

PyTree = Any


class ByNameState(NamedTuple):
    """State of :func:`by_name`."""

    named_rules: dict[str, PyTree]  # the state of each rule that was given, by name
    default_rule: PyTree  # the state of the rule for all other norms

    __repr__ = shown


def by_name(
    thresholds: Mapping[str, Threshold | Rule], default: Threshold | Rule = jnp.inf
) -> optax.GradientTransformationExtraArgs:
    """A threshold or a rule for each norm, chosen by the name of the norm.

    Args:
      thresholds: From names to numbers, arrays, schedules or rules. A norm of a leaf
        has the path of the leaf as its name, such as ``"layer_1/kernel"``; one of
        :func:`optaxclip.subtree_norm` has the name of its group.
      default: The threshold or rule for all norms that are not named. ``inf``, the
        default, does not bound them.

    Returns:
      A rule for norms that have names.

    Raises:
      ValueError: ``thresholds`` is not a dict with strings as keys; a concrete number
        is negative or NaN; in ``init``, a name is not the name of a norm, or there is
        one norm only, without a name.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> rule = optaxclip.by_name({"head": 0.1}, default=1.0)
      >>> tx = optaxclip.clip_by(optaxclip.leaf_norm, rule)
      >>> grads = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([3.0, 4.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["body"], updates["head"])
      [0.6 0.8] [0.06 0.08]
    """
    return rule_by_name("by_name", "thresholds", thresholds, default)


def rule_by_name(
    call: str,
    argument: str,
    thresholds: Mapping[str, Threshold | Rule],
    default: Threshold | Rule = jnp.inf,
) -> optax.GradientTransformationExtraArgs:
    """:func:`by_name` as a part of ``call``, whose errors name ``argument``."""
    is_mapping = isinstance(thresholds, Mapping)
    if not is_mapping or not all(isinstance(name, str) for name in thresholds):
        rule = "a dict from names to thresholds or rules"
        _checks.refused(call, argument, rule, thresholds)
    rules = {name: as_rule(call, argument, thresholds[name]) for name in thresholds}
    rest = as_rule(call, "default", default)
    parted = functools.partial(_parted, call, argument, rules)

    def init(params: PyTree) -> ByNameState:
        named, others = parted(params)
        states = {name: rules[name].init(norm) for name, norm in named.items()}
        return ByNameState(states, rest.init(others))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, ByNameState]:
        named, others = parted(updates)
        of_named, of_others = (None,) * 2 if params is None else parted(params)
        bounds, other_state = rest.update(
            others, state.default_rule, of_others, **extra_args
        )
        result, states = {**bounds}, {}  # type: ignore[misc]  # a dict, as `others` is
        for name, norm in named.items():
            of_name = None if of_named is None else of_named[name]
            result[name], states[name] = rules[name].update(
                norm, state.named_rules[name], of_name, **extra_args
            )
        return result, ByNameState(states, other_state)

    rule = optax.GradientTransformationExtraArgs(init, update)
    return known(rule, rest, *rules.values())


def _parted(
    call: str, argument: str, rules: Mapping[str, Any], norms: Any
) -> tuple[dict, dict]:
    """The norms that have a rule of their own, and the others."""
    names = sorted(norms) if isinstance(norms, Mapping) else []
    if missing := sorted(rules.keys() - set(names)):
        raise ValueError(
            f"`{call}({argument}=...)` must have names of norms, got {missing}; "
            + (f"the norms are {names}." if names else "the only norm has no name.")
        )
    named: dict[str, jax.Array] = {name: norms[name] for name in sorted(rules)}
    return named, {name: norms[name] for name in names if name not in rules}
