"""Scales other than min(1, threshold / norm): `normalize` and your own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_bits

import optaxclip

MOST = np.finfo(np.float32).max


@functools.cache
def step(threshold):
    tx = optaxclip.clip_by(optaxclip.leaf_norm, threshold, optaxclip.normalize)
    return tx, jax.jit(tx.update)


def normalized(threshold, *leaves):
    """What becomes of one gradient a leaf."""
    tx, update = step(threshold)
    grads = {str(i): jnp.asarray(leaf) for i, leaf in enumerate(leaves)}
    updates, state = update(grads, tx.init(grads))
    return list(updates.values()), state


def test_every_norm_becomes_the_threshold():
    random = np.random.default_rng(0)
    sizes = np.float32([1e-15, 1e-3, 1, 1e3, 1e30])
    leaves = [random.normal(size=4).astype(np.float32) * size for size in sizes]
    after, state = normalized(2.0, *leaves)
    for before, x in zip(leaves, after, strict=True):
        norm = np.linalg.norm(before.astype(np.float64))
        np.testing.assert_allclose(x, 2.0 * (before / norm), rtol=2e-6)
    report = optaxclip.metrics(state, per_leaf=True)
    assert report["clip_scale"] == report["clip_scale/4"] < 1 < report["clip_scale/1"]
    assert report["clipped_norm_fraction"] == pytest.approx(
        0.4 + 0.2 * (np.linalg.norm(leaves[2]) > 2)
    )
    for i in range(5):
        np.testing.assert_allclose(report[f"clipped_grad_norm/{i}"], 2.0, rtol=1e-6)


def test_only_what_is_made_smaller_counts_as_clipped():
    tx, update = step(1.0)
    grads = {"w": jnp.array([0.3, 0.4])}
    state, clipped = tx.init(grads), []
    for size in (1.0, 0.0, 2.0, 4.0, np.nan, np.inf):
        _, state = update({"w": grads["w"] * size}, state)
        clipped.append((int(state.clip_count), int(state.nonfinite_count)))
    assert clipped == [(0, 0), (0, 0), (0, 0), (1, 0), (1, 1), (1, 2)]
    assert state.step_count == 6


@pytest.mark.parametrize("threshold", [1.0, np.inf, 0.0])
def test_the_ends(threshold):
    zero, at, large, infinite, bad = (
        [0.0, -0.0],
        [0.6, 0.8],
        [1e-4, 1e9],
        [1.0, np.inf],
        [1.0, np.nan],
    )
    after, _ = normalized(threshold, *map(np.float32, (zero, at, large, infinite, bad)))
    assert_same_bits(after[0], jnp.float32(zero))
    assert np.isnan(after[4]).all() == (threshold < np.inf)
    if threshold == np.inf:
        assert_same_bits(after[1:4], [jnp.float32(x) for x in (at, large, infinite)])
    elif threshold == 0:
        assert not any(np.any(x) for x in after[:3])
    else:
        assert_same_bits(after[1], jnp.float32(at))
        assert after[3][0] == 0
        assert np.isnan(after[3][1])


def test_a_scale_that_would_be_infinite_is_the_largest_number():
    (after,), state = normalized(1e20, np.float32([1e-25, 0.0]))
    assert state.clip_metrics.clip_scale["0"] == MOST
    np.testing.assert_array_equal(after, np.float32([1e-25, 0]) * MOST)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_narrow_and_complex_leaves_are_rounded_once(dtype):
    leaf = jnp.asarray([3e-4, -4e-4], dtype)
    (after,), _ = normalized(10.0, leaf)
    wide = np.asarray(leaf).astype(np.complex128)
    expected = 10 * wide / np.linalg.norm(wide)
    actual = np.asarray(after).astype(np.complex128)
    np.testing.assert_allclose(actual, expected, rtol=float(jnp.finfo(dtype).eps))
    assert after.dtype == dtype


def test_a_scale_of_your_own_is_what_the_metrics_hold():
    @optaxclip.Scaling
    def halve(norm, threshold):
        return jnp.where(norm > threshold, 0.5, 1.0).astype(norm.dtype)

    tx = optaxclip.clip_by(optaxclip.global_norm, 1.0, halve)
    grads = jnp.array([3.0, 4.0])
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_array_equal(updates, [1.5, 2.0])
    report = optaxclip.metrics(state)
    assert (report["clip_scale"], report["clipped_grad_norm"]) == (0.5, 2.5)
    assert (report["clip_count"], repr(halve), halve.__name__) == (1, "halve", "halve")
    recorder = optaxclip.record_history(tx, 2)
    _, state = recorder.update(grads, recorder.init(grads))
    assert state.history.history_scale[0] == 0.5


def test_an_apply_of_your_own_gets_threshold_and_scale_as_before():
    seen = []

    def keep(threshold, scale):
        seen.append((float(threshold), float(scale)))
        return lambda leaf: leaf

    tx = optaxclip.clip_by(optaxclip.global_norm, 1.0, keep)
    grads = jnp.array([3.0, 4.0])
    updates, state = tx.update(grads, tx.init(grads))
    assert_same_bits(updates, grads)
    assert seen == [(1.0, pytest.approx(0.2))]
    assert optaxclip.metrics(state)["clip_count"] == 1
