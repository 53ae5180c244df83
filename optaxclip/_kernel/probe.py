"""Refusing other transformations in place of a rule: they zero every gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from optaxclip._kernel.names import Separate
from optaxclip._thresholds import KnownRule

PyTree = Any


def check_rule(
    call: str,
    argument: str,
    rule: optax.GradientTransformationExtraArgs,
    norms: Separate,
) -> None:
    """Refuses a clip, a skip or an optimizer in place of a rule.

    A rule maps norms to thresholds. An optimizer maps them to updates, which have the
    opposite sign, and negative thresholds count as 0.
    """
    if isinstance(rule, KnownRule):
        return
    state: PyTree = jax.eval_shape(rule.init, norms)
    if any(map(_is_own, jax.tree.leaves(state, is_leaf=_is_own))):
        got = "a clip or a skip"
    elif not _has_schedule(state) and _is_negative(rule, norms):
        got = "one whose thresholds are negative, as the updates of an optimizer are"
    else:
        return
    raise ValueError(
        f"`{call}({argument}=...)` must be a number, a schedule or a rule from "
        f"norms to thresholds, such as `optaxclip.quantile(0.95)`, got {got}: "
        "transformations of gradients go into `optax.chain`, next to the clip."
    )


def _is_own(node: Any) -> bool:
    return hasattr(node, "clip_count") or hasattr(node, "skip_count")


def _has_schedule(state: PyTree) -> bool:
    """Whether a threshold is a schedule, which may be negative and then counts as 0."""

    def is_schedule(node: Any) -> bool:
        return hasattr(node, "schedule_step")

    return any(map(is_schedule, jax.tree.leaves(state, is_leaf=is_schedule)))


def _is_negative(rule: optax.GradientTransformationExtraArgs, norms: Separate) -> bool:
    """Whether a norm of 1 gets a threshold below 0, as far as that can be told."""
    one: Any = np.ones((), np.float32)
    told = _of(rule, one)
    if told is None and isinstance(norms, Mapping):  # it may need the names
        told = _of(rule, dict.fromkeys(norms, one))
    return bool(told)


def _of(rule: optax.GradientTransformationExtraArgs, ones: PyTree) -> bool | None:
    """Whether some of these norms gets a threshold below 0; None for an error."""

    def thresholds_of(ones: PyTree) -> PyTree:
        return rule.update(ones, rule.init(ones), ones)[0]

    try:  # as one program: op by op, it would be dozens
        thresholds = jax.jit(thresholds_of).lower(ones).compile()(ones)
        return any(np.all(np.asarray(x) < 0) for x in jax.tree.leaves(thresholds))
    except Exception:  # names, extra arguments, traced numbers, no devices
        return None
