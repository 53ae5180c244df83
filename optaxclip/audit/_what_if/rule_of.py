"""The rule inside a clip, got at from outside."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from optaxclip._kernel import ClipState, NamedNorms, SkipState, find, is_unbounded
from optaxclip._thresholds import Rule, Threshold, as_rule


def rule_of(call: str, rule: Threshold | Rule) -> optax.GradientTransformationExtraArgs:
    """A threshold or a rule as a rule; of a clip, the rule that it asks.

    A number is a gradient whose norm is its size. So a clip of such a gradient shows
    which threshold the clip's rule gives for that norm.
    """
    given = as_rule(call, "rule", rule)
    norm = jnp.zeros((), jnp.float32)
    state: Any = jax.eval_shape(given.init, norm)
    if not [*find.find(state, ClipState), *find.find(state, SkipState)]:
        return given
    of_two: Any = jax.eval_shape(given.init, (norm, norm))
    is_clip = isinstance(of_two, ClipState)
    if not is_clip or isinstance(of_two.clip_metrics.grad_norm, NamedNorms):
        raise ValueError(
            f"`{call}(rule=...)` must be a rule or a clip of the global norm, got a "
            f"transformation with the state {find.kinds(state)}: pass the clip without "
            "the skip or the optimizer around it, and for a clip of each parameter's "
            "norm pass its rule, such as `optaxclip.quantile(0.95)`."
        )

    start: Any = given.init  # which makes the state of the whole clip

    def init(params: Any) -> Any:
        return start(params).rule_state

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        clip = start(updates)._replace(rule_state=state)
        _, clip = cast(Any, given.update(updates, clip, params))
        threshold = clip.clip_metrics.clip_threshold
        threshold = jnp.where(is_unbounded(threshold), jnp.inf, threshold)
        if threshold.shape != updates.shape:
            raise ValueError(
                f"`{call}(norms=...)` must have the shape (steps,) for a clip of the "
                "global norm, got norms of several parameters: pass the clip's rule."
            )
        return threshold, clip.rule_state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
