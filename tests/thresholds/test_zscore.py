"""The rule `zscore`: the published recursion, and what its defaults mend in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_bits
from streams import lognormal, scan, with_spikes

from optaxclip import zscore
from optaxclip.rules import at_bound, at_mean, moments, reciprocal, unchanged

EPS = 2.5e-6  # of the published code: 1e-6 in the z-score, times z_threshold


def published(answer):
    return zscore(start=moments, response=answer, record=answer, min_deviation=0.0)


PUBLISHED = published(functools.partial(reciprocal, eps=EPS))


def zclip(norms, mode="reciprocal", factor=1.0, alpha=0.97, z_max=2.5, warmup=25):
    """The published recursion in float64; infinity where it does not clip."""
    norms = norms.astype(np.float64)
    mean, variance = norms[:warmup].mean(), norms[:warmup].var()
    thresholds = [np.inf] * warmup
    for norm in norms[warmup:]:
        sigma = np.sqrt(variance)
        z = (norm - mean) / (sigma + 1e-6)
        threshold = {
            "reciprocal": (mean + z_max**2 * sigma / z) * factor,
            "mean": mean,
            "percentile": mean + z_max * sigma,
        }[mode]
        outlying = norm > threshold if mode == "percentile" else z > z_max
        thresholds.append(threshold if outlying else np.inf)
        recorded = threshold if outlying else norm
        mean = alpha * mean + (1 - alpha) * recorded
        variance = alpha * variance + (1 - alpha) * (recorded - mean) ** 2
    return np.array(thresholds), mean, np.sqrt(variance)


def robust_zclip(norms, alpha=0.97, z_max=2.5, warmup=25, min_deviation=0.01):
    """The default recursion in float64: what it clips to, or the bound."""
    norms = norms.astype(np.float64)
    low, mean, high = np.percentile(norms[:warmup], [25, 50, 75])
    sigma = (high - low) / 1.349
    thresholds = [np.inf] * warmup
    for norm in norms[warmup:]:
        reach = z_max * max(sigma, min_deviation * mean)
        excess = norm - mean
        thresholds.append(mean + (reach**2 / excess if excess > reach else reach))
        recorded = min(norm, mean + reach)
        mean = alpha * mean + (1 - alpha) * recorded
        sigma = np.sqrt(alpha * sigma**2 + (1 - alpha) * (recorded - mean) ** 2)
    return np.array(thresholds), mean, sigma


MODES = {
    "reciprocal": (functools.partial(reciprocal, eps=EPS), {}),
    "factor 0.5": (functools.partial(reciprocal, eps=EPS, factor=0.5), {"factor": 0.5}),
    "factor 1.3": (functools.partial(reciprocal, eps=EPS, factor=1.3), {"factor": 1.3}),
    "mean": (functools.partial(at_mean, eps=EPS), {"mode": "mean"}),
    "percentile": (at_bound, {"mode": "percentile"}),
}


# An average forgets a rounding in 1 / (1 - decay) = 33 steps, each of which adds two:
# 4e-6 at most. No norm is that close to its bound: all are 7e-5 or more away from it.
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 4e-6), ("float64", 1e-10)])
@pytest.mark.parametrize("sigma", [0.1, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sample(3)
def test_options_reproduce_the_published_recursion(mode, sigma, dtype, rtol):
    norms = with_spikes(sigma).astype(dtype)
    answer, options = MODES[mode]
    with jax.enable_x64(dtype == "float64"):
        thresholds, state = scan(published(answer), norms)
    thresholds = np.asarray(thresholds)
    assert thresholds.dtype == dtype
    expected, mean, deviation = zclip(norms, **options)
    clipped = np.isfinite(expected)
    assert clipped.sum() > 50
    np.testing.assert_allclose(thresholds[clipped], expected[clipped], rtol=rtol)
    assert np.all(thresholds[~clipped] >= norms[~clipped])
    np.testing.assert_allclose(state.zscore_mean, mean, rtol=rtol)
    np.testing.assert_allclose(state.zscore_deviation, deviation, rtol=10 * rtol)


@pytest.mark.parametrize("sigma", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("warmup", [1, 24, 25])
def test_the_default_is_its_equation(warmup, sigma):
    norms = with_spikes(sigma)
    thresholds, state = scan(zscore(warmup=warmup), norms)
    expected, mean, deviation = robust_zclip(norms, warmup=warmup)
    np.testing.assert_allclose(thresholds, expected, rtol=1e-6)
    np.testing.assert_allclose(state.zscore_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(state.zscore_deviation, deviation, rtol=1e-4)


def test_in_float64_it_is_its_equation_to_the_last_digits():
    with jax.enable_x64(True):
        norms = with_spikes(0.3, 1000).astype(np.float64)
        thresholds, state = scan(zscore(), norms)
        assert thresholds.dtype == state.zscore_deviation.dtype == np.float64
        np.testing.assert_allclose(thresholds, robust_zclip(norms)[0], rtol=1e-12)


# What follows measures on 100 streams at once, after 600 steps of ordinary norms.
BEFORE, STREAMS = 600, (100,)


def scales_after_a_shift(rule, sigma, factor, steps=400):
    """Usual scale, and the scales of the steps after all norms grew by a factor."""
    norms = lognormal(sigma, BEFORE + steps, STREAMS)
    norms[BEFORE:] *= factor
    scales = np.minimum(1, scan(rule, norms)[0] / norms)
    return scales[BEFORE - 200 : BEFORE].mean(), scales[BEFORE:]


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5])
@pytest.mark.parametrize(
    ("factor", "within"), [(1.5, 10), (2, 20), (4, 35), (10, 50), (100, 85)]
)
@pytest.mark.sample(3)
def test_it_recovers_from_a_lasting_rise(factor, within, sigma):
    # Averaged over the streams, at every step from then on.
    usual, scales = scales_after_a_shift(zscore(), sigma, factor)
    assert np.all(scales[within:].mean(axis=1) >= 0.9 * usual)
    # In every stream, averaged over the next 100 steps.
    start = {1.5: 0, 2: 0, 4: 25, 10: 45, 100: 80}[factor]
    assert np.all(scales[start : start + 100].mean(axis=0) >= 0.9 * usual)


def test_the_published_recursion_never_does():
    usual, scales = scales_after_a_shift(PUBLISHED, 0.1, 2, steps=3000)
    assert np.all(scales[-100:].mean(axis=0) < 0.6 * usual)


@pytest.mark.parametrize("factor", [0.5, 0.01])
def test_it_follows_a_lasting_fall(factor):
    norms = lognormal(0.1, BEFORE + 800, STREAMS)
    norms[BEFORE:] *= factor
    thresholds = np.asarray(scan(zscore(), norms)[0])
    assert np.mean(thresholds[BEFORE:] < norms[BEFORE:]) < 0.03
    bounds = np.maximum(thresholds, norms)
    usual = np.median(bounds[BEFORE - 100 : BEFORE])
    assert np.median(bounds[-100:]) == pytest.approx(factor * usual, rel=0.05)
    assert np.median(bounds[BEFORE + 500]) < 1.5 * factor * usual


@pytest.mark.parametrize(
    ("sigma", "mean_ratio", "worst"), [(0.1, 1.02, 1.1), (0.3, 1.1, 1.25)]
)
def test_an_isolated_spike_is_cut_to_about_the_median(sigma, mean_ratio, worst):
    norms = lognormal(sigma, BEFORE + 100, STREAMS)
    spikes = [BEFORE, BEFORE + 50]
    norms[spikes] = 1000 * 0.01
    ratios = scan(zscore(), norms)[0][np.array(spikes)] / np.median(norms)
    assert np.all(ratios.mean(axis=1) <= mean_ratio)
    assert np.all(ratios <= worst)


@pytest.mark.parametrize("size", [1e1, 1e5, 1e30])
def test_the_size_of_a_spike_does_not_matter_to_what_follows(size):
    norms = lognormal(0.1, 200)
    norms[100] = size
    thresholds, _ = scan(zscore(), norms)
    norms[100] = 1.0
    expected, _ = scan(zscore(), norms)
    np.testing.assert_array_equal(thresholds[101:], expected[101:])


def test_the_share_of_clipped_steps():
    # P(z > 2.5) is 0.6% of normal norms; mean and deviation are those of 33 norms.
    norms = lognormal(0.1, 5000, (10,))
    clipped = np.asarray(scan(zscore(), norms)[0] < norms)
    assert 0.01 < clipped.mean() < 0.025


@pytest.mark.parametrize("spikes", [1, 5])
def test_spikes_in_the_warmup_are_ignored(spikes):
    norms = lognormal(0.3, 60, STREAMS)
    clean = np.asarray(scan(zscore(), norms)[0])[25:]
    norms[3 : 3 + spikes] *= 1e4
    thresholds = np.asarray(scan(zscore(), norms)[0])[25:]
    # The median of the streams; the quartiles of 25 norms with 5 spikes are coarse.
    assert np.median(thresholds / clean) < {1: 1.1, 5: 1.7}[spikes]
    assert np.all(thresholds < 6 * 0.01)
    assert np.median(scan(PUBLISHED, norms)[0][25:] / clean) > 100


def test_norms_that_do_not_vary():
    norms = np.full(300, 0.01, np.float32)
    norms[100:] *= 3
    thresholds = np.asarray(scan(zscore(), norms)[0])
    np.testing.assert_allclose(thresholds[25:100] / 0.01, 1.025, rtol=1e-6)
    assert np.all(thresholds[200:] >= norms[200:])


def test_there_is_no_way_to_stay_at_the_floor():
    norms = lognormal(0.1, 7600)
    norms[100:7000] = 1e-37
    thresholds = np.asarray(scan(zscore(), norms)[0])
    assert thresholds.min() == thresholds[6999] == np.float32(1e-12)
    assert np.all(np.minimum(1, thresholds / norms)[-100:] > 0.7)


@pytest.mark.parametrize("exponent", [-60, 60])
def test_it_has_no_scale_of_its_own(exponent):
    norms = with_spikes(0.3, 500)
    rule = zscore(floor=0.0)
    thresholds, _ = scan(rule, norms)
    scaled, _ = scan(rule, norms * np.float32(2.0**exponent))
    np.testing.assert_array_equal(scaled, thresholds * np.float32(2.0**exponent))


def test_norms_of_zero_are_not_remembered():
    """During the warm-up and after it."""
    norms = lognormal(0.3, 100)
    _, expected = scan(zscore(), norms)
    _, state = scan(zscore(), np.insert(norms, [0, 10, 50, 50], np.float32(0)))
    assert_same_bits(state, expected)


def test_what_is_recorded_raw_opens_the_clip():
    norms = lognormal(0.1, 200)
    norms[100] = 10.0
    raw, _ = scan(zscore(record=unchanged), norms)
    assert raw[101] > 10 * scan(zscore(), norms)[0][101]


@pytest.mark.parametrize("rule", [zscore(), PUBLISHED], ids=["default", "published"])
def test_a_larger_spike_has_no_larger_threshold(rule):
    norms = np.ones(60, np.float32)
    slope = jax.grad(lambda spike: scan(rule, jnp.append(norms, spike))[0][-1])
    assert slope(jnp.float32(2.0)) <= 0
    assert -1e-3 < slope(jnp.float32(100.0)) <= 0
