"""Each clip of `optaxclip.contrib` beside its formula, and its limits on streams."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import lognormal, scan

import optaxclip
from optaxclip import contrib


def test_smooth_clip():
    norms = np.float32([0, 1e-3, 0.5, 2, 1e3, 1e30])
    for bound in (2.0, 1e-3):
        tx = contrib.smooth_clip(bound)
        after, state = scan(tx, norms[:, None])
        expected = norms.astype(np.float64) / (1 + norms.astype(np.float64) / bound)
        np.testing.assert_allclose(after[:, 0], expected, rtol=1e-6)
        assert np.all(np.diff(after[:, 0]) >= 0)
        assert np.all(after <= bound)
        assert (state.clip_count, state.nonfinite_count) == (5, 0)
    report = optaxclip.metrics(scan(contrib.smooth_clip(2.0), norms[:4, None])[1])
    assert report["clip_scale"] == 0.5
    assert report["clipped_grad_norm"] == 1.0  # norm times scale, not the threshold


@pytest.mark.parametrize(
    ("bound", "norm", "expected"),
    [(np.inf, 3.0, 3.0), (np.inf, np.inf, np.inf), (0.0, 3.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_smooth_clip_at_its_ends(bound, norm, expected):
    tx = contrib.smooth_clip(bound)
    grads = jnp.array([norm])
    updates, _ = tx.update(grads, tx.init(grads))
    assert updates[0] == expected


def fira(norms, ratio):
    """The published limiter: what is stored is the limited norm."""
    limited = [norms[0]]
    for norm in norms[1:]:
        limited.append(min(norm, ratio * limited[-1]))
    return np.array(limited)


def test_limit_growth():
    """Parity, how often it clips, how slowly it follows, and the floor."""
    steps = 5000
    rise = np.r_[np.ones(10), np.full(steps - 10, 10.0)]
    near_zero = np.ones(steps)
    near_zero[10] = 1e-8
    zero = np.ones(steps)
    zero[10] = 0
    streams = {str(s): lognormal(s, steps) for s in (0.1, 0.3, 0.5)}
    streams |= {"rise": rise, "near": near_zero, "zero": zero}
    grads = {name: np.float32(x)[:, None] for name, x in streams.items()}
    after, _ = scan(contrib.limit_growth(), grads)
    after = {name: np.asarray(x)[:, 0] for name, x in after.items()}
    for sigma, share in (("0.1", 0.83), ("0.3", 0.93), ("0.5", 0.96)):
        norms = grads[sigma][:, 0]
        expected = fira(norms.astype(np.float64), 1.01)
        np.testing.assert_allclose(after[sigma], expected, rtol=1e-4)
        assert np.mean(after[sigma] < norms) == pytest.approx(share, abs=0.01)
    assert np.sum(after["rise"] < 9.999) - 10 == 231
    assert np.sum(after["near"][11:] < 0.9999) == 695  # ln(1 / floor) / ln 1.01
    assert np.all(after["zero"] == zero)  # where it took the published code 1,850


def shrink_by_references(update, parameter, relative, absolute):
    """The published function, without an accumulator."""
    largest = np.abs(parameter) * relative + absolute
    moved = update != 0
    ratios = largest[moved] / np.abs(update[moved])
    return update * min(1.0, ratios.min(initial=1.0))


def test_clippy():
    # The first is what the published test expects: 2 becomes 0.42.
    cases = [(np.array([2.0]), np.array([4.0]), 0.1, 0.02)]
    random = np.random.default_rng(0)
    for scale in (0.01, 1.0, 100.0):
        update, parameter = scale * random.normal(size=5), random.normal(size=5)
        update[0] = parameter[1] = 0
        cases.append((update, parameter, 0.5, 0.01))
    assert shrink_by_references(*cases[0])[0] == pytest.approx(0.42)
    for update, parameter, relative, absolute in cases:
        tx = optax.chain(optax.identity(), contrib.clippy(relative, absolute))
        params = {"w": jnp.float32(parameter), "still": jnp.ones(2)}
        updates = {"w": jnp.float32(update), "still": jnp.zeros(2)}
        after, state = jax.jit(tx.update)(updates, tx.init(params), params)
        expected = shrink_by_references(update, parameter, relative, absolute)
        np.testing.assert_allclose(after["w"], expected, rtol=1e-6)
        assert np.all(after["still"] == 0)
        scale = optaxclip.metrics(state)["clip_scale"]
        np.testing.assert_allclose(scale, expected[-1] / update[-1], rtol=1e-6)


def test_a_parameter_of_zero_holds_its_leaf_down():
    for absolute, largest in ((1e-7, 1e-7), (1e-2, 1e-2)):
        tx = contrib.clippy(0.1, absolute)
        params = jnp.array([1.0, 0.0])
        after, _ = tx.update(jnp.array([0.05, 1.0]), tx.init(params), params)
        np.testing.assert_allclose(jnp.max(after), largest, rtol=1e-6)


def test_clippy_needs_the_parameters_of_all_updates():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = contrib.clippy()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"`update\(params=...\)` must be given"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="all updates, got none at 'b'"):
        tx.update(params, state, {"a": params["a"], "b": None})


def weighted_quantile(norms, q, decay):
    """The first norm up to which the weights sum to the share q of them."""
    weights = decay ** np.arange(len(norms))[::-1]
    order = np.argsort(norms)
    so_far = np.cumsum(weights[order])
    return norms[order][np.searchsorted(so_far, q * so_far[-1])]


@pytest.mark.parametrize("decay", [0.97, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_sketch_is_accurate_to_its_bin(decay):
    norms, accuracy = lognormal(1.0, 300), 0.02
    for q in (0.1003, 0.5003, 0.9503):  # not at the edge between two norms
        rule = contrib.sketched_quantile(q, decay, accuracy=accuracy)
        thresholds, _ = scan(rule, norms)
        assert np.isinf(thresholds[0])
        expected = [weighted_quantile(norms[:i], q, decay) for i in range(1, 300)]
        ratio = np.asarray(thresholds[1:], np.float64) / np.float64(expected)
        assert np.max(np.abs(ratio - 1)) <= accuracy * (1 + 1e-3)
        assert np.max(np.abs(ratio - 1)) >= accuracy / 2


def test_norms_out_of_the_range_of_a_sketch_count_at_its_ends():
    rule = contrib.sketched_quantile(0.5, least=1e-2, most=1e2)
    for norm, end in ((1e-30, 1e-2), (1e30, 1e2)):
        thresholds, state = scan(rule, np.full(5, norm, np.float32))
        np.testing.assert_allclose(thresholds[1:], end, rtol=0.05)
        assert np.isfinite(state.sketch_weights).all()


@pytest.mark.slow
def test_a_sketch_varies_as_the_window_that_it_says():
    """And its default is what the docstring says of its size."""
    decay, sigma, density = 0.98, 0.5, 0.206  # of the log-norm at its 95th percentile
    rule = contrib.sketched_quantile(0.95, decay, accuracy=0.02, least=1e-4, most=1)
    thresholds, _ = scan(rule, lognormal(sigma, 600, (100,)))
    window = (1 + decay) / (1 - decay)
    predicted = np.sqrt(0.95 * 0.05 / window) / density
    logs = np.log(np.asarray(thresholds)[[349, 599]])
    assert np.std(logs) == pytest.approx(predicted, rel=0.15)
    state = contrib.sketched_quantile(0.5).init(jnp.float32(0))
    assert state.sketch_weights.shape == (1153,)


def gradient_stabilizer(norms, decay, square_decay, eps=1e-8):
    """Published: one count for both corrections."""
    mean = square = 0.0
    after = []
    for t, norm in enumerate(norms, 1):
        mean = decay * mean + (1 - decay) * norm
        square = square_decay * square + (1 - square_decay) * norm**2
        fair = mean / (1 - decay**t), square / (1 - square_decay**t)
        after.append(fair[0] / (np.sqrt(fair[1]) + eps))
    return np.array(after)


@pytest.mark.parametrize("decays", [(0.7, 0.9), (0.85, 0.99999)])
def test_adagn(decays):
    norms = lognormal(0.5, 200)
    norms[100] *= 1000
    signs = np.where(np.arange(200) % 2, -1, 1)
    after, state = scan(contrib.adagn(*decays), np.float32(signs * norms)[:, None])
    expected = signs * gradient_stabilizer(norms.astype(np.float64), *decays)
    np.testing.assert_allclose(after[:, 0], expected, rtol=2e-5)
    scale = optaxclip.metrics(state)["clip_scale"]
    np.testing.assert_allclose(scale * norms[-1], abs(expected[-1]), rtol=2e-5)


def test_adagn_remembers_a_spike():
    """Its norm is bounded; those after it need 166 steps. A huge one is no infinity."""
    norms = np.ones(400)
    norms[100] = 1e4
    after, _ = scan(contrib.adagn(), np.float32(norms)[:, None])
    after = np.asarray(after)[:, 0]
    assert after[100] == pytest.approx(0.3 / np.sqrt(0.1), rel=1e-3)
    np.testing.assert_allclose(after[101:104], [0.70, 0.52, 0.38], atol=0.01)
    assert after[101:].min() == pytest.approx(0.0016, abs=1e-4)
    assert np.sum(after[101:] < 0.9) == 166
    norms[100] = 3e38
    after, state = scan(contrib.adagn(), np.float32(norms)[:, None])
    assert np.all(np.isfinite(after))
    assert np.all(np.isfinite(state.rule_state.adagn_rms))


def spam(grads, factor, decay, warmup):
    """With a corrected moment, and without a bound where that is 0."""
    moment = np.zeros(grads.shape[1])
    after = []
    for t, grad in enumerate(grads):
        bound = np.full_like(moment, np.inf)
        if t >= warmup:
            fair = moment / (1 - decay**t)
            bound = np.where(moment > 0, np.sqrt(factor * fair), np.inf)
        grad = np.sign(grad) * np.minimum(np.abs(grad), bound)
        moment = decay * moment + (1 - decay) * grad**2
        after.append(grad)
    return np.array(after)


def test_clip_coordinate_spikes():
    random = np.random.default_rng(0)
    grads = random.normal(size=(300, 6))
    grads[random.random(grads.shape) < 0.02] *= 1e4
    grads[:200, 5] = 0  # a row that is seen late
    tx = contrib.clip_coordinate_spikes(factor=50.0, decay=0.99, warmup=20)
    after, state = scan(tx, np.float32(grads))
    expected = spam(grads, 50.0, 0.99, 20)
    np.testing.assert_allclose(after, expected, rtol=1e-4)
    cut = np.any(expected != grads, axis=1)
    assert state.clip_state.clip_count == cut.sum() > 10
    assert after[200, 5] == np.float32(grads[200, 5])  # not 0 for ever
    huge, state = scan(tx, np.full((3, 1), 3e30, np.float32))
    assert np.all(np.isfinite(state.coordinate_moments[""]))
    assert huge[0, 0] > 0


def test_error_feedback():
    """What was sent and what is left are what came; a spike is paid out in full."""
    random = np.random.default_rng(0)
    grads = random.normal(size=(200, 3)).astype(np.float32)
    tx = contrib.with_error_feedback(optaxclip.clip_by_global_norm(1.5))
    after, state = scan(tx, grads)
    error, expected = np.zeros(3), []
    for grad in grads.astype(np.float64):
        total = grad + error
        expected.append(total * min(1, 1.5 / np.linalg.norm(total)))
        error = total - expected[-1]
    np.testing.assert_allclose(after, expected, atol=1e-4)
    np.testing.assert_allclose(state.feedback_error[""], error, atol=1e-4)
    assert 50 < state.inner_state.clip_count < 200

    spike = np.zeros((1100, 1), np.float32)
    spike[0] = 1000
    tx = contrib.with_error_feedback(optaxclip.clip_by_global_norm(1.0))
    after, _ = scan(tx, spike)
    assert np.sum(after > 0.999) == 1000


def test_error_feedback_sends_what_rounding_left_out():
    tx = contrib.with_error_feedback(optaxclip.clip_by_global_norm(0.01))
    state, sent = tx.init(jnp.zeros(2, jnp.bfloat16)), 0
    step, grad = jax.jit(tx.update), jnp.full(2, 0.1001, jnp.bfloat16)
    for _ in range(32):
        updates, state = step(grad, state)
        assert updates.dtype == jnp.bfloat16
        sent += np.float64(updates)
    np.testing.assert_allclose(
        sent + state.feedback_error[""], 32 * np.float64(grad), rtol=1e-5
    )


def test_error_feedback_that_does_not_fit_leaves_no_trace():
    tx = contrib.with_error_feedback(optaxclip.clip_by_global_norm(1.0))
    state = tx.init(jnp.zeros(1))
    for grad in [3.0, 3e38, np.inf, np.nan, 3e38]:
        update, state = tx.update(jnp.array([grad]), state)
        np.testing.assert_array_equal(state.feedback_error[""], [2.0])
    for grad, left in [(0.5, 1.5), (0.0, 0.5), (0.0, 0.0)]:
        update, state = tx.update(jnp.array([grad]), state)
        np.testing.assert_allclose(state.feedback_error[""], [left], atol=1e-6)
    np.testing.assert_array_equal(update, [0.5])


def test_error_feedback_saturates_in_the_dtype_of_the_leaf():
    open_at_last = optaxclip.clip_by_global_norm(lambda i: jnp.where(i < 5, 1.0, 1e6))
    tx, grad = contrib.with_error_feedback(open_at_last), jnp.full(4, 3e4, jnp.float16)
    state, sent = tx.init(grad), np.zeros(4)
    for i in range(10):
        update, state = tx.update(grad, state)
        assert np.all(np.isfinite(update))
        if i == 5:
            np.testing.assert_array_equal(update, np.finfo(np.float16).max)
        sent += np.asarray(update, np.float64)
    left = state.feedback_error[""]
    np.testing.assert_allclose(sent + left, np.full(4, 10 * 3e4), rtol=1e-5)


def test_the_derivative_of_clippy_where_nothing_moves():
    tx, params = contrib.clippy(0.5, 0.0), jnp.array([0.0, 4.0])

    def clipped(update):
        return jnp.sum(tx.update(update, tx.init(params), params)[0])

    np.testing.assert_allclose(jax.grad(clipped)(jnp.array([0.0, 1.0])), [1, 1])
