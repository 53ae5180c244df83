"""The rule `quantile`: `numpy.quantile` of the window, at every step."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from streams import lognormal, scan

from optaxclip import quantile


def reference(norms, q, window, include_current=False):
    """`numpy.quantile` of the last norms at every step, in float64."""
    norms = np.asarray(norms, np.float32).astype(np.float64)
    ends = np.arange(len(norms)) + include_current
    windows = [norms[max(0, end - window) : end] for end in ends]
    return np.array([np.quantile(w, q) if len(w) else np.inf for w in windows])


STREAMS = {
    "ordinary": lognormal(0.5, 300),
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
@pytest.mark.sample(2)
def test_equals_numpy_at_every_step(q, window, include_current):
    """Partly filled, exactly filled and wrapped around, on every stream at once."""
    rule = quantile(q, window, include_current=include_current)
    streams = np.stack(list(STREAMS.values()), axis=1)
    thresholds, _ = scan(rule, streams)
    for column, name in enumerate(STREAMS):
        expected = reference(streams[:, column], q, window, include_current)
        np.testing.assert_allclose(thresholds[:, column], expected, 1e-6, err_msg=name)


@pytest.mark.parametrize("q", [0.95, 0.95005, 0.123456])
def test_rank_is_exact_in_a_large_window(q):
    """A float32 rank near 9500 is off by up to 0.0005: of a gap of 1e30, too much."""
    window = 10_000
    low = np.sort(lognormal(0.5, window))
    rank = int(q * (window - 1))
    norms = np.concatenate([low[: rank + 1], 1e30 * low[rank + 1 :]])
    thresholds, _ = scan(quantile(q, window), np.append(norms, 1.0))
    expected = np.quantile(norms.astype(np.float32).astype(np.float64), q)
    np.testing.assert_allclose(thresholds[-1], expected, 1e-6)


def test_a_number_of_many_digits_does_not_overflow_its_rank():
    norms, q = lognormal(0.5, 1000), 0.987654321
    thresholds, _ = scan(quantile(q, 1000), np.append(norms, 1.0))
    np.testing.assert_allclose(thresholds[-1], np.quantile(norms, q), 1e-5)


@pytest.mark.parametrize(
    ("q", "window"), [(0.9, 11), (0.3, 11), (0.95, 101), (np.float32(0.6), 6)]
)
def test_whole_rank_is_a_norm(q, window):
    """Binary 0.9 is above 0.9: the excess must not let in a part of the next norm."""
    rank = round(q * (window - 1))
    norms = np.where(np.arange(window) <= rank, 1.0, 1e38)
    thresholds, _ = scan(quantile(q, window), np.append(norms, 1.0))
    assert thresholds[-1] == 1.0


def test_never_beyond_the_norms_around_it():
    norms = lognormal(3, 2000, seed=3)
    thresholds, _ = scan(quantile(0.999, 7), norms)
    for step in range(7, 2000):
        assert thresholds[step] <= norms[step - 7 : step].max()


@pytest.mark.parametrize("min_count", [2, 10])
@pytest.mark.parametrize("include_current", [False, True])
def test_no_threshold_before_min_count(min_count, include_current):
    norms = lognormal(0.5, 30)
    rule = quantile(0.5, 10, min_count=min_count, include_current=include_current)
    thresholds, _ = scan(rule, norms)
    first = min_count - include_current
    assert np.all(np.isinf(thresholds[:first]))
    expected = reference(norms, 0.5, 10, include_current)
    np.testing.assert_allclose(thresholds[first:], expected[first:], 1e-6)


def test_a_zero_is_not_in_the_window_that_includes_the_current_norm():
    norms = lognormal(0.5, 121)
    norms[[0, 120]] = 0
    thresholds, _ = scan(quantile(0.9, 50, include_current=True), norms)
    assert thresholds[0] == np.inf
    np.testing.assert_allclose(thresholds[120], np.quantile(norms[70:120], 0.9), 1e-6)


@pytest.mark.parametrize(("q", "window"), [(0.95, 100), (0.95, 101), (0.9, 11)])
def test_burst_that_fits_does_not_move_it(q, window):
    """floor((1 - q)(N - 1)) spikes leave it among ordinary norms, one more does not."""
    tolerated = math.floor((1 - Fraction(str(q))) * (window - 1))
    ordinary = lognormal(0.5, 2 * window)
    for spikes, moved in [(tolerated, False), (tolerated + 1, True)]:
        norms = np.r_[ordinary, np.full(spikes, 1e6), ordinary]
        thresholds, _ = scan(quantile(q, window), norms)
        assert (thresholds[window:].max() > ordinary.max()) == moved


@pytest.mark.parametrize(("q", "window"), [(0.95, 101), (0.5, 11), (0.9, 21)])
def test_share_beyond_it_is_the_nominal_one(q, window):
    """Of i.i.d. norms, 1 - ((N - 1) q + 1) / (N + 1), within four standard errors.

    Exact for whole ranks; between two norms, interpolation changes it a little.
    """
    norms = lognormal(0.5, 4000, (32,))
    thresholds, _ = scan(quantile(q, window), norms)
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
    norms = lognormal(0.5, 1500)
    norms[500:1000] *= factor
    thresholds, _ = scan(quantile(q, window), norms)
    scales = np.minimum(1, thresholds / norms)
    usual = scales[200:500].mean()
    assert scales[500 + rise : 600 + rise].mean() > 0.9 * usual
    assert thresholds[500] < 1.5 * thresholds[400:500].mean()
    after = thresholds[1000 + fall :]
    assert 0.7 < after.mean() / thresholds[200:500].mean() < 1.4


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


def test_injected_and_scheduled_quantile():
    norms = lognormal(0.5, 60)
    make = optax.inject_hyperparams(quantile, static_args=("window", "min_count"))
    thresholds, _ = scan(make(0.9, 20), norms)
    np.testing.assert_allclose(thresholds, reference(norms, 0.9, 20), 1e-5)
    thresholds, _ = scan(make(lambda step: jnp.where(step < 30, 0.1, 2.0), 20), norms)
    expected = np.r_[reference(norms, 0.1, 20)[:30], reference(norms, 1, 20)[30:]]
    np.testing.assert_allclose(thresholds, expected, 1e-5)


@pytest.mark.parametrize("static", [(), ("window",)])
def test_injected_window_says_how(static):
    make = optax.inject_hyperparams(quantile, static_args=static)
    argument = "min_count" if static else "window"
    message = rf"`quantile\({argument}=.*static_args=\('{argument}', \.\.\.\)"
    with pytest.raises(ValueError, match=message):
        make(0.5, 9).init(jnp.float32(0))


def test_compiled_update_is_elementwise():
    """No sort, no loop: some passes over two windows."""
    window = 10_000
    rule = quantile(0.95, window)
    norm = jnp.float32(1)
    step = jax.jit(rule.update, donate_argnums=1).lower(norm, rule.init(norm)).compile()
    text = step.as_text()
    assert not any(f" {op}(" in text for op in ("sort", "while", "scatter"))
    assert step.cost_analysis()["bytes accessed"] < 20 * 4 * window


@pytest.mark.parametrize("include_current", [False, True])
def test_a_ramp_multiplies_by_the_share_of_the_norms_that_it_waits_for(include_current):
    norms = np.random.default_rng(0).lognormal(size=60)
    kwargs: dict = {"include_current": include_current}
    plain, _ = scan(quantile(0.3, 40, **kwargs), norms)
    ramped, _ = scan(quantile(0.3, 40, ramp=25, **kwargs), norms)
    recorded = np.arange(60) + include_current
    share = np.minimum(recorded / 25, 1.0)
    finite = slice(1 - include_current, None)
    np.testing.assert_allclose(ramped[finite], (share * plain)[finite], rtol=1e-6)
    assert np.all(np.isinf(ramped[: 1 - include_current]))


def test_only_recorded_norms_carry_a_ramp_on():
    """Zeros and bad steps leave it where it is."""
    rule = quantile(0.5, 10, ramp=10, include_current=True)
    thresholds, _ = scan(rule, np.array([1.0, 0.0, np.nan, 1.0, np.inf, 1.0]))
    np.testing.assert_allclose(thresholds, [0.1, 0.1, 0.1, 0.2, 0.2, 0.3], rtol=1e-6)


@pytest.mark.parametrize("ramp", [-1, 11, 1.0, True])
def test_a_ramp_is_a_number_of_norms_of_the_window(ramp):
    with pytest.raises(ValueError, match=r"`quantile\(ramp=.*from 0 to 10, got"):
        quantile(0.5, 10, ramp=ramp)
