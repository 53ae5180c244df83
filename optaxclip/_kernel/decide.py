"""Measure and decide: the first half of clipping and of skipping."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._kernel.measure import Norm, measure
from optaxclip._norms import (
    path_name,
    split,
    warned,
)

PyTree = Any


class Decision(NamedTuple):
    """What was measured and what it is held to."""

    norms: PyTree
    thresholds: PyTree  # of the norms' structure, shapes and dtypes; not negative
    finite: jax.Array  # whether all norms are
    rule_state: PyTree  # the rule's new memory; the old one if a norm is not finite


def decide(
    norm: Norm,
    gradients: PyTree,
    params: PyTree,
    like: PyTree,
    rule: optax.GradientTransformationExtraArgs,
    rule_state: PyTree,
    extra_args: dict[str, Any],
) -> Decision:
    """Measures gradients (and parameters, if given) and asks the rule for thresholds.

    ``like`` holds norms of the structure and dtypes that the state has had from the
    start. The rule sees 0 in place of a norm that is not finite, and forgets that step.
    """
    norms = _matching(norm, gradients, like, "updates")
    parameter_norms = None
    if params is not None:
        parameters = split(params).gradients
        with warned():
            parameter_norms = _matching(norm, parameters, like, "params")
    finite = all_of(jnp.isfinite, norms)
    known = jax.tree.map(lambda n: jnp.where(jnp.isfinite(n), n, 0), norms)
    thresholds, new_state = rule.update(
        known, rule_state, parameter_norms, **extra_args
    )
    thresholds = jax.tree.map(_bound, thresholds, norms)
    kept = jax.tree.map(functools.partial(jnp.where, finite), new_state, rule_state)
    return Decision(norms, thresholds, finite, kept)


def all_of(holds: Callable[..., jax.Array], *trees: PyTree) -> jax.Array:
    """Whether ``holds`` of all elements of trees of one structure."""
    rows = list(zip(*map(jax.tree.leaves, trees), strict=True))
    if not rows:
        return jnp.ones((), bool)
    if len(rows) == 1:
        # Without a barrier: it would keep XLA for GPU from making selects of the
        # conditional of a skip around this, which then has to write the updates.
        return jnp.all(holds(*rows[0]))
    if all(x.ndim == 0 and x.dtype == rows[0][0].dtype for row in rows for x in row):
        # Asked once of a vector: asked of thousands of scalars it is thousands of
        # kernels to compile. The barrier keeps XLA from taking it apart again.
        stacked = [jnp.stack(column) for column in zip(*rows, strict=True)]
        return jnp.all(holds(*jax.lax.optimization_barrier(stacked)))
    flags = jnp.stack([jnp.all(holds(*row)) for row in rows])
    # This one keeps XLA from unrolling the reduction into a chain, slow to compile.
    return jnp.all(jax.lax.optimization_barrier(flags))


def count_if(event: jax.Array | bool, counter: jax.Array) -> jax.Array:
    """The counter, one higher after an event, but never beyond its largest value."""
    return jnp.where(event, optax.safe_increment(counter), counter)


def infinite_like(norm: jax.Array) -> jax.Array:
    """Infinity in the shape and dtype of a norm."""
    return jnp.full_like(norm, jnp.inf)


def _matching(norm: Norm, gradients: PyTree, like: PyTree, argument: str) -> PyTree:
    norms = measure(norm, gradients)
    if jax.tree.structure(norms) != jax.tree.structure(like):
        new, old = _leaf_names(norms), _leaf_names(like)
        raise ValueError(
            f"`update({argument}=...)` must have the tree structure of the parameters "
            f"given to `init`, got leaves {sorted(new - old)} that `init` did not see, "
            f"and none at {sorted(old - new)}."
        )
    return jax.tree.map(lambda n, as_: n.astype(as_.dtype), norms, like)


def _bound(threshold: jax.Array, norm: jax.Array) -> jax.Array:
    return jnp.maximum(threshold.astype(norm.dtype), 0)


def _leaf_names(tree: PyTree) -> set[str]:
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path) for path, _ in paths_and_leaves}
