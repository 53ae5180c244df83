"""Thresholds of every type, on low precision, where optax fails or changes dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

CLIPS = {
    "clip_by_value": optaxclip.clip_by_value,
    "clip_by_global_norm": optaxclip.clip_by_global_norm,
    "clip_by_leaf_norm": optaxclip.clip_by_leaf_norm,
    "clip_by_block_rms": optaxclip.clip_by_block_rms,
    "adaptive_grad_clip": optaxclip.adaptive_grad_clip,
}
every_clip = pytest.mark.parametrize("make", CLIPS.values(), ids=CLIPS)

GRADS = {"w": jnp.full((2, 2), 2.0, jnp.bfloat16)}
PARAMS = {"w": jnp.full((2, 2), 1.0, jnp.bfloat16)}

NUMBERS = {
    "int": lambda: 1,
    "float": lambda: 1.0,
    "numpy float32": lambda: np.float32(1),
    "numpy float64": lambda: np.float64(1),
    "numpy array": lambda: np.ones(()),
    "jnp strong": lambda: jnp.float32(1),
    "jnp weak": lambda: jnp.asarray(1.0),
    "jnp bfloat16": lambda: jnp.bfloat16(1),
    "jnp int": lambda: jnp.int32(1),
}


def clipped_once(tx):
    updates, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert updates["w"].dtype == jnp.bfloat16
    assert not updates["w"].weak_type
    return updates["w"].astype(jnp.float32), state


@every_clip
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.sample(3)
def test_every_type_of_number_means_the_same(make, number):
    expected, _ = clipped_once(make(1.0))
    for threshold in (number(), lambda step: number()):
        actual, state = clipped_once(make(threshold))
        np.testing.assert_array_equal(actual, expected)
        assert (
            jax.tree.leaves(state.clip_metrics.clip_threshold)[0].dtype == jnp.float32
        )


@every_clip
def test_a_traced_number(make):
    @jax.jit
    def clip(threshold):
        tx = make(threshold)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]["w"]

    expected, _ = clipped_once(make(1.0))
    assert clip(1.0).dtype == jnp.bfloat16
    np.testing.assert_array_equal(clip(1.0).astype(jnp.float32), expected)


@every_clip
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.sample(1)
def test_inject_hyperparams_on_bfloat16(make, scheduled):
    argument = {
        "clip_by_value": "max_value",
        "clip_by_block_rms": "threshold",
        "adaptive_grad_clip": "clipping",
    }.get(make.__name__, "max_norm")
    threshold = optax.linear_schedule(1.0, 0.5, 2) if scheduled else 1.0
    tx = optax.inject_hyperparams(make)(**{argument: threshold})
    state = tx.init(PARAMS)
    structure = jax.tree.structure(state)
    results = []
    for _ in range(3):
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        assert updates["w"].dtype == jnp.bfloat16
        assert jax.tree.structure(state) == structure
        results.append(float(updates["w"][0, 0]))
    expected, _ = clipped_once(make(1.0))
    assert results[0] == expected[0, 0]
    assert results[2] == (results[0] / 2 if scheduled else results[0])
    state.hyperparams[argument] = jnp.asarray(0.25, jnp.bfloat16)
    if not scheduled:
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        assert float(updates["w"][0, 0]) == results[0] / 4


@every_clip
def test_a_schedule_sees_the_number_of_earlier_updates(make):
    tx = make(lambda step: jnp.asarray([0.5, 0.25, 0.125])[step])
    state, thresholds = tx.init(PARAMS), []
    for _ in range(3):
        _, state = tx.update(GRADS, state, PARAMS)
        thresholds.append(optaxclip.metrics(state)["clip_threshold"])
    thresholds = np.array(thresholds)
    np.testing.assert_array_equal(
        thresholds, thresholds[0] * np.float32([1, 0.5, 0.25])
    )


@every_clip
@pytest.mark.parametrize("grad", [0.0, 3.0])
def test_threshold_zero_gives_zeros(make, grad):
    tx = make(0.0) if make is not optaxclip.adaptive_grad_clip else make(0.0, eps=0.0)
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.full((2,), grad)}
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert state.nonfinite_count == 0


def test_a_scheduled_negative_threshold_does_not_reverse_gradients():
    tx = optaxclip.clip_by_global_norm(lambda step: jnp.float32(-1.0))
    updates, _ = tx.update(GRADS, tx.init(GRADS))
    np.testing.assert_array_equal(updates["w"].astype(jnp.float32), 0)
    guard = optaxclip.skip_by(optax.sgd(1.0), threshold=lambda step: jnp.float32(-1.0))
    assert guard.update(GRADS, guard.init(GRADS))[1].skip_count == 1


def test_an_array_holds_one_threshold_for_each_unit():
    grads = jnp.array([[3.0, 3.0], [4.0, 4.0]])
    tx = optaxclip.clip_by(optaxclip.unit_norm, jnp.array([5.0, 1.0]))
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates, [[3.0, 0.6], [4.0, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 3), (2, 1), (1, 3), (1, 1)])
def test_an_array_broadcasts_against_the_norms(shape):
    norms, value = (
        jnp.ones((2, 3)),
        jnp.asarray(np.random.default_rng(0).uniform(size=shape)),
    )
    thresholds, _ = optaxclip.constant(value).update(norms, ())
    np.testing.assert_array_equal(thresholds, np.broadcast_to(value, (2, 3)))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 2), (3, 3), (1, 2, 3)])
def test_an_array_that_does_not_is_refused(shape):
    rule = optaxclip.constant(jnp.ones(shape))
    with pytest.raises(ValueError, match=r"must broadcast .* norm of shape \(2, 3\)"):
        rule.update(jnp.ones((2, 3)), ())


def test_rules_compose_as_optax_transformations():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0, 8.0])}
    doubled = optax.chain(optaxclip.constant(1.0), optax.scale(2.0))
    tx = optaxclip.clip_by(optaxclip.leaf_norm, doubled)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], [1.2, 1.6], rtol=1e-6)
    groups = optax.partition(
        {"low": optaxclip.constant(1.0), "high": optaxclip.constant(5.0)},
        {"a": "low", "b": "high"},
    )
    tx = optaxclip.clip_by(optaxclip.leaf_norm, groups)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [3.0, 4.0], rtol=1e-6)


def test_lowest_takes_the_smallest_norm_by_norm():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.3, 0.4])}
    rule = optaxclip.lowest(optaxclip.relative(0.5), 1.0)
    norms = optaxclip.leaf_norm(params)
    thresholds, _ = rule.update(norms, rule.init(norms), norms)
    np.testing.assert_allclose(
        [thresholds["a"], thresholds["b"]], [1.0, 0.25], rtol=1e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_norm_after_clipping_is_the_threshold_to_one_rounding(dtype):
    rng = np.random.default_rng(0)
    tx = optaxclip.clip_by_global_norm(1.0)
    update = jax.jit(tx.update)
    for _ in range(100):
        # Squares whose sum is exact, in any order. What rounds is the root, the scale
        # and the product: 3/2 eps of float32 at most, and half an eps of the leaf.
        integers = rng.integers(-128, 129, 500)
        grads = jnp.asarray(integers * 2.0 ** rng.integers(-9, 5), dtype)
        updates, state = update(grads, tx.init(grads))
        assert state.clip_count == 1
        after = np.linalg.norm(np.asarray(updates).astype(np.float64))
        assert after <= 1 + 2 * float(jnp.finfo(dtype).eps)


def test_float16_300_is_clipped_to_1():
    grads = jnp.array([300.0], jnp.float16)
    tx = optaxclip.clip_by_global_norm(1.0)
    updates, state = tx.update(grads, tx.init(grads))
    assert updates[0] == 1
    assert state.clip_metrics.grad_norm == 300


def test_clamp_cuts_complex_numbers_by_modulus_and_infinity_at_the_bound():
    tx = optaxclip.clip_by_value(1.0)
    updates, _ = tx.update(x := jnp.array([3 + 4j, 0.1j]), tx.init(x))
    np.testing.assert_allclose(updates, [0.6 + 0.8j, 0.1j], rtol=1e-6)
    updates, _ = tx.update(x := jnp.array([jnp.inf, -jnp.inf, 0.5]), tx.init(x))
    np.testing.assert_array_equal(updates, [1, -1, 0.5])


def test_a_norm_that_is_not_finite_gives_what_optax_gives():
    for grads in (jnp.array([jnp.nan, 1.0]), jnp.array([jnp.inf, 1.0])):
        ours, theirs = (
            optaxclip.clip_by_global_norm(1.0),
            optax.clip_by_global_norm(1.0),
        )
        np.testing.assert_array_equal(
            ours.update(grads, ours.init(grads))[0],
            theirs.update(grads, theirs.init(grads))[0],
        )
