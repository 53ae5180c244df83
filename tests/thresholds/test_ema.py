"""The rule `ema`: AdaGC's recursion, its speed and its guards."""

import jax
import numpy as np
import pytest
from streams import lognormal, scan

from optaxclip import ema
from optaxclip.rules import at_bound, average, smallest, unchanged


def running_mean(norms, ratio, decay, warmup, start, capped):
    """The recursion in float64."""
    norms = norms.astype(np.float64)
    mean, thresholds = start(norms[:warmup]), [np.inf] * warmup
    for norm in norms[warmup:]:
        thresholds.append(ratio * mean)
        recorded = min(norm, ratio * mean) if capped else norm
        mean = decay * mean + (1 - decay) * recorded
    return np.array(thresholds), mean


# In float32 the mean drifts by its roundings: near a ratio of 1 nothing pulls it back.
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-6), ("float64", 1e-12)])
@pytest.mark.parametrize(
    ("start", "start_of"), [(smallest, np.min), (average, np.mean)]
)
@pytest.mark.parametrize("record", [at_bound, unchanged])
@pytest.mark.parametrize("arguments", [(1.05, 0.98, 100), (3.0, 0.5, 1)])
def test_it_is_its_equation(arguments, record, start, start_of, dtype, rtol):
    norms = lognormal(0.5, 5000).astype(dtype)
    norms[::97] *= 100
    with jax.enable_x64(dtype == "float64"):
        thresholds, state = scan(ema(*arguments, start=start, record=record), norms)
    expected, mean = running_mean(norms, *arguments, start_of, record is at_bound)
    assert thresholds.dtype == state.ema_mean.dtype == dtype
    np.testing.assert_allclose(thresholds, expected, rtol=rtol)
    np.testing.assert_allclose(state.ema_mean, mean, rtol=rtol)


@pytest.mark.parametrize("ratio", [1.05, 2.0])
@pytest.mark.parametrize("size", [1e2, 1e30])
def test_one_norm_raises_the_threshold_by_no_more_than_its_factor(size, ratio):
    norms = lognormal(0.1, 300)
    norms[200] = size
    thresholds = np.asarray(scan(ema(ratio), norms)[0])
    growth = 0.98 + 0.02 * ratio
    assert thresholds[201] / thresholds[200] == pytest.approx(growth, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "factor", "within"),
    [
        ({}, 1.5, 300),
        ({}, 2, 600),
        ({}, 4, 1350),
        ({"ratio": 2.0, "start": average}, 2, 5),
        ({"ratio": 2.0, "start": average}, 4, 40),
        ({"ratio": 2.0, "start": average}, 10, 90),
        ({"ratio": 2.0, "start": average}, 100, 210),
    ],
)
def test_it_recovers_from_a_lasting_rise(arguments, factor, within):
    norms = lognormal(0.1, 1000 + within + 200, (50,))
    norms[1000:] *= factor
    scales = np.minimum(1, scan(ema(**arguments), norms)[0] / norms)
    usual = scales[800:1000].mean()
    assert np.all(scales[1000 + within :].mean(axis=1) >= 0.9 * usual)
    # And not much sooner: the stated number says something.
    assert scales[1000 + within // 2].mean() < 0.9 * usual or within < 10


@pytest.mark.parametrize(
    ("sigma", "clipped", "kept"),
    [(0.1, 0.42, 0.97), (0.3, 0.71, 0.77), (0.5, 0.79, 0.56)],
)
def test_adagc_clips_most_steps(sigma, clipped, kept):
    norms = lognormal(sigma, 6000, (10,))
    thresholds = np.asarray(scan(ema(), norms)[0])[3000:]
    norms = norms[3000:]
    assert np.mean(norms > thresholds) == pytest.approx(clipped, abs=0.02)
    after = np.minimum(norms, thresholds)
    assert after.mean() / norms.mean() == pytest.approx(kept, abs=0.02)


def test_a_spike_in_the_warmup_does_not_move_the_smallest():
    norms = lognormal(0.3, 200)
    expected, _ = scan(ema(), norms)
    norms[50] *= 1e4
    np.testing.assert_array_equal(scan(ema(), norms)[0], expected)
    assert scan(ema(start=average), norms)[0][100] > 50 * 0.01


def test_there_is_no_way_to_stay_at_the_floor():
    norms = lognormal(0.1, 3000)
    norms[100:2000] = 2e-38
    thresholds = np.asarray(scan(ema(2.0, 0.9, 10, floor=1e-6), norms)[0])
    assert thresholds.min() == thresholds[1999] == np.float32(1e-6)
    assert np.all(thresholds[-100:] > norms[-100:])


@pytest.mark.parametrize("exponent", [-60, 60])
def test_it_has_no_scale_of_its_own(exponent):
    norms = lognormal(0.3, 300)
    rule = ema(floor=0.0)
    scaled, _ = scan(rule, norms * np.float32(2.0**exponent))
    expected = scan(rule, norms)[0] * np.float32(2.0**exponent)
    np.testing.assert_array_equal(scaled, expected)
