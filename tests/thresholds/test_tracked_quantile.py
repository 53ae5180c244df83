"""The rule `tracked_quantile`: its exact coverage, its spread, its start, its floor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import lognormal, scan

from optaxclip import tracked_quantile


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


@pytest.mark.parametrize("start", [None, 0.2, 30.0])
@pytest.mark.parametrize(("q", "rate"), [(0.95, 0.05), (0.5, 0.2), (0.1, 0.01)])
def test_equals_the_recursion(q, rate, start):
    norms = lognormal(0.5, 2000, median=1)
    norms[[0, 1, 500]] = 0
    thresholds, _ = scan(tracked_quantile(q, rate, start=start), norms)
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
    """sqrt(rate q (1 - q) / (2 f)) within 15%, f the density of the log-norm."""
    sigma, streams = 0.5, 256
    deviate = {0.5: 0.0, 0.9: 1.2815516, 0.95: 1.6448536}[q]
    density = np.exp(-(deviate**2) / 2) / (sigma * np.sqrt(2 * np.pi))
    start = float(np.exp(sigma * deviate))
    norms = lognormal(sigma, 4000, (streams,), median=1)
    thresholds, _ = scan(tracked_quantile(q, rate, start=start), norms)
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
    thresholds, _ = scan(tracked_quantile(0.95, 0.05), norms)
    assert thresholds[21] / thresholds[20] == pytest.approx(np.exp(0.05 * 0.95), 1e-5)
    assert thresholds[1:].max() < 1.06


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_bad_start_is_made_good_in_the_stated_steps(factor):
    q, rate = 0.9, 0.1
    pace = rate * (q if factor < 1 else 1 - q)
    steps = int(np.ceil(np.log(10) / pace))
    thresholds, _ = scan(tracked_quantile(q, rate, start=factor), np.ones(2 * steps))
    gap = np.abs(np.log(thresholds))
    assert gap[steps - 2] > 0.5 * pace
    assert gap[steps + 1 :].max() < rate


def test_floor():
    """Norms that all but vanish hold it at the floor, from where it comes back."""
    norms = np.r_[np.ones(10), np.full(2000, 1e-20), np.ones(300)]
    thresholds, _ = scan(tracked_quantile(0.5, 0.2, floor=1e-6), norms)
    assert thresholds.min() == pytest.approx(1e-6, rel=1e-5)
    assert thresholds.min() > 0
    assert thresholds[2009] == pytest.approx(1e-6, rel=1e-5)
    assert thresholds[-1] == pytest.approx(1.0, rel=0.2)
    thresholds, _ = scan(
        tracked_quantile(0.5, 0.2, floor=1.0), np.array([1e-20, 1e-20, 5.0])
    )
    np.testing.assert_allclose(thresholds, [np.inf, 1, 1], 1e-6)


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


def test_scheduled_rate():
    """A fast start, then a slow pace; the threshold does not jump when it changes."""
    norms = lognormal(0.5, 60, median=1)

    def rate(step):
        return jnp.where(step < 30, 0.5, 0.01)

    thresholds, _ = scan(optax.inject_hyperparams(tracked_quantile)(0.9, rate), norms)
    fast = reference(norms, 0.9, 0.5)
    np.testing.assert_allclose(thresholds[:31], fast[:31], 1e-5)
    slow = reference(norms[30:], 0.9, 0.01, start=fast[30])
    np.testing.assert_allclose(thresholds[30:], slow, 1e-5)
