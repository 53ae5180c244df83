"""Gradients are measured once, by the outermost that asks, and only they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip._kernel.measure import _known

GRADS = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "b": jnp.array([12.0])}


class Counting:
    """A norm that counts how often it reads."""

    def __init__(self, norm=optaxclip.global_norm):
        self.norm, self.reads = norm, 0

    def __call__(self, tree):
        self.reads += 1
        return self.norm(tree)


def test_a_skip_hands_its_norm_to_the_clip_inside():
    norm = Counting()
    tx = optaxclip.skip_by(
        optax.chain(optaxclip.clip_by(norm, 6.5), optax.sgd(1.0)), norm, 100.0
    )
    state = tx.init(GRADS)
    norm.reads = 0
    updates, state = jax.jit(tx.update)(GRADS, state)
    assert norm.reads == 1
    np.testing.assert_allclose(updates["b"], [-6.0])
    inside = state.inner_state[0].clip_metrics.grad_norm
    assert inside == state.skip_metrics.skip_norm == 13


def test_only_the_same_leaves_and_the_same_norm_are_handed_over():
    largest = Counting(lambda tree: optaxclip.global_norm(tree, ord=jnp.inf))
    euclidean = Counting()
    tx = optaxclip.skip_by(
        optax.chain(
            optaxclip.clip_by(largest, jnp.inf),  # another norm
            optax.scale(0.5),
            optaxclip.clip_by(euclidean, jnp.inf),  # other leaves
        ),
        euclidean,
    )
    state = tx.init(GRADS)
    largest.reads = euclidean.reads = 0
    _, state = jax.jit(tx.update)(GRADS, state)
    clips = state.inner_state
    assert largest.reads >= 1
    assert euclidean.reads >= 2
    assert clips[0].clip_metrics.grad_norm == 12
    assert clips[2].clip_metrics.grad_norm == 6.5
    assert state.skip_metrics.skip_norm == 13


def test_leaf_norms_give_the_global_norm():
    """Within a recorder of leaf norms a clip by global norm reads no leaf."""
    recorder = optaxclip.record_history(
        optaxclip.clip_by_global_norm(6.5), 4, leaf_norms=True
    )
    state = recorder.init(GRADS)
    program = jax.make_jaxpr(recorder.update)(GRADS, state).jaxpr
    alone = jax.make_jaxpr(optaxclip.leaf_norm)(GRADS).jaxpr

    def sums_of_leaves(jaxpr):
        shapes = {x.shape for x in jax.tree.leaves(GRADS)}
        count = 0
        for eqn in jaxpr.eqns:
            is_sum = eqn.primitive.name == "reduce_sum"
            count += is_sum and eqn.invars[0].aval.shape in shapes
            for value in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
                if is_jaxpr(value):
                    count += sums_of_leaves(getattr(value, "jaxpr", value))
        return count

    def is_jaxpr(value):
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    assert sums_of_leaves(program) == sums_of_leaves(alone) > 0
    _, state = recorder.update(GRADS, state)
    np.testing.assert_allclose(state.inner_state.clip_metrics.grad_norm, 13, rtol=1e-6)


def test_nothing_is_known_after_the_step_or_after_an_error():
    def failing(updates, state, params=None):
        raise RuntimeError("inner")

    inner = optax.GradientTransformation(lambda params: (), failing)
    tx = optaxclip.skip_by(inner)
    with pytest.raises(RuntimeError, match="inner"):
        tx.update(GRADS, tx.init(GRADS), GRADS)
    assert _known.get() == ()
    tx = optaxclip.skip_nonfinite(optax.sgd(1.0))
    tx.update(GRADS, tx.init(GRADS), GRADS)
    assert _known.get() == ()


def test_derivatives_pass_through_what_was_handed_over():
    def updates_of(tx, factor):
        grads = jax.tree.map(lambda x: factor * x, GRADS)
        updates, _ = tx.update(grads, tx.init(GRADS), GRADS)
        return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

    clip = optaxclip.clip_by_global_norm(20.0)
    skip = optaxclip.skip_nonfinite(clip)
    for factor in (1.0, 2.0):
        inside = jax.grad(lambda f: updates_of(skip, f))(factor)
        alone = jax.grad(lambda f: updates_of(clip, f))(factor)
        np.testing.assert_allclose(inside, alone, rtol=1e-6, atol=1e-6)


def test_norms_of_another_structure_are_not_handed_over():
    grads = {"a": jnp.full(4, 2.0), "n": jnp.arange(3)}
    inner = optax.masked(optaxclip.clip_by_leaf_norm(1.0), {"a": True, "n": False})
    tx = optaxclip.skip_by(inner, norm=optaxclip.leaf_norm)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], 0.5)


def test_a_recorder_changes_no_decision_about_tiny_gradients():
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-25), GRADS)
    clip = optaxclip.clip_by_global_norm(1e-26)
    recorder = optaxclip.record_history(clip, 2, leaf_norms=True)
    alone, _ = clip.update(grads, clip.init(grads))
    recorded, _ = recorder.update(grads, recorder.init(grads))
    for x, y in zip(jax.tree.leaves(recorded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
