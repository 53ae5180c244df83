"""Replay, compare and suggest, against NumPy and against the clips themselves."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip.audit import compare, outcome_table, parse_rule, replay, suggest
from optaxclip.audit._what_if.compare import longest_streak, outcome
from optaxclip.audit._what_if.replay import _scan
from optaxclip.audit._what_if.suggest import confidence


def series(steps=300, seed=0):
    """Norms of a run, with all that can be recorded among them."""
    norms = np.random.default_rng(seed).lognormal(size=steps).astype(np.float32)
    norms[[0, 9, 52]] = 0
    norms[[3, 50]], norms[[7, 51]] = np.nan, np.inf
    norms[100], norms[101], norms[102] = 1e30, 1e-30, 1e37
    return norms


def scales_of(thresholds, norms):
    """min(1, threshold / norm), a step at a time."""
    scales = [1 if n <= t else t / n for n, t in zip(norms, thresholds, strict=True)]
    return np.array(scales, np.float32)


def transcript(norms, threshold_of):
    """Thresholds from all finite norms above 0 so far, a step at a time."""
    past, thresholds = [], []
    for norm in norms:
        thresholds.append(threshold_of(past) if past else np.inf)
        if np.isfinite(norm) and norm > 0:
            past.append(norm)
    return np.array(thresholds, np.float32)


# -- replay


def test_a_constant():
    norms = series()
    thresholds, scales = replay(1.5, norms)
    np.testing.assert_array_equal(thresholds, np.full(300, 1.5, np.float32))
    np.testing.assert_array_equal(scales, scales_of(thresholds, norms))


def test_a_schedule_counts_the_steps_that_were_finite():
    norms = np.float32([2, np.nan, 2, np.inf, 2])
    thresholds, _ = replay(lambda step: 1 + jnp.float32(step), norms)
    np.testing.assert_array_equal(thresholds, [1, 2, 2, 3, 3])


def test_a_running_percentile():
    norms = series()
    thresholds, scales = replay(optaxclip.quantile(0.95, window=40), norms)
    expected = transcript(norms, lambda past: np.percentile(past[-40:], 95))
    np.testing.assert_allclose(thresholds, expected, rtol=1e-6)
    np.testing.assert_allclose(scales, scales_of(expected, norms), rtol=1e-6)


def test_a_running_mean_of_capped_norms():
    norms = np.random.default_rng(1).lognormal(size=200).astype(np.float32)
    norms[[20, 90]] = np.nan, 1000

    def threshold_of(past):
        if len(past) < 5:
            return np.inf
        # The lowest of the warm-up, then a mean of norms held to 1.05 of itself.
        mean = np.min(past[:5])
        for norm in past[5:]:
            mean = 0.9 * mean + 0.1 * min(norm, 1.05 * mean)
        return 1.05 * mean

    rule = optaxclip.ema(ratio=1.05, decay=0.9, warmup=5)
    expected = transcript(norms, threshold_of)
    np.testing.assert_allclose(replay(rule, norms).thresholds, expected, rtol=1e-5)


RULES = {
    "constant": optaxclip.constant(1.0),
    "schedule": optaxclip.constant(lambda t: 1.0 + 0.01 * jnp.float32(t)),
    "quantile": optaxclip.quantile(0.95, 20),
    "quantile(include_current)": optaxclip.quantile(0.1, 20, include_current=True),
    "tracked_quantile": optaxclip.tracked_quantile(0.9, 0.05),
    "zscore": optaxclip.zscore(),
    "window_zscore": optaxclip.window_zscore(),
    "ema": optaxclip.ema(warmup=2),
    "lowest": optaxclip.lowest(optaxclip.ema(), 2.0),
    "quantile * 2": optax.chain(optaxclip.quantile(0.5, 10), optax.scale(2.0)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.sample(1)
def test_a_replay_is_the_clip(name):
    norms = series()
    tx = optaxclip.clip_by(optaxclip.global_norm, RULES[name])
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(1, jnp.float32))
    rows = []
    for norm in norms:
        _, state = update(jnp.array([norm]), state)
        rows.append(state.clip_metrics)
    measured, thresholds, scales = np.array(rows, np.float32).T
    no_bound = np.finfo(np.float32).max  # as a state says it
    thresholds = np.where(thresholds == no_bound, np.inf, thresholds)
    np.testing.assert_array_equal(measured, norms)
    replayed = replay(RULES[name], norms)
    # XLA of newer JAX fuses the two programs differently, which rounds differently.
    rtol = 0 if jax.__version_info__ < (0, 11) else 1e-6
    np.testing.assert_allclose(replayed.thresholds, thresholds, rtol=rtol)
    np.testing.assert_allclose(replayed.scales, scales, rtol=rtol)


def test_every_leaf_has_a_memory_of_its_own():
    norms = np.stack([series(seed=0), series(seed=1)], axis=1)
    both = replay(optaxclip.quantile(0.5, 20), norms)
    for leaf in range(2):
        # A step with a norm that is not finite is forgotten for all leaves.
        keep = np.isfinite(norms).all(axis=1)
        alone = replay(optaxclip.quantile(0.5, 20), norms[keep, leaf])
        np.testing.assert_array_equal(both.thresholds[keep, leaf], alone.thresholds)


@pytest.mark.parametrize("norms", [[1, 2], [1.0, 2.0], np.float64([1, 2])])
def test_results_are_float32_arrays_of_the_host(norms):
    for result in replay(optaxclip.zscore(), norms):
        assert isinstance(result, np.ndarray)
        assert result.dtype == np.float32
        assert result.shape == (2,)


def test_what_float32_cannot_hold_is_infinite():
    _, scales = replay(1.0, [1e39, 1e-50])
    np.testing.assert_array_equal(scales, [0, 1])


def test_an_infinite_norm_passes_only_where_nothing_bounds():
    norms = [np.inf, 1.0, np.inf, 2.0]
    thresholds, scales = replay(optaxclip.quantile(0.5, 10), norms)
    np.testing.assert_array_equal(thresholds, [np.inf, np.inf, 1, 1])
    np.testing.assert_array_equal(scales, [1, 1, 0, 0.5])


def test_a_threshold_a_leaf():
    thresholds, scales = replay(jnp.array([1.0, 4.0]), [[2.0, 2.0], [1.0, 8.0]])
    np.testing.assert_array_equal(thresholds, [[1, 4], [1, 4]])
    np.testing.assert_array_equal(scales, [[0.5, 1], [1, 0.5]])


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_no_steps(shape):
    assert [x.shape for x in replay(1.0, np.zeros(shape))] == [shape, shape]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: replay(1.0, np.ones((2, 2, 2))),
            r"`replay\(norms=...\)` must have the shape \(steps,\) or \(steps, leaves\)"
            r", got \(2, 2, 2\)",
        ),
        (
            lambda: replay(1.0, 3.0),
            r"`replay\(norms=...\)` must be a series, got 3.0",
        ),
        (
            lambda: replay(1.0, [1, -2]),
            r"`replay\(norms=...\)` must be non-negative, got -2.0",
        ),
        (
            lambda: replay(-1.0, [1.0]),
            r"`replay\(rule=...\)` must be non-negative, got -1.0",
        ),
        (lambda: replay(optaxclip.relative(0.1), [1.0]), "params"),
        (
            lambda: compare({"a": 1.0}, np.ones((2, 2))),
            r"`compare\(norms=...\)` must have the shape \(steps,\), got \(2, 2\)",
        ),
        (
            lambda: compare({"a": 1.0}, [-1.0]),
            r"`compare\(norms=...\)` must be non-negative, got -1.0",
        ),
        (
            lambda: suggest([0.0, np.nan, np.inf]),
            r"`suggest\(norms=...\)` must hold a finite norm above 0, got none",
        ),
        (lambda: suggest([]), "must hold a finite norm above 0, got none"),
        (
            lambda: suggest([1, -1]),
            r"`suggest\(norms=...\)` must be non-negative, got -1.0",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


CLIPS = {
    "clip_by_global_norm": optaxclip.clip_by_global_norm(1.5),
    "clip_by_percentile": optaxclip.clip_by_percentile(50, 20),
    "zclip": optaxclip.zclip(warmup=5),
    "none": optaxclip.clip_by_global_norm(np.inf),
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.sample(1)
def test_a_clip_is_replayed_by_its_rule(name):
    norms, tx = series(), CLIPS[name]
    update, state, expected = jax.jit(tx.update), tx.init(jnp.zeros(1)), []
    for norm in norms:
        _, state = update(jnp.array([norm]), state)
        expected.append(state.clip_metrics[1:])
    thresholds, scales = np.array(expected, np.float32).T
    thresholds[thresholds == np.finfo(np.float32).max] = np.inf
    replayed = replay(tx, norms)
    np.testing.assert_allclose(replayed.thresholds, thresholds, rtol=1e-6)
    np.testing.assert_allclose(replayed.scales, scales, rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(1.0)),
        optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optaxclip.clip_by_leaf_norm(1.0),
    ],
    ids=["skip", "optimizer", "clip of leaves"],
)
def test_what_holds_a_clip_but_has_not_one_threshold_is_refused(tx):
    with pytest.raises(ValueError, match=r"must be a rule or a clip of the global no"):
        replay(tx, [1.0, 2.0])
    with pytest.raises(ValueError, match="pass the clip without the skip or the optim"):
        compare({"a": tx}, [1.0, 2.0])


def test_a_clip_of_the_global_norm_has_no_threshold_a_leaf():
    with pytest.raises(ValueError, match=r"must have the shape \(steps,\) for a clip"):
        replay(optaxclip.clip_by_global_norm(1.0), [[1.0, 2.0]])


# -- compare


def test_an_outcome_by_hand():
    norms = np.array([1, 2, np.nan, 4, 8, 0, 16, np.inf])
    scales = np.array([1, 0.5, np.nan, 0.25, 0.5, 1, 0.125, 0])
    result = outcome("run", norms, scales)
    assert result.name == "run"
    assert result.clipped_share == 4 / 6
    assert result.mean_scale == (1 + 0.5 + 0.25 + 0.5 + 1 + 0.125) / 6
    assert result.largest_passed == 4
    assert result.longest_streak == 3  # a step that is not finite counts for nothing
    assert np.isnan(result.recovery_steps)


def test_a_skipped_step_is_not_a_clipped_one():
    norms, scales = np.array([1.0, 4, 100]), np.array([1, 0.5, 0])
    result = outcome("run", norms, scales, np.array([False, True, False]))
    assert result.clipped_share == 1 / 3
    assert result.longest_streak == 1
    assert result.largest_passed == 2


def test_compare_is_the_outcome_of_the_replay_and_keeps_the_order():
    norms = series()
    rules = {"z": optaxclip.zscore(), "fixed": 1.0, "q": optaxclip.quantile(0.9, 50)}
    results = compare(rules, norms)
    assert [result.name for result in results] == list(rules)
    for result, rule in zip(results, rules.values(), strict=True):
        scales = replay(rule, norms).scales
        kept = scales[np.isfinite(norms)].astype(np.float64)
        assert result.clipped_share == np.mean(kept < 1)
        np.testing.assert_allclose(result.mean_scale, kept.mean(), rtol=1e-12)
        after = norms[np.isfinite(norms)] * kept
        np.testing.assert_allclose(result.largest_passed, after.max(), rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "start_and_length"),
    [
        ([], (0, 0)),
        ([0, 0], (0, 0)),
        ([1], (0, 1)),
        ([1, 1, 0, 1], (0, 2)),
        ([0, 1, 0, 1, 1, 1], (3, 3)),
        ([1, 0, 1], (0, 1)),
    ],
)
def test_the_longest_streak(flags, start_and_length):
    assert longest_streak(np.array(flags, bool)) == start_and_length


def test_a_fixed_threshold_between_the_old_norms_and_the_new_never_recovers():
    (result,) = compare({"fixed": 1.5}, np.ones(500))
    assert result.clipped_share == 0
    assert result.recovery_steps == np.inf


@pytest.mark.parametrize("threshold", [2.5, np.inf])
def test_a_threshold_above_the_new_norms_has_nothing_to_recover_from(threshold):
    (result,) = compare({"fixed": threshold}, np.ones(500))
    assert result.recovery_steps == 0


@pytest.mark.parametrize(("q", "window"), [(0.9, 200), (0.5, 400), (0.95, 1000)])
def test_a_quantile_recovers_once_its_share_of_the_window_has_risen(q, window):
    norms = np.random.default_rng(0).uniform(0.99, 1.01, size=2000)
    (result,) = compare({"q": optaxclip.quantile(q, window)}, norms)
    # A window of the probe's mean has recovered when a fifth of it is still clipped.
    expected = max(0, (1 - q) * window - 20)
    assert abs(result.recovery_steps - expected) <= 3


def test_a_tail_shorter_than_the_probe_is_repeated():
    (short,) = compare({"q": optaxclip.quantile(0.5, 400)}, np.ones(7))
    assert 0 <= short.recovery_steps < 10  # it holds seven norms, not 400


@pytest.mark.parametrize("norms", [[], [np.nan], [np.inf, np.nan]])
def test_without_a_finite_norm_nothing_is_known(norms):
    (result,) = compare({"fixed": 1.0}, norms)
    assert result.longest_streak == 0
    assert np.isnan([*result[1:4], result.recovery_steps]).all()
    row = outcome_table([result]).splitlines()[1]
    assert row.split() == ["fixed", "-", "-", "-", "0", "-"]


def test_the_table():
    norms = [1, 1, 4, 4, 4, 1, 1, 1, 1, 1]
    lines = outcome_table(compare({"a": 1.5, "longer": 0.5}, norms)).splitlines()
    assert lines[1].split() == ["a", "30.0%", "0.812", "1.5", "3", "never"]
    assert lines[2].split()[:5] == ["longer", "100%", "0.388", "0.5", "10"]
    assert len({len(line) for line in lines}) == 1


# -- suggest


def lognormal(steps, seed=0):
    return np.random.default_rng(seed).lognormal(sigma=0.3, size=steps)


def fixed_threshold(norms):
    return float(suggest(norms).fixed.rule.removeprefix("constant:"))


def test_the_median_is_the_fixed_threshold():
    norms = lognormal(2000)
    fixed, percentile, remarks = suggest(norms)
    threshold = float(f"{np.median(norms):.2g}")
    assert fixed_threshold(norms) == threshold
    assert fixed.setting == f"clip_by_global_norm({threshold})"
    assert f"it clips {100 * np.mean(norms > threshold):.1f}% of the" in fixed.reason
    assert percentile.setting == "clip_by_percentile()"
    assert remarks == ()


def test_spikes_move_no_suggestion():
    norms = lognormal(2000)
    spiky = np.where(np.arange(2000) % 100 == 7, 1e6 * norms, norms)
    assert fixed_threshold(spiky) == pytest.approx(fixed_threshold(norms), rel=0.05)


def test_the_percentile_says_what_it_would_have_done():
    norms = lognormal(2000)
    tx = optaxclip.clip_by_percentile()
    step = lambda state, norm: (tx.update(norm, state)[1],) * 2  # noqa: E731
    state, states = jax.lax.scan(
        step, tx.init(jnp.zeros(())), jnp.asarray(norms, jnp.float32)
    )
    reason = suggest(norms).percentile.reason
    assert f"clipped {100 * float(state.clip_count) / 2000:.1f}% of the" in reason
    mean = float(np.mean(states.clip_metrics.clip_scale))
    assert f"by {mean:.2f} on average" in reason


@pytest.mark.parametrize(
    ("optimizer", "adam", "sgd"),
    [
        ("", True, True),
        ("my own", True, True),
        ("AdamW", True, False),
        ("chain(clip_by_percentile(), lion)", True, False),
        ("optax.sgd(0.1, momentum=0.9)", False, True),
        ("a million steps of sgd", False, True),
    ],
)
def test_advice_for_the_optimizer_of_the_log(optimizer, adam, sgd):
    reason = suggest(lognormal(2000), optimizer).fixed.reason
    assert ("such as Adam" in reason) == adam
    assert ("With SGD" in reason) == sgd


def test_advice_on_runs_of_one_length_compiles_the_adaptive_rule_once():
    programs = []
    for size in (1, 2):
        suggest(size * lognormal(237))
        programs.append(_scan._cache_size())
    assert programs[1] - programs[0] == 1  # of the other constant


def test_the_suggested_texts_are_rules_and_settings():
    for norms in (lognormal(500), 1e-6 * lognormal(500), 1e6 * lognormal(500)):
        for suggestion in suggest(norms)[:2]:
            expected = replay(parse_rule(suggestion.rule), norms).thresholds
            said = replay(parse_rule(suggestion.setting), norms).thresholds
            np.testing.assert_array_equal(said, expected)
            tx = eval(f"optaxclip.{suggestion.setting}")
            state = tx.init(jnp.zeros(1, jnp.float32))
            for norm in norms[:3]:
                _, state = tx.update(jnp.array([norm], np.float32), state)
            last = state.clip_metrics.clip_threshold
            np.testing.assert_allclose(last, expected[2], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 99])
def test_a_series_too_short_for_advice_is_said_to_be(steps):
    (remark,) = suggest(np.ones(steps)).remarks
    count = "1 norm is" if steps == 1 else f"{steps} norms are"
    assert remark.startswith(f"{count} too few: a run shows its usual norm")


@pytest.mark.parametrize("steps", [100, 200, 999])
def test_a_short_series_gets_advice_and_how_sure_it_is(steps):
    (remark,) = suggest(lognormal(steps)).remarks
    assert remark.startswith(f"The run is short: its {steps} norms put the median")
    low, high = map(float, re.findall(r"between (\S+) and (\S+) ", remark)[0])
    assert low < np.median(lognormal(steps)) < high


@pytest.mark.parametrize("steps", [100, 101, 200, 500, 999])
def test_the_confidence_is_what_it_says(steps):
    """Of the ranks that hold the median, by the binomial distribution."""
    low, high = map(int, confidence(np.arange(1, steps + 1), 0.5))
    held = sum(math.comb(steps, below) for below in range(low, high)) / 2**steps
    assert 0.95 <= held < 0.97


def test_a_drift_is_said_to_be_one():
    norms = np.repeat([1.0, 2.0, 4.0, 8.0], 250)
    (remark,) = suggest(norms).remarks
    assert "The norms drift" in remark
    assert "1, 2, 4, 8" in remark


def test_zeros_and_steps_that_are_not_finite_are_left_out():
    norms = lognormal(500)
    bad = np.concatenate([norms, [0] * 500, [np.nan, np.inf]])
    found, expected = suggest(bad), suggest(norms)
    assert found.fixed.setting == expected.fixed.setting
    assert found.remarks == expected.remarks
    # A step of 0 is a step that was not clipped.
    share = 50 * np.mean(norms > fixed_threshold(norms))
    assert f"it clips {share:.1f}% of the steps" in found.fixed.reason


def test_suggestions_print_as_text():
    suggested = suggest(lognormal(500))
    lines = str(suggested).splitlines()
    assert repr(suggested) == str(suggested)
    assert lines[0] == suggested.fixed.setting
    assert max(map(len, lines)) <= 80
    for part in (suggested.percentile.reason, "Caution:", *suggested.remarks):
        assert part in " ".join(str(suggested).split())
    assert "Caution" not in str(suggest(lognormal(2000)))


def test_a_constant_series():
    fixed, percentile, remarks = suggest(np.full(1000, 0.3))
    assert (fixed.rule, percentile.rule, remarks) == (
        "constant:0.3",
        "clip_by_percentile",
        (),
    )


# -- rules as text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("constant:1.0", optaxclip.constant(1.0)),
        ("constant:2", optaxclip.constant(2.0)),
        ("constant: 1e-1 ", optaxclip.constant(0.1)),
        ("constant:inf", optaxclip.constant(np.inf)),
        ("quantile:0.9,20", optaxclip.quantile(0.9, 20)),
        ("quantile:0.9,window=20", optaxclip.quantile(0.9, 20)),
        (
            "quantile:0.5,20,include_current=true",
            optaxclip.quantile(0.5, 20, include_current=True),
        ),
        ("zscore", optaxclip.zscore()),
        ("zscore:decay=0.9", optaxclip.zscore(decay=0.9)),
        ("ema:warmup=3", optaxclip.ema(warmup=3)),
        (
            "quantile:0.5,20*2.5",
            optax.chain(optaxclip.quantile(0.5, 20), optax.scale(2.5)),
        ),
        ("ema * 2", optax.chain(optaxclip.ema(), optax.scale(2.0))),
        ("quantile(0.9, 20)", optaxclip.quantile(0.9, 20)),
        ("quantile(0.9, window=20)", optaxclip.quantile(0.9, 20)),
        ("optaxclip.constant(1.0)", optaxclip.constant(1.0)),
        (
            " quantile(0.5, 20, include_current=True) * 2.5",
            optax.chain(
                optaxclip.quantile(0.5, 20, include_current=True), optax.scale(2.5)
            ),
        ),
    ],
)
@pytest.mark.sample(4)
def test_texts_of_rules(text, rule):
    expected = replay(rule, series())
    for result, want in zip(replay(parse_rule(text), series()), expected, strict=True):
        np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize(
    "call",
    [
        "clip_by_global_norm(1.0)",
        "clip_by_global_norm(max_norm=inf)",
        "clip_by_percentile()",
        "clip_by_percentile(90, window=20)",
        "clip_by_percentile(90, 20, factor=1, ramp=0, include_current=false)",
        "clip_by_percentile(90, 20, 2.0, min_count=5)",
        "autoclip(10)",
        "autoclip(max_norm=1.5)",
        "zclip()",
        "zclip(2.5, warmup=5, max_norm=2)",
    ],
)
@pytest.mark.sample(1)
def test_a_clip_stands_for_its_rule(call):
    rule, norms = parse_rule(call), series()
    tx = eval(
        f"optaxclip.{call}", {"optaxclip": optaxclip, "inf": np.inf, "false": False}
    )
    state = tx.init(jnp.zeros((), jnp.float32))
    update = jax.jit(tx.update)
    expected = []
    for norm in norms:
        _, state = update(jnp.float32(norm), state)
        expected.append(optaxclip.metrics(state)["clip_threshold"])
    np.testing.assert_allclose(replay(rule, norms).thresholds, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"`` is no rule \(invalid syntax\): expected a call as in Python, such"),
        ("median:3", "`median:3` is no rule: .* names are constant, quantile"),
        ("median(3)", r"`median\(3\)` is no rule: .* names are constant, quantile"),
        ("clip_by_value(3)", "is no rule"),
        ("__import__:1", "is no rule"),
        ("constant", "missing a required argument: 'value'; it takes value"),
        ("constant:1,2", "too many positional arguments"),
        ("constant:one", "'one' is not a number"),
        ("constant:-1", r"`constant\(value=...\)` must be non-negative, got -1"),
        ("constant:nan", r"`constant\(value=...\)` must be non-negative, got nan"),
        ("quantile:95,1000", r"must be a number in .*: the 95th percentile is q=0.95"),
        ("quantile:0.5,1.5", r"`quantile\(window=...\)` must be an integer"),
        ("quantile:0.5,q=0.5", "multiple values for argument 'q'"),
        ("quantile:q=0.5,q=0.6,window=3", "q is given twice"),
        ("quantile:q=0.5,10", "positional argument follows keyword argument"),
        ("quantile:0.5,10,size=3", "unexpected keyword argument 'size'"),
        ("quantile:0.5,10*", "invalid syntax"),
        ("quantile:0.5,10*0", "the factor must be above 0 and finite"),
        ("quantile:0.5,10*-1", "the factor must be above 0 and finite"),
        ("quantile:0.5,10*inf", "the factor must be above 0 and finite"),
        ("quantile:0.5,10*true", "the factor must be above 0 and finite"),
        ("quantile:0.5,10*2*2", "is no rule"),
        ("quantile(0.5, 10", "'\\(' was never closed"),
        ("quantile(0.5, 10)(3)", "is no rule"),
        ("2 * zclip()", r"'zclip\(\)' is not a number"),
        ("zclip(1 + 1)", r"'1 \+ 1' is not a number"),
        ("zclip('2')", "is not a number"),
        ("zclip(1j)", "is not a number"),
        ("zclip(--1)", "'--1' is not a number"),
        ("zclip(-True)", "'-True' is not a number"),
        ("zclip(print())", r"'print\(\)' is not a number"),
        ("zclip(*[1])", r"'\*\[1\]' is not a number"),
        ("zclip(**{})", r"\*\* is refused"),
        ("zclip(norm=1)", "norm takes no number"),
        ("zclip(axis_name=1)", "axis_name takes no number"),
        ("clip_by_percentile(950)", r"`clip_by_percentile\(percentile=...\)` must"),
        ("__import__('os').system('true')", "is no rule"),
        ("lambda: 0", "is no rule"),
        ("zclip(); zclip()", "is no rule"),
        ("\0", "is no rule"),
        (f"zclip({'-' * 50_000}1)", "is no rule"),
        (f"zclip({'9' * 5_000})", "is no rule"),
    ],
)
def test_texts_of_no_rules(text, message):
    with pytest.raises(ValueError, match=message):
        parse_rule(text)
