"""What decides on a skip, and the state that remembers it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel.decide import all_of, count_if, decide, unbounded_like
from optaxclip._kernel.measure import Norm, handing_over, initial, measure
from optaxclip._kernel.names import Norms, by_name, stacked, unstacked
from optaxclip._kernel.probe import check_rule
from optaxclip._kernel.states import own
from optaxclip._norms import (
    AxisName,
    along,
    is_gradient,
    same_on_all_devices,
    split,
    varying_axes,
)
from optaxclip._show import chosen, shown
from optaxclip._thresholds import Rule, Threshold, as_rule

PyTree = Any


class SkipMetrics(NamedTuple):
    """What a skip looked at in its last step, as :class:`ClipMetrics` holds it."""

    skip_norm: Norms  #: the norm of the step
    skip_threshold: Norms  #: a step with a norm above it is skipped

    __repr__ = shown


class SkipState(NamedTuple):
    """State of :func:`skip_by`. Counters are int32 scalars and never wrap around."""

    skip_count: jax.Array  #: steps skipped since the start
    skipped_in_a_row: jax.Array  #: steps skipped since the last one that was not
    skip_nonfinite_count: jax.Array  #: those of them with NaN or infinity
    skip_rule_state: PyTree  #: memory of the threshold rule
    skip_metrics: SkipMetrics  #: of the last step
    inner_state: PyTree  #: as the last step that was not skipped left it

    __repr__ = shown


def guard(
    call: str,
    inner: optax.GradientTransformation,
    norm: Norm,
    threshold: Threshold | Rule,
    watch_loss: bool,
    axis_name: AxisName,
) -> Guard:
    """What :func:`skip_by` and :func:`guarded_step` share, its arguments checked."""
    _checks.transformation(call, "inner", inner)
    norm = chosen(norm)
    _checks.function(call, "norm", norm, "of a tree")
    inner = optax.with_extra_args_support(inner)
    rule = as_rule(call, "threshold", threshold)
    call = _checks.call_made(call)
    return Guard(call, inner, along(norm, axis_name), rule, watch_loss)


class Guard(NamedTuple):
    """What decides on a skip, and remembers."""

    call: str  # that the user made
    inner: optax.GradientTransformationExtraArgs
    norm: Norm
    rule: optax.GradientTransformationExtraArgs
    watch_loss: bool

    def init(self, params: PyTree) -> SkipState:
        norms = initial(self._norm(jnp.zeros((), jnp.float32)), params)
        check_rule(self.call, "threshold", self.rule, norms)
        inner_state = self.inner.init(params)
        _refuse_loss_scale(inner_state)
        return SkipState(
            skip_count=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
            skip_nonfinite_count=jnp.zeros((), jnp.int32),
            skip_rule_state=self.rule.init(norms),
            skip_metrics=SkipMetrics(
                skip_norm=jax.tree.map(jnp.zeros_like, stacked(norms)),
                skip_threshold=jax.tree.map(unbounded_like, stacked(norms)),
            ),
            inner_state=inner_state,
        )

    def choose(
        self,
        run: Callable[[PyTree], tuple[PyTree, PyTree]],
        stay: Callable[[PyTree], tuple[PyTree, PyTree]],
        updates: PyTree,
        state: SkipState,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> tuple[PyTree, SkipState]:
        """What ``run(inner_state)`` gives, or on a bad step ``stay(inner_state)``."""
        state = own(SkipState, state)
        gradients = split(updates).gradients
        decision = decide(
            self._norm(extra_args.get("loss")),
            gradients,
            params,
            state.skip_metrics.skip_norm,
            self.rule,
            state.skip_rule_state,
            extra_args,
        )
        finite = decision.finite
        norms, thresholds = decision.kept_norms, decision.kept_thresholds
        good = finite & all_of(operator.le, norms, thresholds)
        measured = decision.place(decision.norms)
        with handing_over(
            self.norm, gradients, measured["grad_norm"] if self.watch_loss else measured
        ):
            result, inner_state = jax.lax.cond(good, run, stay, state.inner_state)
        in_a_row = jnp.where(good, 0, count_if(~good, state.skipped_in_a_row))
        return result, SkipState(
            skip_count=count_if(~good, state.skip_count),
            skipped_in_a_row=in_a_row,
            skip_nonfinite_count=count_if(~finite, state.skip_nonfinite_count),
            skip_rule_state=decision.rule_state,
            skip_metrics=SkipMetrics(norms, thresholds),
            inner_state=inner_state,
        )

    def _norm(self, loss: Any) -> Norm:
        if not self.watch_loss:
            return self.norm
        if loss is None:
            raise ValueError(
                f"`{self.call}(watch_loss=True)` compares losses, but `loss` is None: "
                f"call `{_usage(self.call)}`."
            )
        scalar = same_on_all_devices("loss", loss).astype(jnp.float32)
        return lambda tree: {"grad_norm": measure(self.norm, tree), "loss": scalar}


def _usage(call: str) -> str:
    if call == "guarded_step":
        return "step(updates, params, state, loss=loss)"
    return "update(updates, state, params, loss=loss)"


def _refuse_loss_scale(inner_state: PyTree) -> None:
    def is_loss_scale(node: Any) -> bool:
        return hasattr(node, "overflow_count")

    if any(map(is_loss_scale, jax.tree.leaves(inner_state, is_leaf=is_loss_scale))):
        raise ValueError(
            "A skip must go inside `dynamic_loss_scale`, not around it: a step that "
            "overflows is skipped before the scale can back off. The loss scale skips "
            "such steps by itself."
        )


def not_made(
    run: Callable[[PyTree], tuple[PyTree, PyTree]], updates: PyTree
) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
    """The other branch of a step ``run``: zeros as it would return, the state as is."""

    def stay(inner_state: PyTree) -> tuple[PyTree, PyTree]:
        like, _ = jax.eval_shape(run, inner_state)
        return jax.tree_util.tree_map_with_path(_zeros, updates, like), inner_state

    return stay


def without_loss(state: SkipState) -> SkipState:
    """The state with the metrics of the gradients alone."""
    norms, thresholds = (by_name(unstacked(kept)) for kept in state.skip_metrics)
    others = norms.keys() - {"loss"}
    if others == norms.keys() or not all(
        name == "grad_norm" or name.startswith("grad_norm/") for name in others
    ):
        return state

    def without(values: dict[str, jax.Array]) -> Norms:
        return {name: values[name] for name in sorted(others)}

    return state._replace(skip_metrics=SkipMetrics(without(norms), without(thresholds)))


def _zeros(path: tuple[Any, ...], update: Any, like: Any) -> Any:
    is_integer = jnp.issubdtype(jnp.result_type(update), jnp.integer)
    if is_gradient(path, update) or is_integer:
        return _zeros_like(like)
    return update


def _zeros_like(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros that are sharded, and vary over devices, as what they stand for."""
    # In two steps: JAX refuses the first of a type that varies, on Auto axes.
    bare = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
    zeros = jnp.zeros_like(bare)
    manual = like.manual_axis_type
    missing = (set() if manual is None else {*manual.varying}) - {*varying_axes(zeros)}
    return jax.lax.pcast(zeros, tuple(sorted(missing)), to="varying")
