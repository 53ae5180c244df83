"""The transforms against transcripts of what they stand for, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import GUARD
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from streams import infinite

import optaxclip


@functools.partial(jax.jit, static_argnums=0)
def scan(tx, gradients):
    """Updates of gradients along the first axis, and the states after each step."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, (updates, state)

    first = jax.tree.map(lambda gradient: gradient[0], gradients)
    return jax.lax.scan(step, tx.init(first), gradients)[1]


def lognormal(sigma, steps, seed=0):
    noise = np.random.default_rng(seed).standard_normal(steps)
    return np.exp(sigma * noise).astype(np.float32)


def with_spikes(sigma, steps, seed=0):
    norms = lognormal(sigma, steps, seed)
    norms[np.random.default_rng(seed + 1).random(steps) < 0.01] *= 100
    return norms


def tensors(steps, seed=0):
    """Three tensors a step, the norms of which vary."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(0.5 * rng.standard_normal((steps, 3, 1))) / 3
    return list((rng.standard_normal((3, steps, 4)) * sizes.swapaxes(0, 1)).astype("f"))


def past_quantiles(norms, q, window):
    pasts = [norms[max(0, step - window) : step] for step in range(1, len(norms))]
    return np.array([np.inf] + [np.quantile(past, q) for past in pasts])


def ramped_percentiles(norms, percentile=10, window=1000, factor=1.5, ramp=100):
    steps = range(1, len(norms) + 1)
    counts = np.minimum(np.array(steps), window)
    lasts = [norms[max(0, step - window) : step] for step in steps]
    percentiles = np.array([np.percentile(last, percentile) for last in lasts])
    return factor * np.minimum(1, counts / ramp) * percentiles


def zscores(norms, alpha=0.97, z_max=2.5, warmup=25):
    low, mean, high = np.percentile(norms[:warmup], [25, 50, 75])
    sigma = (high - low) / 1.349
    thresholds = [np.inf] * warmup
    for norm in norms[warmup:]:
        reach = z_max * max(sigma, 0.01 * mean)
        excess = norm - mean
        thresholds.append(mean + (reach**2 / excess if excess > reach else reach))
        recorded = min(norm, mean + reach)
        mean = alpha * mean + (1 - alpha) * recorded
        sigma = np.sqrt(alpha * sigma**2 + (1 - alpha) * (recorded - mean) ** 2)
    return np.array(thresholds)


@pytest.mark.parametrize(
    ("tx", "thresholds_of"),
    [
        (
            optaxclip.clip_by_percentile(95, 150, **GUARD),
            lambda norms: past_quantiles(norms, 0.95, 150),
        ),
        (
            optaxclip.clip_by_percentile(95, 150, 1.3, min_count=20, **GUARD),
            lambda norms: np.minimum(
                1.3, np.r_[[1.3] * 20, past_quantiles(norms, 0.95, 150)[20:]]
            ),
        ),
        (optaxclip.clip_by_percentile(), ramped_percentiles),
        (
            optaxclip.clip_by(
                optaxclip.global_norm,
                optax.chain(optaxclip.quantile(0.5, 100), optax.scale(2.0)),
            ),
            lambda norms: 2 * past_quantiles(norms, 0.5, 100),
        ),
        (optaxclip.zclip(), zscores),
        (optaxclip.zclip(2.0, 0.9, 10), lambda norms: zscores(norms, 0.9, 2.0, 10)),
        # A cap is not remembered.
        (
            optaxclip.zclip(max_norm=1.2),
            lambda norms: np.minimum(1.2, zscores(norms)),
        ),
    ],
    ids=[
        "percentile",
        "min_count",
        "default",
        "median",
        "zclip",
        "arguments",
        "max_norm",
    ],
)
@pytest.mark.sample(1)
def test_a_clip_is_its_equation(tx, thresholds_of):
    norms = with_spikes(0.3, 1000)
    updates, states = scan(tx, -norms)  # a sign, which must stay
    expected = thresholds_of(norms.astype(np.float64))
    after = np.minimum(norms, expected)
    assert np.sum(after < norms) > 10
    np.testing.assert_allclose(-np.asarray(updates), after, rtol=2e-6)
    metrics = states.clip_metrics
    thresholds = infinite(metrics.clip_threshold)
    np.testing.assert_allclose(thresholds, expected, rtol=2e-6)
    np.testing.assert_allclose(metrics.clip_scale, after / norms, rtol=2e-6)


@pytest.mark.parametrize("percentile", [0, 10, 50, 95, 100])
@pytest.mark.sample(1)
def test_autoclip_is_the_original_while_steps_fit_the_window(percentile):
    """Full history, this norm included; then the last norms only."""
    window = 300
    gradients = [1000 * tensor for tensor in tensors(400)]  # the original's 1e-6: lost
    history, expected = [], []
    for step in range(400):
        now = [tensor[step].astype(np.float64) for tensor in gradients]
        history.append(np.sqrt(sum(np.sum(tensor**2) for tensor in now)))
        bound = np.percentile(history[-window:], percentile)
        scale = min(1.0, bound / (history[-1] + 1e-6))
        expected.append([scale * tensor for tensor in now])
    updates, _ = scan(optaxclip.autoclip(percentile, window), gradients)
    for update, tensor in zip(updates, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(update, np.stack(tensor), rtol=3e-6)


COMPOSED_ADAGC = optax.named_chain(
    (
        "warmup",
        optaxclip.clip_by_global_norm(lambda step: jnp.where(step < 100, 1.0, jnp.inf)),
    ),
    ("adagc", optaxclip.clip_by(optaxclip.leaf_norm, optaxclip.ema())),
)


@pytest.mark.parametrize(
    "tx", [optaxclip.adagc(), COMPOSED_ADAGC], ids=["adagc", "composed"]
)
def test_adagc_is_the_papers_recursion(tx):
    """Global clip in the warm-up and least norm of each tensor; then its own mean."""
    gradients = tensors(500)
    means = [np.inf] * 3
    expected, warm_scales = [], []
    for step in range(500):
        now = [tensor[step].astype(np.float64) for tensor in gradients]
        norms = [np.linalg.norm(tensor) for tensor in now]
        if step < 100:
            scales = [min(1.0, 1.0 / np.linalg.norm(norms))] * 3
            warm_scales.append(scales[0])
        else:
            scales = [min(1.0, 1.05 * m / n) for m, n in zip(means, norms, strict=True)]
        now = [scale * tensor for scale, tensor in zip(scales, now, strict=True)]
        for i, norm in enumerate(np.linalg.norm(tensor) for tensor in now):
            running = 0.98 * means[i] + 0.02 * norm
            means[i] = min(means[i], norm) if step < 100 else running
        expected.append(now)
    assert 0.1 < np.mean(np.less(warm_scales, 1)) < 0.9
    updates, states = scan(tx, gradients)
    for update, tensor in zip(updates, zip(*expected, strict=True), strict=True):
        # A mean forgets a rounding in 50 steps, each of which adds two: 6e-6 at most.
        np.testing.assert_allclose(update, np.stack(tensor), rtol=6e-6)
    clipped = np.asarray(states["warmup"].clip_count)
    assert clipped[-1] == clipped[99] == np.sum(np.less(warm_scales, 1))
    assert states["adagc"].clip_count[99] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_adagc_shares_a_read_and_does_what_two_clips_do(dtype):
    """Also with NaN, infinity and zeros, in the warm-up and after it."""
    gradients = [jnp.asarray(tensor, dtype) for tensor in tensors(200)]
    for start in (20, 150):
        for i, value in enumerate([np.nan, np.inf, 0.0]):
            gradients[1] = gradients[1].at[start + 10 * i, 2:].set(value)
    (ours, states), (theirs, expected) = (
        scan(tx, gradients) for tx in (optaxclip.adagc(), COMPOSED_ADAGC)
    )
    # The first of two clips rounds to the dtype of the gradients.
    rtol = 8 * float(jnp.finfo(dtype).eps)
    for update, other in zip(ours, theirs, strict=True):
        assert update.dtype == dtype
        np.testing.assert_allclose(
            np.float32(update), np.float32(other), rtol=rtol, atol=1e-7
        )
    for name in ("warmup", "adagc"):
        for ending in ("step_count", "nonfinite_count"):
            np.testing.assert_array_equal(
                getattr(states[name], ending), getattr(expected[name], ending)
            )
        assert states[name].nonfinite_count[-1] == 4
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=rtol),
            states[name].clip_metrics,
            expected[name].clip_metrics,
        )


def test_adagc_on_a_mesh_is_as_on_one_device():
    """Also where one leaf is float64 and another one float32."""
    with jax.enable_x64(True):
        mesh = Mesh(np.array(jax.devices()[:4]), "x")
        gradients = {
            "a": np.random.default_rng(0).standard_normal((6, 8, 3)),
            "b": np.random.default_rng(1).standard_normal((6, 5)).astype("f"),
        }
        tx = optaxclip.adagc(warmup=3)
        expected, _ = scan(tx, gradients)
        specs = {"a": P(None, "x"), "b": P()}
        sharded = jax.shard_map(
            functools.partial(scan, tx),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(specs, P()),
        )
        updates, _ = jax.jit(sharded)(gradients)
        for name, update in updates.items():
            assert update.dtype == gradients[name].dtype
            np.testing.assert_allclose(update, expected[name], rtol=1e-6)


def skips(norms, capped=True, z=6.0, window=128, min_count=64):
    """Mean and deviation of the last norms; OLMo: NaN and spikes recorded raw."""
    recorded, thresholds = [], []
    for norm in norms.astype(np.float64):
        past = np.array(recorded[-window:])
        bound = np.inf
        if len(past) >= min_count:
            least = 0.01 * past.mean() if capped else 0.0
            bound = past.mean() + max(z * past.std(ddof=1), least)
        thresholds.append(bound)
        if capped and np.isfinite(norm):
            recorded.append(min(norm, bound))
        elif not capped:
            recorded.append(norm)
    return np.array(thresholds)


SKIP = optaxclip.skip_spikes(optax.sgd(-1.0))


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_skip_spikes_is_its_equation(sigma):
    norms = with_spikes(sigma, 1000)
    norms[[3, 70, 500, 501]] = np.nan, np.inf, np.nan, -np.inf
    expected = skips(norms)
    updates, states = scan(SKIP, norms)
    bad = ~(np.abs(norms) <= expected)
    assert 10 < bad.sum() < 60
    thresholds = infinite(states.skip_metrics.skip_threshold)
    np.testing.assert_allclose(thresholds, expected, rtol=1e-5)
    np.testing.assert_array_equal(updates, np.where(bad, 0, norms))
    np.testing.assert_array_equal(states.skip_count, np.cumsum(bad))
    assert states.skip_nonfinite_count[-1] == 4


def test_a_nan_costs_skip_spikes_one_step():
    """Recorded as it is, it costs every step until it has left the window."""
    norms = lognormal(0.1, 400)
    norms[200] = np.nan
    assert np.sum(~(norms <= skips(norms, capped=False))) == 129
    updates, states = scan(SKIP, norms)
    assert np.flatnonzero(np.asarray(updates) == 0) == [200]
    assert states.skip_count[-1] == 1
    assert states.skipped_in_a_row[-1] == 0


def test_a_spike_does_not_hide_the_next_one():
    """Recorded as it is, a spike widens the deviation beyond one half as large."""
    norms = lognormal(0.1, 400)
    norms[[200, 250]] = 1000, 500
    assert np.flatnonzero(norms > skips(norms, capped=False)).tolist() == [200]
    updates, _ = scan(SKIP, norms)
    assert np.flatnonzero(np.asarray(updates) == 0).tolist() == [200, 250]


# Steps skipped after a lasting rise: about so many at a log-deviation of 0.1.
@pytest.mark.parametrize(
    ("rise", "about"), [(1.5, 0), (2, 5), (4, 13), (10, 22), (100, 41)]
)
def test_skip_spikes_goes_on_at_a_new_level(rise, about):
    norms = np.stack([lognormal(0.1, 1000, seed=seed) for seed in range(32)], axis=1)
    norms[300:] *= rise
    updates = jax.vmap(lambda n: scan(SKIP, n)[0], 1, 1)(norms)
    skipped = np.asarray(updates) == 0
    assert not skipped[:300].any()
    assert abs(skipped[300:400].sum(axis=0).mean() - about) <= 1
    assert skipped[300:400].sum(axis=0).max() <= about + 3
    assert skipped[300 + about + 10 :].mean() < 1e-3


def test_a_scheduled_factor_may_reach_zero():
    """Zero times no bound is no bound, and a factor below 0 counts as 0."""
    make = optax.inject_hyperparams(optaxclip.clip_by_percentile, static_args="ramp")
    tx = make(factor=lambda step: 1 - jnp.float32(step), ramp=0)
    updates, _ = scan(tx, np.array([0.0, 0.0, 3.0, 0.0, 2.0], np.float32))
    np.testing.assert_array_equal(updates, [0, 0, 0, 0, 0])
    updates, _ = scan(
        make(factor=lambda step: 0.5 + jnp.float32(step), ramp=0), np.ones(3, "f")
    )
    np.testing.assert_allclose(updates, [0.5, 1, 1], rtol=1e-6)
