"""Skipping: nothing moves on a bad step, everything goes on after it, at what cost."""

import functools

import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _hlo import figures
from cases import LOW, TREES, array, assert_same_bits, split_leaves
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs import WRITES_SQUARES, compiled_step, gpt_like

import optaxclip

PARAMS = {"w": array(8, 3), "b": array(8, seed=1)}
SKIP_KEYS = [
    "skip_norm",
    "skip_threshold",
    "skip_count",
    "skipped_in_a_row",
    "skip_nonfinite_count",
]
BAD = {"NaN": np.nan, "infinity": np.inf, "-infinity": -np.inf, "spike": 1e4}
every_bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)


def gradients(seed=0, dtype=jnp.float32):
    """Of a norm near 5.7."""
    return {"w": array(8, 3, seed=seed, dtype=dtype), "b": array(8, seed=seed + 1)}


def spoilt(bad, seed=0, dtype=jnp.float32):
    """Gradients with one bad element."""
    grads = gradients(seed, dtype)
    return grads | {"w": grads["w"].at[2, 1].set(bad)}


def scaled(factor):
    return jax.tree.map(lambda x: x * factor, gradients())


def standard(tx):
    """Some of optax needs the standard promotion of dtypes; this package must not."""
    tx = optax.with_extra_args_support(tx)
    promotion = jax.numpy_dtype_promotion("standard")
    return optax.GradientTransformationExtraArgs(
        promotion(tx.init), promotion(tx.update)
    )


def adam(**kwargs):
    return standard(optax.adam(1e-2, **kwargs))


def clipped_adam(learning_rate=1e-2):
    adamw = standard(optax.adamw(learning_rate))
    return optax.chain(optaxclip.clip_by_global_norm(1.0), adamw)


def multi_steps(tx):
    return standard(optax.MultiSteps(tx, 2).gradient_transformation())


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def counts(state):
    return (
        int(state.skip_count),
        int(state.skipped_in_a_row),
        int(state.skip_nonfinite_count),
    )


def assert_zero(tree):
    assert all(not np.any(np.asarray(x)) for x in jax.tree.leaves(tree))


def assert_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-8)


def after(tx, *steps, params=PARAMS):
    """The state after a step with each of these gradients, and the last updates."""
    update = jax.jit(tx.update)
    state, updates = tx.init(params), None
    for grads in steps:
        updates, state = update(grads, state, params)
    return state, updates


# Nothing moves on a bad step


@every_bad
def test_a_bad_step_gives_zeros_and_leaves_the_inner_state_bit_for_bit(bad):
    tx = optaxclip.skip_by(clipped_adam(), threshold=1e3)
    before, updates = after(tx, gradients(0), gradients(1))
    assert all(np.all(np.asarray(x)) for x in jax.tree.leaves(updates))
    assert optax.tree.get(before, "count") == 2
    updates, state = jax.jit(tx.update)(spoilt(bad), before, PARAMS)
    assert_zero(updates)
    assert shapes_and_dtypes(updates) == shapes_and_dtypes(PARAMS)
    assert_same_bits(state.inner_state, before.inner_state)
    assert counts(state) == (1, 1, 0 if bad == BAD["spike"] else 1)


@every_bad
def test_the_step_after_a_bad_one_is_as_if_it_had_not_been(bad):
    tx = optaxclip.skip_by(clipped_adam(), threshold=1e3)
    state, updates = after(tx, gradients(0), spoilt(bad), spoilt(bad), gradients(1))
    expected_state, expected = after(tx, gradients(0), gradients(1))
    assert_same_bits(updates, expected)
    assert_same_bits(state.inner_state, expected_state.inner_state)


def test_good_steps_are_those_of_the_inner_transformation():
    steps = [gradients(i) for i in range(3)]
    skip, updates = after(optaxclip.skip_nonfinite(clipped_adam()), *steps)
    state, expected = after(clipped_adam(), *steps)
    assert jax.tree.structure(skip.inner_state) == jax.tree.structure(state)
    assert_close((updates, skip.inner_state), (expected, state))


def test_zeroed_gradients_would_not_have_been_a_skip():
    """What the wrapper is for: Adam moves on a zero gradient."""
    _, updates = after(clipped_adam(), gradients(), scaled(0.0))
    assert np.all(np.abs(updates["w"]) > 1e-3)
    state, updates = after(
        optaxclip.skip_by(clipped_adam(), threshold=1e3), gradients(), scaled(0.0)
    )
    assert counts(state) == (0, 0, 0)  # a zero gradient is no bad one
    assert np.all(np.abs(updates["w"]) > 1e-3)


@pytest.mark.parametrize("at", [0, 4])
def test_every_leaf_is_looked_at(at):
    grads = {str(i): jnp.ones(2) for i in range(5)}
    tx = optaxclip.skip_nonfinite(optax.sgd(1.0))
    bad = grads | {str(at): jnp.array([1.0, jnp.nan])}
    assert counts(after(tx, bad, params=grads)[0]) == (1, 1, 1)


def test_a_norm_at_its_threshold_is_no_skip():
    grads = {"w": jnp.array([3.0, 4.0])}
    for threshold, skips in [(5.0, 0), (4.999, 1)]:
        tx = optaxclip.skip_by(optax.sgd(1.0), threshold=threshold)
        assert after(tx, grads, params=grads)[0].skip_count == skips


@pytest.mark.parametrize(
    ("norm", "threshold"),
    [
        (optaxclip.leaf_norm, 50.0),
        (optaxclip.leaf_norm, {"w": 50.0, "b": np.inf}),
        (optaxclip.unit_norm, 50.0),
        (lambda tree: optaxclip.global_norm(tree, ord=np.inf), 50.0),
        (optaxclip.global_norm, lambda step: jnp.where(step < 3, 50.0, 1e9)),
        (optaxclip.global_norm, optaxclip.lowest(optaxclip.ema(warmup=2), 50.0)),
        (optaxclip.global_norm, optax.chain(optaxclip.constant(5.0), optax.scale(10))),
    ],
)
@pytest.mark.sample(1)
def test_any_norm_and_any_rule_and_one_norm_is_enough(norm, threshold):
    if isinstance(threshold, dict):
        rules = {k: optaxclip.constant(t) for k, t in threshold.items()}
        threshold = optax.partition(rules, {"w": "w", "b": "b"})
    tx = optaxclip.skip_by(adam(), norm, threshold)
    state, updates = after(tx, gradients(), gradients(2), spoilt(100.0))
    assert counts(state) == (1, 1, 0)
    assert_zero(updates)


def test_ten_skips_in_a_row_and_then_it_goes_on():
    tx = optaxclip.skip_nonfinite(clipped_adam())
    state, updates = after(tx, gradients(0), *[spoilt(np.nan)] * 10)
    assert counts(state) == (10, 10, 10)
    assert_zero(updates)
    good, expected = after(tx, gradients(0), gradients(1))
    updates, state = jax.jit(tx.update)(gradients(1), state, PARAMS)
    assert counts(state) == (10, 0, 10)
    assert_same_bits(updates, expected)
    assert_same_bits(state.inner_state, good.inner_state)


def test_counters_do_not_wrap_around():
    tx = optaxclip.skip_nonfinite(optax.sgd(1.0))
    full = jnp.asarray(np.iinfo(np.int32).max)
    state = tx.init(PARAMS)._replace(skip_count=full, skipped_in_a_row=jnp.copy(full))
    _, state = tx.update(spoilt(np.nan), state, PARAMS)
    assert counts(state) == (full, full, 1)


# Spikes


def norms(*factors):
    """Gradients whose norms vary by some percent, times these factors."""
    noise = 1 + 0.05 * np.sin(np.arange(len(factors)) * 1.7)
    return [scaled(float(f * n)) for f, n in zip(factors, noise, strict=True)]


def test_a_spike_is_skipped_and_the_next_one_too():
    tx = optaxclip.skip_spikes(clipped_adam(), window=16, min_count=8)
    stream = norms(*[1] * 10, 100, 1, 100, 1e6, 1)
    update, state, skipped = jax.jit(tx.update), tx.init(PARAMS), []
    for grads in stream:
        _, state = update(grads, state, PARAMS)
        skipped.append(int(state.skipped_in_a_row))
    assert skipped == [0] * 10 + [1, 0, 1, 2, 0]
    assert optax.tree.get(state, "count") == len(stream) - 3


def test_spikes_that_stay_are_let_through_before_long():
    """The longest streak of skips after a rise, for the norms of this file."""
    tx = optaxclip.skip_spikes(optax.sgd(1.0), window=32, min_count=16)

    def step(state, factor):
        _, state = tx.update(scaled(factor), state, PARAMS)
        return state, state.skipped_in_a_row

    run = jax.jit(functools.partial(jax.lax.scan, step))
    noise = 1 + 0.05 * np.sin(np.arange(240) * 1.7)
    for rise, longest in [(1.5, 4), (2, 5), (10, 12), (100, 20)]:
        factors = noise * np.where(np.arange(240) < 40, 1, rise)
        _, streaks = run(tx.init(PARAMS), factors.astype(np.float32))
        assert 1 <= np.max(streaks) <= longest
        assert not np.any(streaks[-100:])


def test_a_streak_that_is_not_finite_changes_no_rule_and_never_ends():
    tx = optaxclip.skip_spikes(optax.sgd(1.0), window=8, min_count=4)
    state, _ = after(tx, *norms(*[1] * 10))
    update, later = jax.jit(tx.update), state
    for i in range(60):
        updates, later = update(spoilt(BAD["NaN" if i % 3 else "infinity"]), later)
        assert_zero(updates)
    assert counts(later) == (60, 60, 60)
    assert_same_bits(later.skip_rule_state, state.skip_rule_state)
    _, later = update(gradients(), later)
    assert counts(later) == (60, 0, 60)


def test_skip_spikes_lets_its_first_steps_through_but_no_nan():
    tx = optaxclip.skip_spikes(optax.sgd(1.0), window=8, min_count=4)
    state, _ = after(tx, *norms(1, 100, 1), spoilt(np.nan))
    assert counts(state) == (1, 1, 1)


# The loss


def test_a_spike_of_the_loss_skips_and_so_does_nan():
    tx = optaxclip.skip_spikes(clipped_adam(), window=8, min_count=4, watch_loss=True)
    update, state, skipped = jax.jit(tx.update), tx.init(PARAMS), []
    losses = [2.0, 2.1, 1.9, 2.0, 2.05, 50.0, 2.0, np.nan, np.inf, 2.0]
    for grads, loss in zip(norms(*[1] * 10), losses, strict=True):
        before = state
        updates, state = update(grads, state, PARAMS, loss=loss)
        skipped.append(int(state.skipped_in_a_row))
        if skipped[-1]:
            assert_zero(updates)
            assert_same_bits(state.inner_state, before.inner_state)
        if not np.isfinite(loss):
            assert_same_bits(state.skip_rule_state, before.skip_rule_state)
    assert skipped == [0, 0, 0, 0, 0, 1, 0, 1, 2, 0]
    assert counts(state) == (3, 0, 2)


def test_a_spike_of_the_norm_skips_while_the_loss_is_watched():
    tx = optaxclip.skip_by(optax.sgd(1.0), optaxclip.leaf_norm, 50.0, watch_loss=True)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for factor, loss, skip in [(1, 1.0, 0), (100, 1.0, 1), (1, 60.0, 1), (1, 1.0, 0)]:
        _, state = update(scaled(factor), state, PARAMS, loss=jnp.bfloat16(loss))
        assert int(state.skipped_in_a_row > 0) == skip
    assert optaxclip.metrics(state)["skip_norm"] > 1


def test_the_loss_goes_through_a_chain_and_a_guarded_step():
    inner = optaxclip.skip_by(optax.sgd(1.0), threshold=10.0, watch_loss=True)
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0), inner)
    _, state = tx.update(gradients(), tx.init(PARAMS), PARAMS, loss=11.0)
    assert optaxclip.metrics(state)["skip_count"] == 1
    guarded = optaxclip.guarded_step(optax.sgd(1.0), threshold=10.0, watch_loss=True)
    start = guarded.init(PARAMS)
    for loss, skips in [(11.0, 1), (9.0, 0)]:
        params, state = guarded.step(gradients(), PARAMS, start, loss=loss)
        assert state.skip_count == skips
        assert bool(jnp.all(params["w"] == PARAMS["w"])) == (skips == 1)


def test_a_missing_loss():
    tx = optaxclip.skip_spikes(optax.sgd(1.0), watch_loss=True)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        tx.update(gradients(), tx.init(PARAMS), PARAMS)
    assert str(error.value) == (
        "`skip_spikes(watch_loss=True)` compares losses, but `loss` is None: call "
        "`update(updates, state, params, loss=loss)`."
    )


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, factor, function, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda x: function(x) * factor, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    arguments = {"factor": jnp.float32(2.0), "function": jnp.negative, "other": None}
    for tx in (inner, optax.chain(inner, optax.identity())):
        skip = optaxclip.skip_nonfinite(tx)
        updates, _ = skip.update(gradients(), skip.init(PARAMS), PARAMS, **arguments)
        np.testing.assert_array_equal(updates["w"], -2 * gradients()["w"])
        guarded = optaxclip.guarded_step(tx)
        params, _ = guarded.step(gradients(), PARAMS, guarded.init(PARAMS), **arguments)
        np.testing.assert_allclose(
            params["w"], PARAMS["w"] - 2 * gradients()["w"], rtol=1e-6
        )


# Trees, dtypes and the state


@pytest.fixture(params=TREES)
def tree(request):
    needs_x64, make_tree = TREES[request.param]
    with jax.enable_x64(needs_x64):
        yield make_tree()


@pytest.mark.sample(1)
def test_every_kind_of_tree(tree):
    """A clip inside, as it takes every tree; all trees with a gradient are spikes."""
    inner = optaxclip.clip_by_global_norm(LOW)
    tx = optaxclip.skip_by(inner, optaxclip.leaf_norm, LOW)
    leaves, others = split_leaves(tree)
    state = tx.init(tree)
    structure, kinds = jax.tree.structure(state), shapes_and_dtypes(state)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(buffers)) == len(buffers)
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert jax.tree.structure(state) == structure
        assert shapes_and_dtypes(state) == kinds
        zeros, passed = split_leaves(updates)
        spikes = sum(x.size for x in leaves) > 0
        for x, y in zip(passed, others, strict=True):
            is_change = jnp.issubdtype(y.dtype, jnp.integer)
            assert_same_bits(x, jnp.zeros_like(y) if spikes and is_change else y)
        assert counts(state)[0] == (state.skipped_in_a_row if spikes else 0)
        for x, y in zip(zeros, leaves, strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert not np.any(np.asarray(x))
    assert state.skip_count == (2 if spikes else 0)
    assert state.inner_state.step_count == (0 if spikes else 2)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    good = optaxclip.skip_by(inner, threshold=1e6)
    _, state = jax.jit(good.update)(tree, good.init(tree), tree)
    assert (state.skip_count, state.inner_state.step_count) == (0, 1)


@pytest.mark.parametrize("bad", [np.nan, 1e4])
def test_bfloat16_gradients_with_float32_moments(bad):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients())
    tx = optaxclip.skip_by(
        optax.chain(optaxclip.clip_by_global_norm(1.0), adam(mu_dtype=jnp.float32)),
        threshold=1e3,
    )
    update, initial = jax.jit(tx.update), tx.init(params)
    good, before = update(grads, initial, params)
    bad_grads = grads | {"w": grads["w"].at[0, 0].set(bad)}
    updates, state = update(bad_grads, before, params)
    assert optax.tree.get(state, "mu")["w"].dtype == jnp.float32
    assert_same_bits(state.inner_state, before.inner_state)
    assert shapes_and_dtypes(state) == shapes_and_dtypes(initial)
    assert shapes_and_dtypes(updates) == shapes_and_dtypes(good)
    assert_zero(updates)


def test_zeros_have_the_dtype_that_the_inner_transformation_returns():
    grads = {"w": jnp.ones(3, jnp.bfloat16)}
    inner = optax.stateless(
        lambda u, p: jax.tree.map(lambda x: x.astype(jnp.float32), u)
    )
    tx = optaxclip.skip_nonfinite(inner)
    for value in (1.0, jnp.nan):
        updates, _ = tx.update({"w": grads["w"] * value}, tx.init(grads))
        assert updates["w"].dtype == jnp.float32
        assert np.all(updates["w"] == (0 if np.isnan(value) else 1))


def test_integers_that_the_inner_transformation_makes_floats():
    grads = {"w": jnp.ones(2), "i": jnp.arange(2)}
    tx = optaxclip.skip_nonfinite(standard(optax.sgd(0.5)))
    for value in (1.0, jnp.nan):
        bad = grads | {"w": value * grads["w"]}
        updates, _ = tx.update(bad, tx.init(grads), grads)
        expected = [0.0, -0.5] if value == 1 else [0.0, 0.0]
        np.testing.assert_array_equal(updates["i"], np.float32(expected))


def test_another_tree_structure():
    tx = optaxclip.skip_by(optax.identity(), optaxclip.leaf_norm, 1.0)
    with pytest.raises(ValueError, match=r"got leaves \['v'\] that `init` did not see"):
        tx.update({"v": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: optaxclip.skip_nonfinite(clipped_adam()),
        lambda: optaxclip.skip_spikes(clipped_adam(), window=4, min_count=2),
        lambda: optaxclip.skip_by(
            clipped_adam(), optaxclip.leaf_norm, optaxclip.quantile(0.9, 4)
        ),
    ],
)
@pytest.mark.sample(1)
def test_jit_scan_and_vmap_agree(make):
    tx = make()
    steps = [*norms(1, 1, 1.01, 50, 1), spoilt(np.nan), *norms(0.9)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *steps)

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS)
        return state, (updates, state)

    jitted, mapped = jax.jit(step), jax.jit(jax.vmap(step))
    state, expected, lanes = tx.init(PARAMS), [], []
    two = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    for grads in steps:  # under vmap one lane skips and the other does not
        state, out = jitted(state, grads)
        expected.append(out)
        two, out = mapped(
            two, jax.tree.map(lambda x, y: jnp.stack([x, y]), grads, gradients())
        )
        lanes.append(jax.tree.map(lambda x: x[0], out))
    assert state.skip_count >= 1
    assert two.skip_count[1] == 0
    _, scanned = jax.jit(jax.lax.scan, static_argnums=0)(step, tx.init(PARAMS), stacked)
    for actual in (scanned, jax.tree.map(lambda *xs: jnp.stack(xs), *lanes)):
        rows = jax.tree.map(lambda *xs: jnp.stack(xs), *expected)
        assert_close(actual, rows)


def test_without_jit_as_with_it():
    tx = optaxclip.skip_by(clipped_adam(), threshold=1e3)
    state = jitted = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for grads in [gradients(), spoilt(1e4), spoilt(np.nan)]:
        updates, state = tx.update(grads, state, PARAMS)
        expected, jitted = update(grads, jitted, PARAMS)
        assert shapes_and_dtypes(state) == shapes_and_dtypes(jitted)
        assert_close((updates, state), (expected, jitted))
    assert counts(state) == (2, 2, 1)


def test_traces_once():
    tx, traces = optaxclip.skip_nonfinite(clipped_adam()), 0

    @jax.jit
    def step(grads, state):
        nonlocal traces
        traces += 1
        return tx.update(grads, state, PARAMS)

    state = tx.init(PARAMS)
    for bad in (1.0, np.nan, 2.0, np.inf):
        _, state = step(spoilt(bad), state)
    assert (traces, state.skip_count) == (1, 2)


def test_a_checkpoint_by_flax_goes_on_bit_for_bit():
    def make():
        return optaxclip.skip_spikes(clipped_adam(), window=8, min_count=4)

    stream = norms(*[1] * 6, 100)
    state, _ = after(make(), *stream, spoilt(np.nan))
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(make().init(PARAMS), saved)
    assert_same_bits(restored, state)
    assert counts(restored) == (2, 2, 1)
    steps = [jax.jit(make().update)(gradients(), s, PARAMS) for s in (state, restored)]
    assert_same_bits(*steps)


# The guarded step


def test_a_guarded_step_is_a_skip_and_an_addition_bit_for_bit():
    """Under jit, with donation, over good steps, spikes and steps not finite.

    The learning rate is a power of two, as XLA may fuse the addition into the
    multiplication by it and so round once instead of twice.
    """
    inner = clipped_adam(2.0**-7)
    tx = optaxclip.skip_spikes(inner, window=8, min_count=4)
    guarded = optaxclip.guarded_step(
        inner, threshold=optaxclip.window_zscore(6.0, 8, 4)
    )

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def separate(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    together = jax.jit(guarded.step, donate_argnums=(1, 2))
    params, state = copied(PARAMS), guarded.init(PARAMS)
    expected, expected_state = copied(PARAMS), tx.init(PARAMS)
    assert_same_bits(state, expected_state)
    moved = []
    for grads in [*norms(*[1] * 6, 100, 1), spoilt(np.nan), spoilt(np.inf), *norms(1)]:
        before = np.asarray(params["w"]).copy()
        params, state = together(grads, params, state)
        expected, expected_state = separate(grads, expected_state, expected)
        assert_same_bits(params, expected)
        assert_same_bits(state, expected_state)
        moved.append(bool(np.any(before != params["w"])))
    assert moved == [True] * 6 + [False, True, False, False, True]
    assert counts(state) == (3, 0, 2)


def test_good_guarded_steps_are_those_without_a_guard_bit_for_bit():
    inner, guarded = clipped_adam(), optaxclip.guarded_step(clipped_adam())

    @jax.jit
    def unguarded(grads, state, params):
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, guarded.init(PARAMS)
    expected, expected_state = PARAMS, inner.init(PARAMS)
    for i in range(4):
        params, state = jax.jit(guarded.step)(gradients(i), params, state)
        expected, expected_state = unguarded(gradients(i), expected_state, expected)
    assert_same_bits(params, expected)
    assert_same_bits(state.inner_state, expected_state)


# Around and inside other transformations


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_around_multi_steps_a_bad_batch_is_left_out(bad):
    tx = optaxclip.skip_nonfinite(multi_steps(adam()))
    state, updates = after(
        tx, gradients(0), spoilt(bad), gradients(1), gradients(2), gradients(3)
    )
    expected_state, expected = after(tx, *map(gradients, range(4)))
    assert np.all(np.abs(updates["w"]) > 0)
    assert_same_bits(updates, expected)
    assert_same_bits(state.inner_state, expected_state.inner_state)
    assert counts(state) == (1, 0, 1)


def test_optax_alone_freezes_after_one_bad_batch():
    """What the last test would be without this package."""
    tx = multi_steps(optax.apply_if_finite(adam(), 1000))
    state, _ = after(tx, gradients(0), spoilt(np.nan))
    update = jax.jit(tx.update)
    for i in range(20):
        updates, state = update(gradients(i), state, PARAMS)
        assert_zero(updates)
    assert np.isnan(state.acc_grads["w"][2, 1])


def test_inside_multi_steps_it_skips_spikes_of_the_mean():
    tx = multi_steps(optaxclip.skip_by(adam(), threshold=100.0))
    state, updates = after(tx, gradients(0), spoilt(1e4))
    assert_zero(updates)
    assert counts(state.inner_opt_state) == (1, 1, 0)
    assert optax.tree.get(state, "count") == 0
    state, updates = after(tx, gradients(0), spoilt(1e4), gradients(1), gradients(2))
    _, expected = after(tx, gradients(1), gradients(2))
    assert_same_bits(updates, expected)
    assert counts(state.inner_opt_state) == (1, 0, 0)


def test_inside_multi_steps_nothing_can_save_its_accumulator():
    """A NaN stays there (0 * NaN), so that every later step is skipped: go around."""
    tx = multi_steps(optaxclip.skip_nonfinite(adam()))
    state, updates = after(tx, spoilt(np.nan), *[gradients()] * 9)
    assert_zero(updates)
    assert counts(state.inner_opt_state) == (5, 5, 5)
    assert np.isnan(state.acc_grads["w"][2, 1])


def test_metrics_of_a_skip_and_of_the_clips_inside():
    tx = optaxclip.skip_by(
        optax.named_chain(
            ("before", optaxclip.clip_by_global_norm(1.0)),
            ("adam", adam()),
            ("after", optaxclip.clip_by_value(1e-3)),
        ),
        threshold=1e3,
    )
    state, _ = after(tx, gradients(), spoilt(1e4), spoilt(np.nan))
    report = optaxclip.metrics(state)
    assert [key for key in report if "/" not in key] == SKIP_KEYS
    assert {key.split("/")[0] for key in report if "/" in key} == {"before", "after"}
    assert [int(report[key]) for key in SKIP_KEYS[2:]] == [2, 2, 1]
    assert np.isnan(report["skip_norm"])
    assert report["skip_threshold"] == 1e3
    # Of the last step that was made.
    assert report["before/step_count"] == report["after/step_count"] == 1
    np.testing.assert_allclose(
        report["before/grad_norm"], optaxclip.global_norm(gradients()), rtol=1e-6
    )


def test_metrics_before_the_first_step_and_with_one_clip():
    tx = optaxclip.skip_nonfinite(clipped_adam())
    report = optaxclip.metrics(tx.init(PARAMS))
    assert list(report)[-5:] == SKIP_KEYS
    assert "grad_norm" in report
    assert [float(report[key]) for key in SKIP_KEYS] == [0, np.inf, 0, 0, 0]
    state, _ = after(tx, gradients())
    report = optaxclip.metrics(state)
    assert report["skip_norm"] == report["grad_norm"] > 1
    assert report["skip_count"] == 0


def test_nested_skips():
    tx = optaxclip.skip_nonfinite(
        optax.chain(optax.identity(), optaxclip.skip_by(adam(), threshold=100.0))
    )
    state, updates = after(tx, gradients(), spoilt(1e4), spoilt(np.nan))
    assert_zero(updates)
    report = optaxclip.metrics(state)
    assert len(report) == 2 * len(SKIP_KEYS)
    skips = [int(v) for key, v in report.items() if key.endswith("skip_count")]
    assert sorted(skips) == [1, 1]
    assert optax.tree.get(state, "count") == 1


def test_in_a_chain_after_a_clip_and_beside_another_skip():
    tx = optax.chain(
        optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(1.0)),
        optaxclip.skip_by(adam(), threshold=0.5),
    )
    report = optaxclip.metrics(after(tx, gradients())[0])
    assert (report["0/skip_count"], report["1/skip_count"]) == (0, 1)
    assert report["clip_count"] == 1


def test_flax_train_state():
    state = flax.training.train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=optaxclip.skip_nonfinite(clipped_adam())
    )
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    once = step(state, gradients())
    twice = step(once, spoilt(np.nan))
    assert np.all(once.params["w"] != PARAMS["w"])
    assert_same_bits(twice.params, once.params)
    assert optaxclip.metrics(twice)["skip_count"] == 1
    assert optax.tree.get(twice.opt_state, "count") == 1


def test_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optaxclip.skip_nonfinite(clipped_adam())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.sum(model(x)))(model)
        optimizer.update(model, grads)
        return optaxclip.metrics(optimizer)

    start = np.asarray(model.kernel[...])
    assert step(model, optimizer, jnp.ones((1, 2)))["skip_count"] == 0
    moved = np.asarray(model.kernel[...])
    assert np.all(moved != start)
    report = step(model, optimizer, jnp.full((1, 2), jnp.nan))
    assert [int(report[key]) for key in SKIP_KEYS[2:]] == [1, 1, 1]
    np.testing.assert_array_equal(model.kernel[...], moved)
    assert step(model, optimizer, jnp.ones((1, 2)))["skipped_in_a_row"] == 0
    assert np.all(np.asarray(model.kernel[...]) != moved)


# Eight devices


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("whole", [False, True], ids=["skip_by", "guarded_step"])
@pytest.mark.sample(1)
def test_sharded_over_eight_devices(kind, whole):
    """A bad element on one device makes all of them skip; the rest is as on one."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    tx = optaxclip.skip_by(clipped_adam(), threshold=1e3)
    guarded = optaxclip.guarded_step(clipped_adam(), threshold=1e3)
    specs = {"w": PartitionSpec(("x", "y"), None), "b": PartitionSpec("y")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    def step(grads, state, params):
        if whole:
            return guarded.step(grads, params, state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    stream = [gradients(0), spoilt(np.nan), gradients(1), spoilt(1e4)]
    expected, expected_state = PARAMS, tx.init(PARAMS)
    for grads in stream:
        expected, expected_state = jax.jit(step)(grads, expected_state, expected)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings)
        state = jax.jit(tx.init)(params)
        sharded = jax.jit(step)
        for grads in stream:
            before = params
            params, state = sharded(jax.device_put(grads, shardings), state, params)
            if state.skipped_in_a_row:
                assert_same_bits(params, before)
        for name, sharding in shardings.items():
            moments = optax.tree.get(state, "mu")
            for x in (params[name], moments[name]):
                assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert counts(state) == counts(expected_state) == (2, 1, 1)
    assert_close(params, expected)
    assert_close(state, expected_state)


def test_shard_map_with_sharded_gradients_decides_as_one():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = optaxclip.skip_by(optax.sgd(1.0), threshold=1e3)
    spec = PartitionSpec("x")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec, PartitionSpec(), spec),
        out_specs=(spec, PartitionSpec()),
    )
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(gradients(), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(
        state.skip_metrics.skip_norm, optaxclip.global_norm(gradients()), rtol=1e-6
    )
    assert np.all(params["w"] == PARAMS["w"] - gradients()["w"])
    for count, bad in enumerate([np.nan, 1e4], start=1):
        after, state = step(spoilt(bad), state, params)
        assert_same_bits(after, params)
        assert counts(state) == (count, count, 1)


def test_pmap_with_replicated_gradients():
    tx = optaxclip.skip_nonfinite(clipped_adam(), axis_name=())

    @functools.partial(jax.pmap, axis_name="batch")
    def step(grads, state, params):
        grads = jax.lax.pmean(grads, "batch")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def replicate(tree):
        return jax.tree.map(lambda x: np.stack([x] * 8), tree)

    grads = replicate(gradients())
    one_bad = grads | {"w": np.array(grads["w"])}
    one_bad["w"][5, 0, 0] = np.nan  # of one device
    params, state = step(grads, replicate(tx.init(PARAMS)), replicate(PARAMS))
    assert np.all(params["w"] != replicate(PARAMS)["w"])
    after, state_after = step(one_bad, state, params)
    assert_same_bits(after, params)
    assert_same_bits(state_after.inner_state, state.inner_state)
    np.testing.assert_array_equal(optaxclip.metrics(state_after)["skip_count"], [1] * 8)


# What it costs, read from the compiled program as in `test_budget`

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the budgets are for programs of the CPU"
)


@functools.cache
def cost(name):
    """Bytes accessed and temporary bytes of a step, in units of the gradients.

    A conditional counts as the dearer of its branches: a step that is made.
    """
    adamw = standard(optax.adamw(1e-3))
    clipped = optax.chain(optaxclip.clip_by_global_norm(1.0), adamw)
    optax_clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    params = gpt_like(jnp.float32)
    grad_bytes = sum(4 * x.size for x in jax.tree.leaves(params))
    if name == "guarded_step":
        guarded = optaxclip.guarded_step(clipped)
        program = (
            jax.jit(guarded.step, donate_argnums=(1, 2))
            .lower(params, params, jax.eval_shape(guarded.init, params))
            .compile()
        )
    else:
        transforms = {
            "adamw": adamw,
            "clip": clipped,
            "skip_nonfinite": optaxclip.skip_nonfinite(clipped),
            "apply_if_finite": optax.apply_if_finite(optax_clipped, 5),
        }
        program = compiled_step(transforms[name], params)
    counted = figures(program)
    return counted["bytes_moved"] / grad_bytes, counted["temp_bytes"] / grad_bytes


def test_a_clip_by_one_norm_puts_no_barrier_into_a_skip():
    """One keeps XLA for GPU from making selects of the skip's conditional."""
    tx = optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(1.0))
    grads = jnp.ones(3)
    program = jax.make_jaxpr(tx.update)(grads, tx.init(grads))
    (skip,) = [of for of in program.eqns if of.primitive.name == "cond"][-1:]
    assert "optimization_barrier" not in str(skip.params["branches"])


@on_cpu
def test_a_conditional_is_counted_as_the_dearer_of_its_branches():
    def accessed(f, *args):
        return figures(jax.jit(f).lower(*args).compile())["bytes_moved"]

    def cheap(x):
        return 2 * jnp.sin(x)

    def dear(x):
        return jnp.cos(x) + jnp.roll(x, 3)

    x = jax.ShapeDtypeStruct((1 << 16,), jnp.float32)
    choose = accessed(lambda p, x: jax.lax.cond(p, cheap, dear, x), True, x)
    assert accessed(cheap, x) > 0.6 * accessed(dear, x)
    assert choose == pytest.approx(accessed(dear, x), rel=0.01)


@on_cpu
def test_a_guarded_step_costs_what_the_clip_inside_costs():
    """Skip and clip measure the same gradients, which are read once."""
    accessed, temporary = cost("guarded_step")
    assert accessed - cost("clip")[0] <= 0.01
    assert accessed - cost("adamw")[0] <= 1.05 + 2 * WRITES_SQUARES
    assert temporary <= 0.02 + WRITES_SQUARES


@on_cpu
def test_a_skip_writes_its_updates_and_nothing_else():
    """One copy, the updates: a conditional has to hand them to the addition."""
    accessed, temporary = cost("skip_nonfinite")
    assert accessed - cost("guarded_step")[0] <= 3.05
    assert temporary <= 1.02


@on_cpu
@pytest.mark.skipif(WRITES_SQUARES, reason="jax 0.10.0 adds the same copy to all")
def test_both_cost_less_than_apply_if_finite():
    accessed, temporary = cost("apply_if_finite")
    assert cost("skip_nonfinite")[0] <= 0.75 * accessed
    assert cost("guarded_step")[0] <= 0.6 * accessed
    assert cost("skip_nonfinite")[1] <= 1.005 * temporary  # both: the updates
    assert cost("guarded_step")[1] <= 0.02 * temporary
