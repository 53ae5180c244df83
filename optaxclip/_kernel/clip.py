"""The kernel: measure, decide, apply, record.

Every clip of the package is a call of ``clip_by(norm, threshold, apply)``. What is
guaranteed here once holds for every clip.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel.apply import Apply, rescale, scale_of
from optaxclip._kernel.decide import (
    Decision,
    all_of,
    count_if,
    decide,
    unbounded_like,
)
from optaxclip._kernel.measure import Norm, initial
from optaxclip._kernel.names import Norms, computed_once, stacked
from optaxclip._kernel.probe import check_rule
from optaxclip._kernel.states import own
from optaxclip._norms import AxisName, along, prefix_of, split
from optaxclip._show import chosen, default, shown
from optaxclip._thresholds import Rule, Threshold, as_rule

PyTree = Any


class ClipMetrics(NamedTuple):
    """What a clip did in its last step: arrays, or arrays by the names of norms."""

    grad_norm: Norms  #: the norm of the updates before clipping
    clip_threshold: Norms  #: the bound; the largest finite number if there is none
    #: what they were multiplied by, min(1, threshold / norm) unless `apply` has its own
    clip_scale: Norms

    __repr__ = shown


class ClipState(NamedTuple):
    """State of :func:`clip_by`. Counters are int32 scalars and never wrap around."""

    step_count: jax.Array  #: updates so far
    clip_count: jax.Array  #: updates in which a finite norm was made smaller
    #: updates with a norm that was NaN, infinite, or 1e37 times its threshold
    nonfinite_count: jax.Array
    rule_state: PyTree  #: memory of the threshold rule
    clip_metrics: ClipMetrics  #: of the last update

    __repr__ = shown


def clip_by(
    norm: Norm,
    threshold: Threshold | Rule,
    apply: Apply = default(rescale),
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates whose norm exceeds a threshold.

    .. math:: g \leftarrow g \cdot \min(1, T / \|g\|)

    Three choices are independent: which norm (global, of each leaf, of each unit), how
    the threshold is chosen, and how it is enforced. Each named clip is one combination.

    Args:
      norm: A function from a tree of gradients to a prefix tree of norms: each norm
        is broadcast against the leaves below it.
      threshold: A number, an array or a schedule (see :func:`optaxclip.constant`), or
        a rule: an ``optax.GradientTransformation`` from norms to thresholds, whose
        ``params`` are the norms of the parameters. It sees a single norm as an array
        and several as a dict by path. Rules compose:
        ``optax.chain(rule, optax.scale(2.0))`` doubles a threshold.
      apply: How: :func:`rescale` (the default), :func:`clamp`, :func:`normalize`, a
        :class:`Scaling`, or any function ``(threshold, scale) -> (leaf -> leaf)``.
      axis_name: Which leaves are sharded, where JAX's types cannot tell. Passed on to
        ``norm``, see :func:`optaxclip.global_norm`.

    Returns:
      A transformation with :class:`ClipState`. It keeps the structure, shapes, dtypes
      and shardings of the updates. Norms, thresholds and scales are float32 (float64
      for float64 leaves), and updates are rounded once, to their own dtype.

      ==========================  ==================================================
      norm                        result
      ==========================  ==================================================
      at most the threshold       the updates, bit for bit
      0, threshold 0              zeros
      above 0, threshold 0        zeros
      infinite                    as in optax: zeros, and NaN for infinite elements
      NaN                         as in optax: NaN in every leaf under this norm
      of an empty tree            the empty tree; its norm is 0
      ==========================  ==================================================

      A norm that is not finite leaves the memory of the rule as it was before the step.
      Integer, ``float0`` and PRNG-key leaves, and the fp8 statistics of Flax, pass
      through and are not counted.

    Raises:
      ValueError: ``norm`` is not a function; or, in ``update``, the updates have leaves
        or shapes that the parameters given to ``init`` did not have.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by(optaxclip.leaf_norm, 1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], updates["b"])
      [0.6 0.8] [0.5]
    """
    norm, apply = chosen(norm), chosen(apply)
    if not callable(norm):
        hint = "`optax.inject_hyperparams` needs `norm` in its `static_args`"
        _checks.refused("clip_by", "norm", "a function of a tree", norm, hint)
    _checks.function("clip_by", "apply", apply, "such as `optaxclip.clamp`")
    rule, norm = as_rule("clip_by", "threshold", threshold), along(norm, axis_name)
    told = _checks.call_made("clip_by"), _checks.argument_given("threshold")

    def init(params: PyTree) -> ClipState:
        norms = initial(norm, params)
        check_rule(*told, rule, norms)
        return ClipState(
            step_count=jnp.zeros((), jnp.int32),
            clip_count=jnp.zeros((), jnp.int32),
            nonfinite_count=jnp.zeros((), jnp.int32),
            rule_state=rule.init(norms),
            clip_metrics=ClipMetrics(
                grad_norm=jax.tree.map(jnp.zeros_like, stacked(norms)),
                clip_threshold=jax.tree.map(unbounded_like, stacked(norms)),
                clip_scale=jax.tree.map(jnp.ones_like, stacked(norms)),
            ),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, ClipState]:
        state = own(ClipState, state)
        gradients, restore = split(updates)
        last = state.clip_metrics.grad_norm
        decision = decide(
            norm, gradients, params, last, rule, state.rule_state, extra_args
        )
        norms, thresholds = decision.norms, decision.thresholds
        with jax.debug_infs(False):  # of thresholds that do not bound
            scales = computed_once(jax.tree.map(scale_of(apply), norms, thresholds))
        placed = [prefix_of(decision.place(x)) for x in (thresholds, scales)]
        _check_prefix(placed[0], gradients)
        clipped = jax.tree.map(
            lambda threshold, scale, under: jax.tree.map(
                apply(threshold, scale), under
            ),
            *placed,
            gradients,
        )
        return restore(clipped), _record(state, decision, stacked(scales))

    return optax.GradientTransformationExtraArgs(init, update)


def _check_prefix(norms: PyTree, gradients: PyTree) -> None:
    try:
        jax.tree.map(lambda norm, under: None, norms, gradients)
    except ValueError as error:
        raise ValueError(
            "`clip_by(norm=...)` must return a tree of the same types as the "
            f"gradients, which may end earlier, got a {type(norms).__name__} for "
            f"gradients in a {type(gradients).__name__}. {error}"
        ) from error


def _record(state: ClipState, decision: Decision, scales: Norms) -> ClipState:
    # A scale that underflowed to 0 wiped its leaves out: as bad as a norm of infinity.
    thresholds = decision.kept_thresholds
    usable = decision.finite & all_of(
        lambda s, t: (s > 0) | (t == 0), scales, thresholds
    )
    unchanged = all_of(lambda s: s >= 1, scales)
    return ClipState(
        step_count=count_if(True, state.step_count),
        clip_count=count_if(usable & ~unchanged, state.clip_count),
        nonfinite_count=count_if(~usable, state.nonfinite_count),
        rule_state=decision.rule_state,
        clip_metrics=ClipMetrics(
            decision.kept_norms, _no_constant(thresholds, state), scales
        ),
    )


def _no_constant(thresholds: Norms, state: ClipState) -> Norms:
    """A single threshold, but to XLA it is no constant.

    With a constant among the results of a step, XLA for TPU keeps fewer gradients from
    the norm to the update: `benchmarks/tpu_schedule.py` shows it. Thresholds of units
    stay as they are: those in the state may be sharded in another way.
    """
    if not isinstance(thresholds, jax.Array) or thresholds.ndim:
        return thresholds
    old: Any = state.clip_metrics.clip_threshold
    return jnp.where(state.step_count >= 0, thresholds, old)  # always the new one
