"""The rule `zscore`: the published recursion, and what its defaults mend in it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaxclip._thresholds.lowest import lowest
from optaxclip._thresholds.zscore import moments, zscore
from optaxclip.rules import at_bound, at_mean, reciprocal, unchanged

EPS = 2.5e-6  # of the published code: 1e-6 in the z-score, times z_threshold


def published(answer):
    return zscore(start=moments, response=answer, record=answer, min_deviation=0.0)


PUBLISHED = published(functools.partial(reciprocal, eps=EPS))


@functools.partial(jax.jit, static_argnums=0)
def scan(rule, norms):
    """Thresholds of a stream of (trees of) norms, and the state after it."""

    def step(state, norm):
        thresholds, state = rule.update(norm, state)
        return state, thresholds

    first = jax.tree.map(lambda n: n[0], norms)
    state, thresholds = jax.lax.scan(step, rule.init(first), norms)
    return thresholds, state


def lognormal(sigma, steps, streams=(), seed=0):
    noise = np.random.default_rng(seed).standard_normal((steps, *streams))
    return (0.01 * np.exp(sigma * noise)).astype(np.float32)


def with_spikes(sigma, steps=5000, seed=0):
    norms = lognormal(sigma, steps, seed=seed)
    norms[np.random.default_rng(seed + 1).random(steps) < 0.01] *= 100
    return norms


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


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float64", 1e-10)])
@pytest.mark.parametrize("sigma", [0.1, 0.5])
@pytest.mark.parametrize("mode", MODES)
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


def test_a_cap_does_not_enter_the_memory():
    norms = with_spikes(0.3, 500)
    free, free_state = scan(PUBLISHED, norms)
    capped, (state, _) = scan(lowest(PUBLISHED, 0.011), norms)
    np.testing.assert_array_equal(capped, np.minimum(free, np.float32(0.011)))
    jax.tree.map(np.testing.assert_array_equal, state, free_state)


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
    # P(z > 2.5) is 0.6 % of normal norms; mean and deviation are those of 33 norms.
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


def test_zeros_get_a_threshold_and_leave_no_trace():
    norms = lognormal(0.1, 300)
    zero = np.zeros(100, np.float32)
    with_zeros = np.concatenate([zero[:1], norms[:10], zero, norms[10:150], zero])
    expected, expected_state = scan(zscore(), norms[:150])
    thresholds, state = scan(zscore(), with_zeros)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    np.testing.assert_array_equal(thresholds[with_zeros > 0], expected)
    assert np.all(thresholds[with_zeros == 0] > 0)
    assert np.isfinite(thresholds[-1])


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


@pytest.mark.parametrize("rule", [zscore(), PUBLISHED], ids=["default", "published"])
def test_every_norm_has_its_own_memory(rule):
    tree = {
        "scalar": lognormal(0.1, 80, seed=1),
        "units": [lognormal(0.3, 80, (1, 3), seed=2), None],
    }
    tree["units"][0][5:30, 0, 1] = 0.0  # this one warms up later
    thresholds, state = scan(rule, tree)
    expected, _ = scan(rule, tree["scalar"])
    np.testing.assert_allclose(thresholds["scalar"], expected, rtol=1e-6)
    for unit in range(3):
        expected, alone = scan(rule, tree["units"][0][:, 0, unit])
        np.testing.assert_allclose(
            thresholds["units"][0][:, 0, unit], expected, rtol=1e-6
        )
        assert alone.zscore_count == state.zscore_count["units"][0][0, unit] == 25


def test_eager_jit_scan_and_vmap_agree():
    norms = lognormal(0.3, 40, (2,))
    norms[30] *= 100
    rule = zscore(warmup=5)
    scanned, _ = scan(rule, norms)
    mapped, _ = jax.vmap(functools.partial(scan, rule), 1, (1, 0))(norms)
    compiled = jax.jit(rule.update)
    eager_state = jit_state = rule.init(norms[0])
    eager, jitted = [], []
    for norm in norms:
        threshold, eager_state = rule.update(jnp.asarray(norm), eager_state)
        eager.append(threshold)
        threshold, jit_state = compiled(jnp.asarray(norm), jit_state)
        jitted.append(threshold)
    for other in (mapped, np.stack(eager), np.stack(jitted)):
        np.testing.assert_allclose(other, scanned, rtol=1e-6)


def test_the_state_keeps_its_form():
    rule = zscore()
    norms = {"w": jnp.ones((1, 3)), "b": jnp.ones(()), "none": None}
    state = rule.init(norms)
    thresholds, after = jax.jit(rule.update)(norms, state)
    assert jax.tree.map(jax.typeof, thresholds) == jax.tree.map(jax.typeof, norms)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)
    for one in (state, after):
        buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(one)]
        assert len(set(buffers)) == len(buffers) == 8
    empty = rule.init({})
    assert rule.update({}, empty) == ({}, empty)


def test_it_composes_with_optax():
    norms = with_spikes(0.3, 100)
    expected, _ = scan(zscore(), norms)
    doubled, _ = scan(optax.chain(zscore(), optax.scale(2.0)), norms)
    np.testing.assert_array_equal(doubled, 2 * expected)


def test_arguments_may_be_traced():
    norms = with_spikes(0.3, 100)
    traced = jax.jit(lambda z, decay: scan(zscore(z, decay), norms)[0])
    np.testing.assert_allclose(traced(2.0, 0.9), scan(zscore(2.0, 0.9), norms)[0], 1e-5)


def test_what_is_recorded_raw_opens_the_clip():
    norms = lognormal(0.1, 200)
    norms[100] = 10.0
    raw, _ = scan(zscore(record=unchanged), norms)
    assert raw[101] > 10 * scan(zscore(), norms)[0][101]


@pytest.mark.parametrize("rule", [zscore(), PUBLISHED], ids=["default", "published"])
def test_derivatives_are_finite(rule):
    def total(norms):
        thresholds = scan(rule, norms)[0]
        return jnp.sum(jnp.where(jnp.isinf(thresholds), 0, thresholds))

    norms = np.concatenate([np.zeros(2), np.ones(60), [100.0]]).astype(np.float32)
    slopes = np.asarray(jax.grad(total)(norms))
    assert np.all(np.isfinite(slopes))
    assert np.all(slopes[:-1] == 0)
    assert slopes[-1] <= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z_threshold": 0.0}, "`zscore(z_threshold=...)` must be positive, got 0.0."),
        ({"decay": 1.0}, "`zscore(decay=...)` must be in [0, 1), got 1.0."),
        (
            {"warmup": 0},
            "`zscore(warmup=...)` must be an integer of at least 1, got 0.",
        ),
        (
            {"min_deviation": -1.0},
            "`zscore(min_deviation=...)` must be non-negative, got -1.0.",
        ),
        ({"floor": np.nan}, "`zscore(floor=...)` must be non-negative, got nan."),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        zscore(**arguments)
