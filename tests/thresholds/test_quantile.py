"""The rule `quantile`: `numpy.quantile` of the window, at every step."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip._thresholds.quantile import QuantileState, quantile


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


def reference(norms, q, window, include_current=False):
    """`numpy.quantile` of the last norms at every step, in float64."""
    norms = np.asarray(norms, np.float32).astype(np.float64)
    ends = np.arange(len(norms)) + include_current
    windows = [norms[max(0, end - window) : end] for end in ends]
    return np.array([np.quantile(w, q) if len(w) else np.inf for w in windows])


def lognormal(count, sigma=0.5, seed=0):
    return np.random.default_rng(seed).lognormal(0, sigma, count).astype(np.float32)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


STREAMS = {
    "ordinary": lognormal(300),
    "duplicates": np.random.default_rng(1).integers(1, 4, 300),
    "constant": np.full(300, 0.1),
    "rising": np.arange(1, 301),
    "falling": np.arange(300, 0, -1),
    "extreme": 10 ** np.random.default_rng(2).uniform(-30, 30, 300),
    "largest float": np.where(np.arange(300) % 2, 3.4e38, 1.2e-38),
}


@pytest.mark.parametrize("include_current", [False, True])
@pytest.mark.parametrize("window", [1, 7, 100, 1000])
@pytest.mark.parametrize("q", [0, 0.5, 0.95, 1 / 3, 1])
def test_equals_numpy_at_every_step(q, window, include_current):
    """Partly filled, exactly filled and wrapped around, on every stream at once."""
    rule = quantile(q, window, include_current=include_current)
    streams = np.stack(list(STREAMS.values()), axis=1)
    thresholds, _ = run(rule, streams)
    for column, name in enumerate(STREAMS):
        expected = reference(streams[:, column], q, window, include_current)
        np.testing.assert_allclose(thresholds[:, column], expected, 1e-6, err_msg=name)


@pytest.mark.parametrize("q", [0.95, 0.95005, 0.123456])
def test_rank_is_exact_in_a_large_window(q):
    """A float32 rank near 9500 is off by up to 0.0005: of a gap of 1e30, too much."""
    window = 10_000
    low = np.sort(lognormal(window))
    rank = int(q * (window - 1))
    norms = np.concatenate([low[: rank + 1], 1e30 * low[rank + 1 :]])
    thresholds, _ = run(quantile(q, window), np.append(norms, 1.0))
    expected = np.quantile(norms.astype(np.float32).astype(np.float64), q)
    np.testing.assert_allclose(thresholds[-1], expected, 1e-6)


@pytest.mark.parametrize(
    ("q", "window"), [(0.9, 11), (0.3, 11), (0.95, 101), (np.float32(0.6), 6)]
)
def test_whole_rank_is_a_norm(q, window):
    """Binary 0.9 is above 0.9: the excess must not let in a part of the next norm."""
    rank = round(q * (window - 1))
    norms = np.where(np.arange(window) <= rank, 1.0, 1e38)
    thresholds, _ = run(quantile(q, window), np.append(norms, 1.0))
    assert thresholds[-1] == 1.0


def test_never_beyond_the_norms_around_it():
    norms = lognormal(2000, sigma=3, seed=3)
    thresholds, _ = run(quantile(0.999, 7), norms)
    for step in range(7, 2000):
        assert thresholds[step] <= norms[step - 7 : step].max()


@pytest.mark.parametrize("useless", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("include_current", [False, True])
def test_useless_norms_leave_the_memory_alone(useless, include_current):
    """One at step 1 and 100 in the middle; each gets a threshold all the same."""
    norms = lognormal(250)
    rule = quantile(0.9, 50, include_current=include_current)
    at = np.r_[0, np.full(100, 120)]
    thresholds, state = run(rule, np.insert(norms, at, np.float32(useless)))
    expected, expected_state = run(rule, norms)
    added = np.r_[0, 121:221]
    np.testing.assert_array_equal(np.delete(thresholds, added), expected)
    assert bits(state) == bits(expected_state)
    assert thresholds[0] == np.inf
    assert len(set(thresholds[added[1:]])) == 1
    np.testing.assert_allclose(thresholds[121], np.quantile(norms[70:120], 0.9), 1e-6)


@pytest.mark.parametrize("min_count", [2, 10])
@pytest.mark.parametrize("include_current", [False, True])
def test_no_threshold_before_min_count(min_count, include_current):
    norms = lognormal(30)
    rule = quantile(0.5, 10, min_count=min_count, include_current=include_current)
    thresholds, _ = run(rule, norms)
    first = min_count - include_current
    assert np.all(np.isinf(thresholds[:first]))
    expected = reference(norms, 0.5, 10, include_current)
    np.testing.assert_allclose(thresholds[first:], expected[first:], 1e-6)


def test_lowest_caps_the_start():
    rule = optaxclip.lowest(quantile(0.5, 10), 1.5)
    thresholds, _ = run(rule, np.array([1.0, 3.0, 5.0, 1.0]))
    np.testing.assert_allclose(thresholds, [1.5, 1.0, 1.5, 1.5])


@pytest.mark.parametrize(("q", "window"), [(0.95, 100), (0.95, 101), (0.9, 11)])
def test_burst_that_fits_does_not_move_it(q, window):
    """floor((1 - q)(N - 1)) spikes leave it among ordinary norms, one more does not."""
    tolerated = math.floor((1 - Fraction(str(q))) * (window - 1))
    ordinary = lognormal(2 * window)
    for spikes, moved in [(tolerated, False), (tolerated + 1, True)]:
        norms = np.r_[ordinary, np.full(spikes, 1e6), ordinary]
        thresholds, _ = run(quantile(q, window), norms)
        assert (thresholds[window:].max() > ordinary.max()) == moved


@pytest.mark.parametrize(("q", "window"), [(0.95, 101), (0.5, 11), (0.9, 21)])
def test_share_beyond_it_is_the_nominal_one(q, window):
    """Of i.i.d. norms, 1 - ((N - 1) q + 1) / (N + 1), within four standard errors.

    Exact for whole ranks; between two norms, interpolation changes it a little.
    """
    norms = lognormal(4000 * 32).reshape(4000, 32)
    thresholds, _ = run(quantile(q, window), norms)
    shares = (norms > thresholds)[window:].mean(axis=0)
    expected = 1 - ((window - 1) * q + 1) / (window + 1)
    assert expected == pytest.approx(1 - q + (2 * q - 1) / (window + 1))
    error = shares.std(ddof=1) / np.sqrt(len(shares))
    assert error < 0.002
    assert abs(shares.mean() - expected) < 4 * error


@pytest.mark.parametrize("factor", [1.5, 2, 4, 10, 100])
def test_recovers_from_a_lasting_change(factor):
    """Within (1 - q) N + 10 steps after a rise, and q N + 10 after a fall."""
    q, window = 0.95, 200
    rise, fall = round((1 - q) * window) + 10, round(q * window) + 10
    norms = lognormal(1500)
    norms[500:1000] *= factor
    thresholds, _ = run(quantile(q, window), norms)
    scales = np.minimum(1, thresholds / norms)
    usual = scales[200:500].mean()
    assert scales[500 + rise : 600 + rise].mean() > 0.9 * usual
    assert thresholds[500] < 1.5 * thresholds[400:500].mean()
    after = thresholds[1000 + fall :]
    assert 0.7 < after.mean() / thresholds[200:500].mean() < 1.4


@pytest.mark.parametrize("include_current", [False, True])
def test_jit_scan_vmap_and_eager_agree(include_current):
    norms = jnp.asarray(np.r_[0, lognormal(20), 0, lognormal(3, seed=1)], jnp.float32)
    rule = quantile(0.7, 6, include_current=include_current)
    expected, expected_state = run(rule, norms)
    for update in (rule.update, jax.jit(rule.update, donate_argnums=1)):
        state, thresholds = rule.init(norms[0]), []
        for norm in norms:
            threshold, state = update(norm, state)
            thresholds.append(threshold)
        np.testing.assert_allclose(thresholds, expected, 1e-6)
        assert bits(state) == bits(expected_state)
    both = jnp.stack([norms, norms[::-1]])
    states = jax.vmap(rule.init)(both[:, 0])
    step = jax.vmap(lambda s, n: rule.update(n, s)[::-1])
    states, thresholds = jax.lax.scan(step, states, both.T)
    np.testing.assert_allclose(thresholds[:, 0], expected, 1e-6)
    assert bits(jax.tree.map(lambda x: x[0], states)) == bits(expected_state)


def test_each_norm_has_its_own_memory():
    """Trees of scalars and of units, some of them zero for a while."""
    norms = lognormal(40 * 5).reshape(40, 5)
    norms[10:15, 0] = 0
    norms[::3, 3] = 0
    tree = {"a": norms[:, 0], "b": [norms[:, 1], None], "c": norms[:, None, 2:]}
    thresholds, state = run(quantile(0.8, 9), tree)
    together = np.column_stack(
        [thresholds["a"], thresholds["b"][0], thresholds["c"][:, 0]]
    )
    for column in range(5):
        alone, _ = run(quantile(0.8, 9), norms[:, column])
        np.testing.assert_array_equal(together[:, column], alone)
    assert state.quantile_ring["c"].shape == (9, 1, 3)
    assert state.quantile_count["c"].shape == (1, 3)


def test_empty_tree():
    rule = quantile(0.5, 3)
    thresholds, state = rule.update({}, rule.init({}))
    assert thresholds == {}
    assert state == QuantileState({}, {}, {}, {})


@pytest.mark.parametrize("shape", [(), (1, 4)])
def test_state_keeps_its_form_and_shares_no_buffer(shape):
    rule = quantile(0.5, 1)
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
    assert optax.tree.get(state, "quantile_count") is state.quantile_count


def test_float64_norms():
    with jax.enable_x64(True):
        norms = jnp.asarray(np.random.default_rng(0).lognormal(0, 1, 30))
        rule = quantile(0.7, 11)
        state = rule.init(norms[0])
        for step, norm in enumerate(norms):
            threshold, state = rule.update(norm, state)
            assert threshold.dtype == jnp.float64
            if step:
                window = np.asarray(norms[max(0, step - 11) : step])
                np.testing.assert_allclose(threshold, np.quantile(window, 0.7), 1e-14)
        assert state.quantile_ring.dtype == jnp.float64
        assert state.quantile_count.dtype == jnp.int32


def test_chain_with_scale_is_a_multiple():
    norms = lognormal(50)
    rule = optax.chain(quantile(0.5, 20), optax.scale(2.0))
    thresholds, _ = run(rule, norms)
    np.testing.assert_allclose(thresholds, 2 * reference(norms, 0.5, 20), 1e-6)


def test_injected_and_scheduled_quantile():
    norms = lognormal(60)
    make = optax.inject_hyperparams(quantile, static_args=("window", "min_count"))
    thresholds, _ = run(make(0.9, 20), norms)
    np.testing.assert_allclose(thresholds, reference(norms, 0.9, 20), 1e-5)
    thresholds, _ = run(make(lambda step: jnp.where(step < 30, 0.1, 2.0), 20), norms)
    expected = np.r_[reference(norms, 0.1, 20)[:30], reference(norms, 1, 20)[30:]]
    np.testing.assert_allclose(thresholds, expected, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"q": 1.5},
            r"`quantile\(q=\.\.\.\)` must be a number in \[0, 1\], got 1\.5\.",
        ),
        ({"q": -0.1}, r"`quantile\(q=.*got -0\.1"),
        ({"q": np.nan}, r"`quantile\(q=.*got nan"),
        ({"q": [0.1, 0.2]}, r"`quantile\(q=.*got \[0\.1, 0\.2\]"),
        ({"window": 0}, r"`quantile\(window=.*must be an integer of at least 1, got 0"),
        ({"window": 2.0}, r"`quantile\(window=.*got 2\.0"),
        ({"window": True}, r"`quantile\(window=.*got True"),
        ({"window": "ten"}, r"`quantile\(window=.*got 'ten'"),
        ({"min_count": 0}, r"`quantile\(min_count=.*integer from 1 to 9, got 0"),
        ({"min_count": 10}, r"`quantile\(min_count=.*integer from 1 to 9, got 10"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantile(**({"q": 0.5, "window": 9} | arguments))


@pytest.mark.parametrize("static", [(), ("window",)])
def test_injected_window_says_how(static):
    make = optax.inject_hyperparams(quantile, static_args=static)
    argument = "min_count" if static else "window"
    message = rf"`quantile\({argument}=.*static_args=\('{argument}', \.\.\.\)"
    with pytest.raises(ValueError, match=message):
        make(0.5, 9).init(jnp.float32(0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 30])
def test_bad_batches_leave_no_trace_in_a_clip(bad, at):
    rng = np.random.default_rng(0)
    grads = {"a": rng.normal(size=(40, 3)), "b": rng.normal(size=(40, 2, 2))}
    tx = optaxclip.clip_by(optaxclip.leaf_norm, quantile(0.8, 10))
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
    def loss(scale, include_current):
        rule = quantile(0.5, 4, include_current=include_current)
        state, total = rule.init(scale), 0.0
        for norm in [0.0, 1e-40, 2.0, 3e38]:
            threshold, state = rule.update(scale * norm, state)
            total += jnp.where(jnp.isfinite(threshold), threshold, 0)
        return total

    for include_current in (False, True):
        slope = jax.grad(loss)(jnp.float32(1), include_current)
        assert slope == 0


def test_compiled_update_is_elementwise():
    """No sort, no loop: some passes over two windows."""
    window = 10_000
    rule = quantile(0.95, window)
    norm = jnp.float32(1)
    step = jax.jit(rule.update, donate_argnums=1).lower(norm, rule.init(norm)).compile()
    text = step.as_text()
    assert not any(f" {op}(" in text for op in ("sort", "while", "scatter"))
    assert step.cost_analysis()["bytes accessed"] < 20 * 4 * window
