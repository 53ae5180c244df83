"""Every adaptive clip on streams of norms: recovery, spikes, bad steps, shares."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import GUARD, assert_same_bits
from streams import infinite

import optaxclip
from optaxclip import clip_by, global_norm, leaf_norm, quantile, tracked_quantile

MEDIAN = optax.chain(quantile(0.5, 100), optax.scale(2.0))
CLIPS = {
    "default": optaxclip.clip_by_percentile(),
    "percentile": optaxclip.clip_by_percentile(95, **GUARD),
    "percentile(leaf)": optaxclip.clip_by_percentile(95, 100, norm=leaf_norm, **GUARD),
    "autoclip": optaxclip.autoclip(window=200),
    "zclip": optaxclip.zclip(),
    "adagc": optaxclip.adagc(),
    "median": clip_by(global_norm, MEDIAN),
    "tracked": clip_by(leaf_norm, tracked_quantile(0.95, 0.05)),
}
INNER = optax.sgd(optax.constant_schedule(0.1), momentum=0.9)
SKIPS = {
    "skip_spikes": optaxclip.skip_spikes(INNER),
    "skip_by(leaf)": optaxclip.skip_by(INNER, leaf_norm, MEDIAN),
}
BEFORE, STREAMS = 1500, 32


@functools.partial(jax.jit, static_argnums=0)
def scan(tx, gradients):
    """Updates of gradients along the first axis, thresholds, and the last state."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        if isinstance(state, optaxclip.SkipState):
            thresholds = state.skip_metrics.skip_threshold
        else:
            thresholds = last_clip(state).clip_metrics.clip_threshold
        return state, (updates, infinite(thresholds))

    first = jax.tree.map(lambda gradient: gradient[0], gradients)
    state, (updates, thresholds) = jax.lax.scan(step, tx.init(first), gradients)
    return updates, thresholds, state


@functools.partial(jax.jit, static_argnums=0)
def scan_streams(tx, norms):
    """The same of many streams, each of which is the gradients of one scalar."""
    return jax.vmap(functools.partial(scan, tx), 1, (1, 1, 0))(norms)


def clip(tx, norms):
    """Norms after clipping (the gradients are positive scalars) and thresholds."""
    after, thresholds, _ = scan_streams(tx, jnp.asarray(norms))
    return np.asarray(after), np.asarray(thresholds)


def last_clip(state):
    return state["adagc"] if isinstance(state, dict) else state


def lognormal(sigma, steps, streams=STREAMS, seed=0):
    noise = np.random.default_rng(seed).standard_normal((steps, streams))
    return (0.01 * np.exp(sigma * noise)).astype(np.float32)


# Steps until the mean scale of the next 100 steps is 90% of the usual one again.
# Percentiles: (1 - q) N + 10. A geometric memory: the rise, by the growth of a step.
RISES = [1.5, 2, 4, 10, 100]
WITHIN = {
    "default": [910] * 5,
    "percentile": [60] * 5,
    "percentile(leaf)": [15] * 5,
    "autoclip": [190] * 5,
    "zclip": [0, 10, 30, 60, 120],
    "adagc": [math.log(rise) / math.log(0.98 + 0.02 * 1.05) for rise in RISES],
    "median": [60] * 5,
    "tracked": [10 + math.log(rise) / (0.05 * 0.95) for rise in RISES],
}


@pytest.mark.parametrize("rise", RISES)
@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.sample(1)
def test_recovers_from_a_lasting_rise(name, rise):
    within = math.floor(WITHIN[name][RISES.index(rise)])
    norms = lognormal(0.1, BEFORE + math.floor(WITHIN[name][-1]) + 300)
    norms[BEFORE:] *= rise
    scales = clip(CLIPS[name], norms)[0] / norms
    usual = scales[BEFORE - 500 : BEFORE].mean()
    next_100 = [
        scales[start : start + 100].mean()
        for start in range(BEFORE + within, BEFORE + within + 200)
    ]
    assert min(next_100) >= 0.9 * usual


# Steps until the threshold is at most 1.5 times where it belongs. Percentiles:
# q N + 10. Geometric memories: the time in which they decay by that much.
FALLS = [0.1, 0.01]
FALLEN = {
    "default": [110, 110],
    "percentile": [960, 960],
    "percentile(leaf)": [105, 105],
    "autoclip": [30, 30],
    "zclip": [230, 390],
    "adagc": [10 + math.log(fall / 2) / math.log(0.98) for fall in FALLS],
    "median": [60, 60],
    "tracked": [-math.log(fall) / (0.05 * 0.05) for fall in FALLS],
}


@pytest.mark.parametrize("fall", FALLS)
@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.sample(3)
def test_follows_a_lasting_fall(name, fall):
    within = BEFORE + math.floor(FALLEN[name][FALLS.index(fall)])
    norms = lognormal(0.1, BEFORE + math.floor(FALLEN[name][-1]) + 100)
    norms[BEFORE:] *= fall
    after, thresholds = clip(CLIPS[name], norms)
    levels = np.exp(np.log(thresholds).mean(axis=1))
    levels /= levels[BEFORE - 500 : BEFORE].mean()
    assert np.all(levels[within:] <= 1.5 * fall)
    assert np.all(levels[within:] >= 0.7 * fall)
    # A fall is no reason to clip more than usual, not even on the way.
    scales = after / norms
    assert scales[BEFORE:].mean() >= 0.98 * scales[BEFORE - 500 : BEFORE].mean()


# Of lognormal norms with the median 1: mean over the streams, and the worst of them.
SPIKES = {
    ("default", 0.1): (1.35, 1.4),  # 1.5 times the 10th percentile of 0.88
    ("percentile", 0.1): (1.2, 1.3),
    ("percentile(leaf)", 0.1): (1.2, 1.3),
    ("autoclip", 0.1): (0.9, 1.0),
    ("zclip", 0.1): (1.05, 1.1),
    ("zclip", 0.3): (1.1, 1.25),  # the worst: a running mean of 33 norms varies
    ("adagc", 0.1): (1.05, 1.1),
    ("median", 0.1): (2.05, 2.1),
    ("tracked", 0.1): (1.25, 1.35),
}


@pytest.mark.parametrize(("name", "sigma"), SPIKES)
@pytest.mark.sample(1)
def test_spikes_and_a_second_one_soon_after(name, sigma):
    at = np.array([BEFORE, BEFORE + 50])
    norms = lognormal(sigma, BEFORE + 51)
    norms[at] = 1000 * 0.01
    ratios = clip(CLIPS[name], norms)[0][at] / 0.01
    mean, worst = SPIKES[name, sigma]
    assert np.all(ratios.mean(axis=1) <= mean)
    assert np.all(ratios <= worst)
    assert np.all(ratios > 0.5)  # and the step is not lost either


@pytest.mark.parametrize(
    ("tx", "multiple", "tolerated"),
    [
        (CLIPS["default"], 1.5, 899),
        (CLIPS["percentile"], 1.0, 49),
        (CLIPS["percentile(leaf)"], 1.0, 4),
        (CLIPS["autoclip"], 1.0, 179),
        (CLIPS["median"], 2.0, 49),
    ],
    ids=["default", "percentile", "percentile(leaf)", "autoclip", "median"],
)
@pytest.mark.sample(1)
def test_a_burst_that_fits_moves_no_quantile_beyond_ordinary_norms(
    tx, multiple, tolerated
):
    """floor((1 - q)(N - 1)) spikes, and one more: the number is the very one."""
    for spikes, moved in [(tolerated, False), (tolerated + 1, True)]:
        norms = lognormal(0.3, BEFORE + spikes + 100)
        largest = norms.max(axis=0)
        norms[BEFORE : BEFORE + spikes] = 1e4
        after, thresholds = clip(tx, norms)
        beyond = thresholds[BEFORE:].max(axis=0) > multiple * largest
        assert np.all(beyond == moved)
        if not moved:
            assert np.all(after[BEFORE:] <= multiple * largest * (1 + 1e-6))


def test_zclip_withstands_a_burst():
    """30 spikes in a row: the last are at most at twice the median."""
    norms = lognormal(0.1, BEFORE + 30)
    norms[BEFORE:] = 100 * 0.01
    ratios = clip(CLIPS["zclip"], norms)[0][BEFORE:] / 0.01
    assert np.all(ratios[0] < 1.1)
    assert np.all(ratios <= 2)


def memory(state):
    """What must not know of a bad step: all but counters and metrics."""
    if isinstance(state, optaxclip.SkipState):
        return state.skip_rule_state, state.inner_state
    if isinstance(state, dict):
        return jax.tree.map(
            memory, state, is_leaf=lambda x: isinstance(x, optaxclip.ClipState)
        )
    return state.rule_state


def tree_of(norms):
    """Gradients, one of which has the norm, of two leaves."""
    other = norms[::-1]
    return {"a": norms, "b": np.stack([0.6 * other, -0.8 * other], axis=1)}


INSERTED = {
    "first": [0] * 12,
    "warm-up": [10] * 12,
    "after it": [150] * 12,
    "everywhere": range(0, 240, 20),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", INSERTED)
@pytest.mark.parametrize("name", [*CLIPS, *SKIPS])
@pytest.mark.sample(1)
def test_bad_steps_leave_no_trace(name, where, bad):
    """NaN and infinity in one leaf, a spike in the other: all memories stay."""
    tx = (CLIPS | SKIPS)[name]
    gradients = tree_of(100 * lognormal(0.5, 240, 1)[:, 0])
    expected, _, expected_state = scan(tx, gradients)
    rows = np.asarray(INSERTED[where]) + np.arange(12)
    spoiled = jax.tree.map(
        lambda g: np.insert(g, INSERTED[where], 1e3, axis=0), gradients
    )
    spoiled["b"][rows, 1] = bad
    updates, _, state = scan(tx, spoiled)
    assert_same_bits(memory(state), memory(expected_state))
    kept = jax.tree.map(lambda u: np.delete(u, rows, axis=0), updates)
    assert_same_bits(kept, jax.tree.map(np.asarray, expected))
    if name in SKIPS:
        assert state.skip_nonfinite_count == 12
        assert state.skip_count == expected_state.skip_count + 12
        assert not any(np.any(u[rows]) for u in jax.tree.leaves(updates))
    else:
        assert last_clip(state).nonfinite_count == 12
        assert last_clip(state).clip_count == last_clip(expected_state).clip_count


@pytest.mark.parametrize("name", [*CLIPS, *SKIPS])
@pytest.mark.sample(1)
def test_zeros_freeze_nothing(name):
    """One at step 1 and 100 in the middle: recovered from in 0 steps."""
    tx = (CLIPS | SKIPS)[name]
    norms = lognormal(0.5, 300, 1)[:, 0]
    expected, thresholds, expected_state = scan(tx, norms)
    at = np.r_[0, np.full(100, 150)]
    updates, with_zeros, state = scan(tx, np.insert(norms, at, np.float32(0)))
    rows = at + np.arange(101)
    np.testing.assert_array_equal(np.delete(with_zeros, rows), thresholds)
    if name in SKIPS:  # momentum moves on; but no step is skipped
        assert_same_bits(state.skip_rule_state, expected_state.skip_rule_state)
        assert state.skip_count == expected_state.skip_count
        return
    np.testing.assert_array_equal(np.delete(updates, rows), expected)
    assert not np.any(np.asarray(updates)[rows])
    assert_same_bits(last_clip(state).rule_state, last_clip(expected_state).rule_state)


def normal_cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def capped_mean(sigma, cap):
    """E min(n, c) of lognormal norms."""
    z = math.log(cap) / sigma
    return math.exp(sigma**2 / 2) * normal_cdf(z - sigma) + cap * normal_cdf(-z)


def share_of_adagc(sigma, ratio=1.05):
    """P(n > c), where the running mean of min(n, c) is c / ratio: by iteration."""
    cap = 1.0
    for _ in range(2000):
        cap = ratio * capped_mean(sigma, cap)
    return normal_cdf(-math.log(cap) / sigma)


@pytest.mark.parametrize(
    ("tx", "sigma", "nominal", "bias"),
    [
        # 1.5 times the 10th percentile of norms with the median 1.
        (
            CLIPS["default"],
            0.5,
            normal_cdf(-math.log(1.5) / 0.5 + 1.28155),
            0.003,  # a percentile of 1,000 norms varies, and knows the norm itself
        ),
        # Strict past: 1 - ((N - 1) q + 1) / (N + 1) for whole ranks (N - 1) q.
        (optaxclip.clip_by_percentile(95, 101, **GUARD), 0.5, 1 - 96 / 102, 0.0),
        # The norm itself in the window: of N ranks, those beyond (N - 1) q.
        (optaxclip.autoclip(10, 101), 0.5, 1 - 11 / 101, 0.0),
        # The median of N logarithms has the variance sigma^2 pi / (2 N).
        (
            CLIPS["median"],
            0.5,
            normal_cdf(-math.log(2) / 0.5 / math.sqrt(1 + math.pi / 200)),
            0.0,
        ),
        # The coverage identity: beyond q only by (range of ln T) / (rate * steps).
        (CLIPS["tracked"], 0.5, 0.05, 5 * 0.5 / (0.05 * 4000)),
        # The fixed point; the running mean of 99 norms varies around it.
        (CLIPS["adagc"], 0.1, share_of_adagc(0.1), 0.01),
        (CLIPS["adagc"], 0.3, share_of_adagc(0.3), 0.01),
        # No formula: 0.6% of normal norms, and mean and deviation are of 33 of them.
        (CLIPS["zclip"], 0.1, 0.0165, 0.002),
    ],
    ids=[
        "default",
        "percentile",
        "autoclip",
        "median",
        "tracked",
        "adagc.1",
        "adagc.3",
        "zclip",
    ],
)
@pytest.mark.sample(1)
def test_the_share_of_clipped_steps_is_the_nominal_one(tx, sigma, nominal, bias):
    """Within four standard errors over the streams, and what the formula leaves out."""
    norms = lognormal(sigma, BEFORE + 4000)
    after, _, state = scan_streams(tx, jnp.asarray(norms))
    clipped = np.asarray(after) < norms
    shares = clipped[BEFORE:].mean(axis=0)
    error = shares.std(ddof=1) / math.sqrt(STREAMS)
    assert error < 0.002
    assert abs(shares.mean() - nominal) < 4 * error + bias
    counts = np.asarray(last_clip(state).clip_count)
    np.testing.assert_array_equal(counts, clipped.sum(axis=0))
