"""Measure and decide: the first half of clipping and of skipping."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._kernel.measure import Norm, measure
from optaxclip._kernel.names import (
    Named,
    Norms,
    Separate,
    by_name,
    computed_once,
    named,
    shapes_of,
    stacked,
)
from optaxclip._kernel.states import check_sizes
from optaxclip._norms import split, warned
from optaxclip._thresholds import no_bound

PyTree = Any


class Decision(NamedTuple):
    """The norms that were measured and the thresholds that they are held to."""

    norms: Separate  # by name, those that `init` saw
    thresholds: Separate  # of their shapes and dtypes; not negative
    kept_norms: Norms  # as states keep them
    kept_thresholds: Norms  # the same of thresholds; finite
    finite: jax.Array  # whether all norms are
    rule_state: PyTree  # the rule's new memory; the old one if a norm is not finite
    place: Callable[[Separate], PyTree]  # values by name -> tree that the norm made


def decide(
    norm: Norm,
    gradients: PyTree,
    params: PyTree,
    last: Norms,
    rule: optax.GradientTransformationExtraArgs,
    rule_state: PyTree,
    extra_args: dict[str, Any],
) -> Decision:
    """Measures gradients (and parameters, if given) and asks the rule for thresholds.

    ``last`` holds norms with the names and dtypes that the state has since ``init``.
    A norm that is missing now counts as 0, which no rule remembers. The rule sees 0 in
    place of a norm that is not finite, and its memory stays as it was before that step.
    """
    like = shapes_of(last)
    check_sizes("rule_state", rule_state, rule.init, like)
    new = named(measure(norm, gradients), like)
    norms = computed_once(matching(new, like, "updates"))
    parameter_norms = None
    if params is not None:
        with warned():
            of_params = named(measure(norm, split(params).gradients), like)
        _refuse_missing(by_name(new.norms), by_name(of_params.norms))
        parameter_norms = matching(of_params, like, "params")
    kept_norms = stacked(norms)
    finite = all_of(jnp.isfinite, kept_norms)
    known = jax.tree.map(lambda n: jnp.where(jnp.isfinite(n), n, 0), norms)
    with jax.debug_infs(False):  # by which rules say "no bound"
        thresholds, new_state = rule.update(
            known, rule_state, parameter_norms, **extra_args
        )
        thresholds = jax.tree.map(_bound, thresholds, norms)
    return Decision(
        norms=norms,
        thresholds=thresholds,
        kept_norms=kept_norms,
        kept_thresholds=jax.tree.map(_stored, stacked(thresholds)),
        finite=finite,
        rule_state=jax.tree.map(
            functools.partial(jnp.where, finite), new_state, rule_state
        ),
        place=new.place,
    )


def all_of(holds: Callable[..., jax.Array], *trees: PyTree) -> jax.Array:
    """Whether ``holds`` is true of all elements, in trees of the same structure."""
    rows = list(zip(*map(jax.tree.leaves, trees), strict=True))
    if not rows:
        return jnp.ones((), bool)
    if len(rows) == 1:
        # Without a barrier: it would keep XLA for GPU from making selects of the
        # conditional of a skip around this, which then has to write the updates.
        return jnp.all(holds(*rows[0]))
    flags = jnp.stack([jnp.all(holds(*row)) for row in rows])
    # This one keeps XLA from unrolling the reduction into a chain, slow to compile.
    return jnp.all(jax.lax.optimization_barrier(flags))


def count_if(event: jax.Array | bool, counter: jax.Array) -> jax.Array:
    """The counter, plus one if the event happened, up to its largest value."""
    return jnp.where(event, optax.safe_increment(counter), counter)


def unbounded_like(norm: jax.Array) -> jax.Array:
    """The number that stands for "no bound", in the shape and dtype of a norm."""
    return jnp.full_like(norm, no_bound(norm.dtype))


def _stored(threshold: jax.Array) -> jax.Array:
    """A threshold as a state keeps it: finite."""
    return jnp.minimum(threshold, no_bound(threshold.dtype))


def is_unbounded(threshold: jax.Array) -> jax.Array:
    """Whether a stored threshold stands for "no bound"."""
    return threshold >= no_bound(threshold.dtype)


def matching(new: Named, like: Separate, argument: str) -> Separate:
    """The norms in the form and dtypes of ``like``, 0 where one is missing."""
    norms, expected = by_name(new.norms), by_name(like)
    if unknown := sorted(norms.keys() - expected.keys()):
        raise ValueError(
            f"`update({argument}=...)` must have the tree structure of the parameters "
            f"given to `init`, got leaves {unknown} that `init` did not see"
            + (f"; it saw {sorted(expected)}." if len(expected) < 20 else ".")
        )
    for name, norm in norms.items():
        if norm.shape != expected[name].shape:
            raise ValueError(
                f"`update({argument}=...)` must have the shapes of the parameters "
                f"given to `init`, got a leaf {name!r} whose norm has the shape "
                f"{norm.shape} in place of {expected[name].shape}."
            )
    matched = {
        name: norms[name].astype(x.dtype)
        if name in norms
        else jnp.zeros(x.shape, x.dtype)
        for name, x in expected.items()
    }
    return matched if isinstance(like, Mapping) else matched.get("", like)


def _refuse_missing(norms: dict[str, Any], parameter_norms: dict[str, Any]) -> None:
    if missing := sorted(norms.keys() - parameter_norms.keys()):
        raise ValueError(
            "`update(params=...)` must hold the parameters of all updates, got none "
            f"at {missing}."
        )


def _bound(threshold: jax.Array, norm: jax.Array) -> jax.Array:
    return jnp.maximum(threshold.astype(norm.dtype), 0)
