"""The rule `tracked_quantile`: its exact coverage, its spread, its start, its floor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip._thresholds.tracked_quantile import (
    TrackedQuantileState,
    tracked_quantile,
)


def run(rule, norms, state=None):
    """Thresholds and last state of a rule on norms along the first axis."""
    norms = jax.tree.map(lambda n: jnp.asarray(n, jnp.float32), norms)
    if state is None:
        state = rule.init(jax.tree.map(lambda n: n[0], norms))
    scan = jax.jit(
        lambda s, n: jax.lax.scan(lambda s, n: rule.update(n, s)[::-1], s, n)
    )
    state, thresholds = scan(state, norms)
    return jax.tree.map(np.asarray, thresholds), state


def reference(norms, q, rate, start=None, floor=1e-8):
    """The recursion in float64."""
    theta, thresholds = None if start is None else np.log(start), []
    for norm in np.asarray(norms, np.float64):
        thresholds.append(np.inf if theta is None else np.exp(theta))
        if norm > 0 and theta is None:
            theta = max(np.log(norm), np.log(floor))
        elif norm > 0:
            theta += rate * (q - (norm <= thresholds[-1]))
            theta = max(theta, np.log(floor))
    return np.array(thresholds)


def lognormal(count, sigma=0.5, seed=0):
    return np.random.default_rng(seed).lognormal(0, sigma, count).astype(np.float32)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("start", [None, 0.2, 30.0])
@pytest.mark.parametrize(("q", "rate"), [(0.95, 0.05), (0.5, 0.2), (0.1, 0.01)])
def test_equals_the_recursion(q, rate, start):
    norms = lognormal(2000)
    norms[[0, 1, 500]] = 0
    thresholds, _ = run(tracked_quantile(q, rate, start=start), norms)
    np.testing.assert_allclose(thresholds, reference(norms, q, rate, start), 1e-5)


STEPS = 100_000
STREAMS = {  # (step, threshold) -> norm
    "constant": lambda step, threshold: 1.0 + 0 * step,
    "just above": lambda step, threshold: threshold * 1.001,
    "just below": lambda step, threshold: threshold * 0.999,
    "in turn": lambda step, threshold: threshold * jnp.where(step % 2 == 0, 1.5, 1.0),
    "blocks": lambda step, threshold: jnp.where(step // 5000 % 2 == 0, 1e-3, 1e3),
    "ramp": lambda step, threshold: jnp.exp(20 * step / STEPS - 10),
    "spikes": lambda step, threshold: jnp.where(step % 7 == 0, 1e30, 1e-6),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("q", "rate"), [(0.95, 0.05), (0.95, 0.001), (0.3, 0.01)])
def test_coverage_identity(q, rate, stream):
    """Share that passes = q - (theta_n - theta_0) / (rate n), norms chosen to harm."""
    first = 2.0
    rule = tracked_quantile(q, rate, start=first, floor=1e-30)

    def step(state, index):
        seen = jnp.exp(state.tracked_log_threshold)
        norm = STREAMS[stream](index.astype(jnp.float32), seen)
        norm = jnp.clip(norm, 1e-7, 1e30)
        threshold, state = rule.update(norm, state)
        return state, norm <= threshold

    scan = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(STEPS)))
    state, passed = scan(rule.init(jnp.float32(0)))
    travelled = float(state.tracked_log_threshold) - np.log(first)
    expected = q - travelled / (rate * STEPS)
    assert abs(np.mean(passed) - expected) < 2e-6


@pytest.mark.parametrize(("q", "rate"), [(0.5, 0.05), (0.9, 0.05), (0.95, 0.02)])
def test_stationary_spread(q, rate):
    """sqrt(rate q (1 - q) / (2 f)) within 15 %, f the density of the log-norm."""
    sigma, streams = 0.5, 256
    deviate = {0.5: 0.0, 0.9: 1.2815516, 0.95: 1.6448536}[q]
    density = np.exp(-(deviate**2) / 2) / (sigma * np.sqrt(2 * np.pi))
    start = float(np.exp(sigma * deviate))
    norms = lognormal(4000 * streams, sigma).reshape(4000, streams)
    thresholds, _ = run(tracked_quantile(q, rate, start=start), norms)
    late = np.log(thresholds[1500::100])
    expected = np.sqrt(rate * q * (1 - q) / (2 * density))
    assert late.std() == pytest.approx(expected, rel=0.15)
    assert late.mean() == pytest.approx(np.log(start), abs=0.05)
    passed = (norms <= thresholds)[1500:].mean()
    assert passed == pytest.approx(q, abs=0.002)


@pytest.mark.parametrize("spike", [10.0, 1e10, 3e38])
def test_a_spike_moves_it_by_one_step_whatever_its_size(spike):
    norms = np.full(50, 1.0)
    norms[20] = spike
    thresholds, _ = run(tracked_quantile(0.95, 0.05), norms)
    assert thresholds[21] / thresholds[20] == pytest.approx(np.exp(0.05 * 0.95), 1e-5)
    assert thresholds[1:].max() < 1.06


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_bad_start_is_made_good_in_the_stated_steps(factor):
    q, rate = 0.9, 0.1
    pace = rate * (q if factor < 1 else 1 - q)
    steps = int(np.ceil(np.log(10) / pace))
    thresholds, _ = run(tracked_quantile(q, rate, start=factor), np.ones(2 * steps))
    gap = np.abs(np.log(thresholds))
    assert gap[steps - 2] > 0.5 * pace
    assert gap[steps + 1 :].max() < rate


@pytest.mark.parametrize("useless", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("start", [None, 2.0])
def test_useless_norms_leave_the_memory_alone(useless, start):
    """One at step 1 and 100 in the middle; each gets a threshold all the same."""
    norms = lognormal(250)
    rule = tracked_quantile(0.9, 0.05, start=start)
    at = np.r_[0, np.full(100, 120)]
    thresholds, state = run(rule, np.insert(norms, at, np.float32(useless)))
    expected, expected_state = run(rule, norms)
    added = np.r_[0, 121:221]
    np.testing.assert_array_equal(np.delete(thresholds, added), expected)
    assert bits(state) == bits(expected_state)
    assert thresholds[0] == (start or np.inf)
    assert np.all(thresholds[added[1:]] == expected[120])


def test_floor():
    """Norms that all but vanish hold it at the floor, from where it comes back."""
    norms = np.r_[np.ones(10), np.full(2000, 1e-20), np.ones(300)]
    thresholds, _ = run(tracked_quantile(0.5, 0.2, floor=1e-6), norms)
    assert thresholds.min() == pytest.approx(1e-6, rel=1e-5)
    assert thresholds.min() > 0
    assert thresholds[2009] == pytest.approx(1e-6, rel=1e-5)
    assert thresholds[-1] == pytest.approx(1.0, rel=0.2)
    thresholds, _ = run(
        tracked_quantile(0.5, 0.2, floor=1.0), np.array([1e-20, 1e-20, 5.0])
    )
    np.testing.assert_allclose(thresholds, [np.inf, 1, 1], 1e-6)


def test_jit_scan_vmap_and_eager_agree():
    norms = jnp.asarray(np.r_[0, lognormal(20), 0, lognormal(3, seed=1)], jnp.float32)
    rule = tracked_quantile(0.7, 0.1)
    expected, expected_state = run(rule, norms)
    for update in (rule.update, jax.jit(rule.update, donate_argnums=1)):
        state, thresholds = rule.init(norms[0]), []
        for norm in norms:
            threshold, state = update(norm, state)
            thresholds.append(threshold)
        np.testing.assert_allclose(thresholds, expected, 1e-6)
    both = jnp.stack([norms, norms[::-1]])
    states = jax.vmap(rule.init)(both[:, 0])
    step = jax.vmap(lambda s, n: rule.update(n, s)[::-1])
    states, thresholds = jax.lax.scan(step, states, both.T)
    np.testing.assert_allclose(thresholds[:, 0], expected, 1e-6)
    np.testing.assert_allclose(
        states.tracked_log_threshold[0], expected_state.tracked_log_threshold, 1e-6
    )


def test_each_norm_is_followed_by_itself():
    """Trees of scalars and of units, some of them zero for a while."""
    norms = lognormal(40 * 5).reshape(40, 5)
    norms[10:15, 0] = 0
    norms[::3, 3] = 0
    tree = {"a": norms[:, 0], "b": [norms[:, 1], None], "c": norms[:, None, 2:]}
    rule = tracked_quantile(0.8, 0.1)
    thresholds, state = run(rule, tree)
    together = np.column_stack(
        [thresholds["a"], thresholds["b"][0], thresholds["c"][:, 0]]
    )
    for column in range(5):
        alone, _ = run(rule, norms[:, column])
        np.testing.assert_allclose(together[:, column], alone, 1e-6)
    assert state.tracked_log_threshold["c"].shape == (1, 3)


def test_empty_tree():
    rule = tracked_quantile(0.5, 0.1)
    thresholds, state = rule.update({}, rule.init({}))
    assert thresholds == {}
    assert state == TrackedQuantileState({}, {})


@pytest.mark.parametrize("start", [None, 2.0])
@pytest.mark.parametrize("shape", [(), (1, 4)])
def test_state_keeps_its_form_and_shares_no_buffer(shape, start):
    rule = tracked_quantile(0.5, 0.1, start=start)
    norms = {"a": jnp.ones(shape, jnp.float32)}
    state = jax.jit(rule.init)(norms)
    for _ in range(3):
        leaves = jax.tree.leaves(state)
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
        thresholds, new = jax.jit(rule.update)(norms, state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        for old_leaf, new_leaf in zip(leaves, jax.tree.leaves(new), strict=True):
            assert old_leaf.aval == new_leaf.aval
        assert thresholds["a"].aval == norms["a"].aval
        state = new


def test_float64_norms():
    with jax.enable_x64(True):
        norms = jnp.asarray(np.random.default_rng(0).lognormal(0, 1, 30))
        rule = tracked_quantile(0.7, 0.1)
        state, thresholds = rule.init(norms[0]), []
        for norm in norms:
            threshold, state = rule.update(norm, state)
            assert threshold.dtype == jnp.float64
            thresholds.append(float(threshold))
        np.testing.assert_allclose(thresholds, reference(norms, 0.7, 0.1), 1e-12)


def test_chain_with_scale_is_a_multiple():
    norms = lognormal(50)
    rule = optax.chain(tracked_quantile(0.5, 0.1), optax.scale(2.0))
    thresholds, _ = run(rule, norms)
    np.testing.assert_allclose(thresholds, 2 * reference(norms, 0.5, 0.1), 1e-5)


def test_scheduled_rate():
    """A fast start, then a slow pace; the threshold does not jump when it changes."""
    norms = lognormal(60)

    def rate(step):
        return jnp.where(step < 30, 0.5, 0.01)

    thresholds, _ = run(optax.inject_hyperparams(tracked_quantile)(0.9, rate), norms)
    fast = reference(norms, 0.9, 0.5)
    np.testing.assert_allclose(thresholds[:31], fast[:31], 1e-5)
    slow = reference(norms[30:], 0.9, 0.01, start=fast[30])
    np.testing.assert_allclose(thresholds[30:], slow, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": 0.0}, r"`tracked_quantile\(q=\.\.\.\)` must be between 0 and 1, got 0"),
        ({"q": 1}, r"`tracked_quantile\(q=.*got 1\."),
        ({"q": np.nan}, r"`tracked_quantile\(q=.*got nan"),
        ({"rate": 0}, r"`tracked_quantile\(rate=.*must be positive and finite, got 0"),
        ({"rate": np.inf}, r"`tracked_quantile\(rate=.*got inf"),
        ({"start": -1.0}, r"`tracked_quantile\(start=.*got -1\.0"),
        ({"floor": 0.0}, r"`tracked_quantile\(floor=.*got 0\.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tracked_quantile(**({"q": 0.5, "rate": 0.1} | arguments))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 30])
def test_bad_batches_leave_no_trace_in_a_clip(bad, at):
    rng = np.random.default_rng(0)
    grads = {"a": rng.normal(size=(40, 3)), "b": rng.normal(size=(40, 2, 2))}
    tx = optaxclip.clip_by(optaxclip.leaf_norm, tracked_quantile(0.8, 0.1))
    clipped, expected = run(tx, grads)
    assert 0 < int(expected.clip_count) < 40
    spoiled = jax.tree.map(lambda g: np.insert(g, at, g[0], axis=0), grads)
    spoiled["a"][at, 1] = bad
    result, state = run(tx, spoiled)
    assert bits(state.rule_state) == bits(expected.rule_state)
    assert int(state.nonfinite_count) == 1
    for name in grads:
        np.testing.assert_array_equal(np.delete(result[name], at, 0), clipped[name])


def test_constant_to_a_derivative():
    def loss(scale):
        rule = tracked_quantile(0.5, 0.1)
        state, total = rule.init(scale), 0.0
        for norm in [0.0, 1e-40, 2.0, 3e38]:
            threshold, state = rule.update(scale * norm, state)
            total += jnp.where(jnp.isfinite(threshold), threshold, 0)
        return total

    assert jax.grad(loss)(jnp.float32(1)) == 0
