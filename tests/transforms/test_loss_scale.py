"""Dynamic loss scaling: true gradients inside, no overflow, a scale that fits."""

import functools
import re

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _hlo import figures
from cases import TREES, array, assert_same_bits, is_gradient
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from programs import compiled_step, gpt_like

import optaxclip

PARAMS = {"w": array(4, 3), "b": array(3, seed=1)}


def standard(tx):
    """Some of optax needs the standard promotion of dtypes; this package must not."""
    tx = optax.with_extra_args_support(tx)
    promotion = jax.numpy_dtype_promotion("standard")
    return optax.GradientTransformationExtraArgs(
        promotion(tx.init), promotion(tx.update)
    )


def adam(learning_rate=1e-2):
    return standard(optax.adam(learning_rate))


def halved(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float16), tree)


def times(factor, tree=PARAMS):
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def kept(state):
    return (
        float(state.loss_scale),
        int(state.steps_since_overflow),
        int(state.overflow_count),
    )


def assert_zero(tree):
    assert all(not np.any(np.asarray(x)) for x in jax.tree.leaves(tree))


def recursion(overflows, scale, interval, growth, backoff, least, most):
    """The published recursion: scale, steps since the last overflow, overflows."""
    steps = count = 0
    for overflow in overflows:
        if overflow:
            scale, steps, count = max(scale * backoff, least), 0, count + 1
        else:
            steps += 1
            if steps % interval == 0:
                scale = min(scale * growth, most)
        yield scale, steps, count


# The scale


@pytest.mark.parametrize(
    ("interval", "growth", "backoff", "least", "most"),
    [
        (1, 2.0, 0.5, 1.0, 2.0**24),
        (3, 2.0, 0.5, 1.0, 2.0**24),
        (3, 4.0, 0.25, 8.0, 128.0),
        (2, 2, 0.5, 2.0**-20, 64),
    ],
)
def test_the_scale_follows_the_recursion(interval, growth, backoff, least, most):
    tx = optaxclip.dynamic_loss_scale(
        optax.sgd(1.0), 64.0, interval, growth, backoff, least, most
    )
    rng = np.random.default_rng(0)
    overflows = np.concatenate(
        [rng.random(40) < 0.3, np.ones(30, bool), np.zeros(90, bool)]
    )

    def step(state, overflow):
        updates = {"w": jnp.where(overflow, jnp.inf, 1.0)}
        _, state = tx.update(updates, state)
        return state, state._replace(inner_state=())

    run = jax.jit(functools.partial(jax.lax.scan, step))
    _, states = run(tx.init({"w": jnp.float32(0)}), overflows)
    expected = list(recursion(overflows, 64.0, interval, growth, backoff, least, most))
    scales, steps, counts = zip(*expected, strict=True)
    np.testing.assert_array_equal(states.loss_scale, scales)
    np.testing.assert_array_equal(states.steps_since_overflow, steps)
    np.testing.assert_array_equal(states.overflow_count, counts)
    assert (min(scales), max(scales)) == (least, most)  # both bounds were reached


def test_a_fixed_scale():
    tx = optaxclip.dynamic_loss_scale(
        optax.sgd(1.0), 8.0, growth_interval=1, min_scale=8.0, max_scale=8.0
    )
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for factor, count in [(1.0, 0), (np.nan, 1), (1.0, 1)]:
        _, state = update(times(factor), state)
        assert (state.loss_scale, state.overflow_count) == (8.0, count)


def test_it_need_not_ever_grow():
    tx = optaxclip.dynamic_loss_scale(optax.sgd(1.0), growth_interval=10**12)
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    assert kept(state) == (2.0**15, 1, 0)


def test_counters_do_not_wrap_around():
    tx = optaxclip.dynamic_loss_scale(optax.sgd(1.0))
    full = jnp.asarray(np.iinfo(np.int32).max)
    state = tx.init(PARAMS)._replace(
        steps_since_overflow=full, overflow_count=jnp.copy(full)
    )
    update = jax.jit(tx.update)
    assert kept(update(PARAMS, state)[1])[1:] == (full, full)
    assert kept(update(times(np.nan), state)[1])[1:] == (0, full)


# A model in float16


X = np.asarray(array(8, 4), np.float16)
TARGET = np.asarray(array(8, 3, seed=5), np.float16)


def loss16(params, size=1.0):
    """A squared error, times ``size``, whose forward and backward pass are float16."""
    p = halved(params)
    error = (
        jnp.asarray(X, jnp.float16) @ p["w"] + p["b"][None] - TARGET.astype(np.float16)
    )
    error = (error * jnp.float16(0.01)).astype(jnp.float32)
    return jnp.sum(error**2) * size


def scaled_gradients(params, state, size=1.0):
    scale = optaxclip.loss_scale(state)
    return jax.grad(lambda p: scale * loss16(p, size))(params)


SIZES = [1.0] * 5 + [1e4] + [1.0] * 12 + [1e3] + [1.0] * 11


@pytest.mark.parametrize("init_scale", [2.0**24, 2.0**10])
def test_the_steps_of_flax(init_scale):
    """Same skips, scales and parameters as the dynamic scale of Flax.

    Flax makes its scale larger on the step after the interval, and does not count that
    step: its interval of 3 is 4 here. It leaves the skip to the loop.
    """
    tx = optaxclip.dynamic_loss_scale(adam(), init_scale, growth_interval=4)
    state, params = tx.init(PARAMS), PARAMS
    flax_scale = DynamicScale(growth_interval=3, scale=init_scale, minimum_scale=1.0)
    flax_params, flax_state = PARAMS, adam().init(PARAMS)

    @jax.jit
    def step(params, state, size):
        grads = scaled_gradients(params, state, size)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    @jax.numpy_dtype_promotion("standard")
    def flax_step(params, state, scale, size):
        scale, finite, _, grads = scale.value_and_grad(loss16)(params, size)
        updates, new_state = adam().update(grads, state, params)
        new = (optax.apply_updates(params, updates), new_state)
        new = jax.tree.map(functools.partial(jnp.where, finite), new, (params, state))
        return *new, scale, finite

    skipped = []
    for size in SIZES:
        before = state
        params, state = step(params, state, size)
        flax_params, flax_state, flax_scale, finite = flax_step(
            flax_params, flax_state, flax_scale, size
        )
        skipped.append(not bool(finite))
        assert int(state.overflow_count - before.overflow_count) == skipped[-1]
        assert state.loss_scale == flax_scale.scale
        for x, y in zip(
            jax.tree.leaves((params, state.inner_state)),
            jax.tree.leaves((flax_params, flax_state)),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9)
    assert 2 <= sum(skipped) <= len(SIZES) - 10  # both happened, and often


def test_what_overflows_at_any_large_scale_is_found_and_passed():
    """From the largest scale it backs off, step by step, and then trains."""
    tx = optaxclip.dynamic_loss_scale(adam(), 2.0**24, growth_interval=100)
    state, params, losses = tx.init(PARAMS), PARAMS, []

    @jax.jit
    def step(params, state):
        updates, state = tx.update(scaled_gradients(params, state, 1e3), state, params)
        return optax.apply_updates(params, updates), state, loss16(params)

    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert 5 < state.overflow_count < 20
    assert optax.tree.get(state, "count") == 60 - state.overflow_count
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.9 * losses[0]


def test_tiny_gradients_survive_in_float16_only_with_a_scale():
    """The product that the module's docstring is about."""
    params = {"w": jnp.full(3, 1.0, jnp.float16)}

    def loss(p):
        return 1e-9 * jnp.sum(p["w"].astype(jnp.float32))

    assert_zero(jax.grad(loss)(params))
    tx = optaxclip.dynamic_loss_scale(optax.sgd(1.0))
    state = tx.init(params)
    scale = optaxclip.loss_scale(state)
    grads = jax.grad(lambda p: scale * loss(p))(params)
    updates, _ = tx.update(grads, state, params)
    assert grads["w"].dtype == jnp.float16
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_allclose(updates["w"], -1e-9, rtol=1e-3)


# True gradients inside


CLIPS = {
    "global": optaxclip.clip_by_global_norm(1.0),
    "leaf": optaxclip.clip_by_leaf_norm(1.0),
    "value": optaxclip.clip_by_value(0.5),
    "percentile": optaxclip.clip_by_percentile(50, 4),
    "unit": optaxclip.adaptive_grad_clip(0.1),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("init_scale", [2.0**15, 2.0**-10])
@pytest.mark.sample(1)
def test_thresholds_hold_true_gradients(clip, init_scale):
    """Bit for bit the steps of float32 gradients that were never scaled."""
    tx = optaxclip.dynamic_loss_scale(clip, init_scale, min_scale=2.0**-12)
    state, plain = tx.init(PARAMS), clip.init(PARAMS)
    update, plain_update = jax.jit(tx.update), jax.jit(clip.update)
    for factor in (1.0, 3.0, 0.1, 2.0):
        updates, state = update(times(factor * init_scale), state, PARAMS)
        expected, plain = plain_update(times(factor), plain, PARAMS)
        assert_same_bits(updates, expected)
        assert_same_bits(state.inner_state, plain)
    assert state.inner_state.clip_count > 0


def test_float16_gradients_are_widened_before_they_are_clipped():
    params = halved(PARAMS)
    grads = times(2.0**12, params)
    clip = optaxclip.clip_by_global_norm(1.0)
    tx = optaxclip.dynamic_loss_scale(optax.chain(clip, adam()), 2.0**12)
    state = tx.init(params)
    assert optax.tree.get(state, "mu")["w"].dtype == jnp.float32
    updates, after = jax.jit(tx.update)(grads, state, params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    inner = optax.chain(clip, adam())
    expected, inner_state = jax.jit(inner.update)(wide, inner.init(wide), wide)
    for x, y in zip(
        jax.tree.leaves((updates, after.inner_state)),
        jax.tree.leaves((expected, inner_state)),
        strict=True,
    ):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert shapes_and_dtypes(after) == shapes_and_dtypes(state)
    with jax.numpy_dtype_promotion("standard"):  # the one rounding, by optax
        new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(
        new["w"], (wide["w"] + updates["w"]).astype(jnp.float16)
    )


@pytest.mark.parametrize("name", TREES)
@pytest.mark.sample(2)
def test_every_kind_of_tree(name):
    needs_x64, make_tree = TREES[name]
    with jax.enable_x64(needs_x64):
        tree = make_tree()
        tx = optaxclip.dynamic_loss_scale(
            optaxclip.clip_by_global_norm(1e6), 4.0, growth_interval=2
        )
        state = tx.init(tree)
        structure, kinds = jax.tree.structure(state), shapes_and_dtypes(state)
        buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
        assert len(set(buffers)) == len(buffers)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(tree, state, tree)
            assert jax.tree.structure(state) == structure
            assert shapes_and_dtypes(state) == kinds
        assert state.loss_scale == 8.0
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        for (path, x), y in zip(leaves, jax.tree.leaves(updates), strict=True):
            if not is_gradient(path, x):
                assert_same_bits(y, x)
                continue
            wide = np.promote_types(
                np.float32 if x.dtype.kind in "fV" else x.dtype,
                x.dtype if x.dtype.itemsize > 2 else np.float32,
            )
            assert y.dtype == wide
            np.testing.assert_array_equal(y, np.asarray(x).astype(wide) / 8)


# An overflow


def test_an_overflow_leaves_the_inner_state_bit_for_bit():
    inner = optax.chain(optaxclip.clip_by_percentile(50, 4), adam())
    tx = optaxclip.dynamic_loss_scale(inner, 16.0)
    params = halved(PARAMS)
    update = jax.jit(tx.update)
    good, before = update(params, tx.init(params), params)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = params | {"w": params["w"].at[1, 2].set(bad)}
        updates, state = update(spoilt, before, params)
        assert_zero(updates)
        assert shapes_and_dtypes(updates) == shapes_and_dtypes(good)
        assert_same_bits(state.inner_state, before.inner_state)
        assert kept(state) == (8.0, 0, 1)
    again, _ = update(times(0.5, params), state, params)
    expected, _ = update(params, before, params)
    assert_same_bits(again, expected)  # half the scale, the same true gradients


def test_one_overflowing_leaf_of_many_is_seen():
    grads = [jnp.ones(2, jnp.float16) for _ in range(9)]
    tx = optaxclip.dynamic_loss_scale(optax.sgd(1.0))
    update = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[1].overflow_count)
    for i in range(9):
        bad = [g * jnp.float16(np.inf) if i == j else g for j, g in enumerate(grads)]
        assert update(bad) == 1
    assert update(grads) == 0
    assert update([jnp.full(1000, 65504, jnp.float16)]) == 0  # squares do not fit
    assert update([jnp.full(1000, 3e38)]) == 1  # nor does the norm


def test_extra_arguments_reach_the_inner_transformation():
    inner = optaxclip.skip_by(optax.sgd(1.0), threshold=100.0, watch_loss=True)
    tx = optaxclip.dynamic_loss_scale(optax.chain(optax.identity(), inner), 4.0)
    start, update = tx.init(PARAMS), jax.jit(tx.update)
    for loss, skips in [(1.0, 0), (101.0, 1)]:
        _, state = update(PARAMS, start, PARAMS, loss=jnp.float32(loss))
        report = optaxclip.metrics(state)
        assert (report["skip_count"], report["overflow_count"]) == (skips, 0)


# Everywhere


def test_jit_with_donation():
    tx = optaxclip.dynamic_loss_scale(adam(), growth_interval=1)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    state = tx.init(PARAMS)
    for factor in (1.0, np.nan, 1.0):
        updates, state = step(times(factor), state, PARAMS)
    assert kept(state) == (2.0**16, 1, 1)
    assert np.all(np.isfinite(updates["w"]))


def test_vmap():
    tx = optaxclip.dynamic_loss_scale(adam(), 8.0, growth_interval=2)
    factors = jnp.array([1.0, np.nan, 2.0, np.inf])
    states = jax.vmap(lambda _: tx.init(PARAMS))(factors)
    step = jax.vmap(lambda f, state: tx.update(times(f), state, PARAMS))
    updates, states = jax.jit(step)(factors, states)
    updates, states = jax.jit(step)(jnp.abs(factors), states)
    np.testing.assert_array_equal(states.loss_scale, [16, 2, 16, 2])
    np.testing.assert_array_equal(states.overflow_count, [0, 2, 0, 2])
    np.testing.assert_array_equal(np.all(updates["b"] != 0, axis=1), [1, 0, 1, 0])
    np.testing.assert_array_equal(optax.tree.get(states, "count"), [2, 0, 2, 0])
    report = optaxclip.metrics(states)
    np.testing.assert_array_equal(report["loss_scale"], [16, 2, 16, 2])
    np.testing.assert_array_equal(optaxclip.loss_scale(states), [16, 2, 16, 2])


def accumulated(tx, steps=2):
    return standard(optax.MultiSteps(tx, steps).gradient_transformation())


def test_multi_steps_inside_accumulates_true_gradients():
    """An overflow drops its micro-batch, and the accumulator does not notice."""
    inner = accumulated(optax.chain(optaxclip.clip_by_global_norm(1.0), adam()))
    tx = optaxclip.dynamic_loss_scale(inner, 16.0, growth_interval=100)
    state, plain = tx.init(PARAMS), inner.init(PARAMS)
    update, plain_update = jax.jit(tx.update), jax.jit(inner.update)
    scale = 16.0
    for factor in (1.0, np.nan, 3.0, np.inf, 0.5, 2.0):
        updates, state = update(times(factor * scale), state, PARAMS)
        if np.isfinite(factor):
            expected, plain = plain_update(times(factor), plain, PARAMS)
            assert_same_bits(updates, expected)
        else:
            scale /= 2
            assert_zero(updates)
        assert_same_bits(state.inner_state, plain)
    assert optaxclip.metrics(state)["step_count"] == 2
    assert kept(state) == (4.0, 2, 2)


def test_multi_steps_outside_counts_real_steps_and_keeps_an_infinity():
    """Where it does not belong: it works until something overflows."""
    tx = accumulated(optaxclip.dynamic_loss_scale(adam(), 16.0, growth_interval=2))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    structure = jax.tree.structure(state)
    for _ in range(4):
        updates, state = update(times(optaxclip.loss_scale(state)), state, PARAMS)
    assert jax.tree.structure(state) == structure
    assert optaxclip.loss_scale(state) == 32.0
    assert np.all(updates["b"] != 0)
    for _ in range(2):
        _, state = update(times(np.inf), state, PARAMS)
    for _ in range(4):
        updates, state = update(PARAMS, state, PARAMS)
        assert_zero(updates)
    assert optaxclip.metrics(state)["overflow_count"] == 3


@pytest.mark.parametrize("skip", [optaxclip.skip_nonfinite, optaxclip.skip_spikes])
def test_a_skip_outside_is_refused(skip):
    """It would never let the scale back off."""
    scaled = optaxclip.dynamic_loss_scale(adam(), 16.0)
    for tx in (skip(scaled), skip(optax.chain(optaxclip.zclip(), scaled))):
        with pytest.raises(ValueError, match="must go inside `dynamic_loss_scale`"):
            tx.init(PARAMS)
    with pytest.raises(ValueError, match="must go inside `dynamic_loss_scale`"):
        optaxclip.guarded_step(scaled).init(PARAMS)


def test_flax_train_state():
    tx = optaxclip.dynamic_loss_scale(adam(), 2.0**18)
    state = flax.training.train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=tx
    )

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=scaled_gradients(state.params, state, 1e3))

    for _ in range(10):
        before, state = state, step(state)
    report = optaxclip.metrics(state)
    assert report["loss_scale"] == optaxclip.loss_scale(state)
    assert 0 < report["overflow_count"] < 10
    assert report["loss_scale"] == 2.0 ** (18 - int(report["overflow_count"]))
    assert np.all(before.params["w"] != state.params["w"])


def test_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    clip = optaxclip.clip_by_global_norm(1.0)
    tx = optaxclip.dynamic_loss_scale(optax.chain(clip, adam()), 8.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        scale = optaxclip.loss_scale(optimizer)
        grads = nnx.grad(lambda model: scale * jnp.sum(model(x)))(model)
        optimizer.update(model, grads)
        return optaxclip.metrics(optimizer)

    start = np.asarray(model.kernel[...])
    report = step(model, optimizer, jnp.ones((1, 2)))
    np.testing.assert_allclose(report["grad_norm"], 3.0, rtol=1e-6)  # unscaled
    moved = np.asarray(model.kernel[...])
    assert np.all(moved != start)
    report = step(model, optimizer, jnp.full((1, 2), jnp.inf))
    assert (report["loss_scale"], report["overflow_count"]) == (4.0, 1)
    np.testing.assert_array_equal(model.kernel[...], moved)


# Eight devices; tests/test_order.py trains on them


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.sample(1)
def test_an_overflow_on_one_device_is_one_on_all(checked):
    """Of a share: types say so, or where they cannot, `axis_name`."""
    axis = {} if checked else {"axis_name": "x"}
    clip = optaxclip.clip_by_global_norm(1.0, **axis)
    tx = optaxclip.dynamic_loss_scale(optax.chain(clip, optax.sgd(1.0)), 4.0, **axis)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(jax.P("x"), jax.P()),
        out_specs=(jax.P("x"), jax.P()),
        check_vma=checked,
    )
    def step(grads, state):
        updates, state = tx.update({"w": grads}, state)
        return updates["w"], state

    grads = array(16, 3)
    state = tx.init({"w": grads})
    updates, state = step(4 * grads, state)
    norm = np.linalg.norm(grads)
    np.testing.assert_allclose(updates, -grads / norm, rtol=1e-6)
    np.testing.assert_allclose(optaxclip.metrics(state)["grad_norm"], norm, rtol=1e-6)
    for count in (1, 2):
        updates, state = step(grads.at[5, 0].set(jnp.inf), state)
        assert_zero(updates)
        assert kept(state) == (4.0 / 2**count, 0, count)


def test_pmap_without_a_word_on_what_is_whole_warns_once():
    tx = optaxclip.dynamic_loss_scale(optaxclip.clip_by_global_norm(1.0))
    step = jax.pmap(lambda grads: tx.update(grads, tx.init(grads))[0], axis_name="x")
    with pytest.warns(UserWarning, match="`axis_name=` is missing") as record:
        step(jnp.ones((8, 3)))
    assert len(record) == 1


# What it costs, read from the compiled program as in `test_budget`


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the budgets are for programs of the CPU"
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_it_costs_what_a_skip_costs_and_makes_no_wide_copy_of_the_gradients(dtype):
    def cost(wrap):
        clip = optaxclip.clip_by_global_norm(1.0)
        inner = optax.chain(clip, standard(optax.adamw(1e-3)))
        with jax.numpy_dtype_promotion("standard"):
            program = compiled_step(wrap(inner), params)
        counted = figures(program)
        return counted["bytes_moved"], counted["temp_bytes"]

    params = gpt_like(dtype, layers=2)
    size = sum(x.size for x in jax.tree.leaves(params))
    (moved, temporary), (skip, _) = map(
        cost, (optaxclip.dynamic_loss_scale, optaxclip.skip_nonfinite)
    )
    assert temporary <= 1.02 * 4 * size  # the updates, in float32
    if dtype == jnp.float32:  # else the moments of the skip are narrower
        assert moved - skip <= 0.05 * 4 * size


# Reading, and errors


def test_metrics_of_a_loss_scale_and_what_is_inside():
    inner = optaxclip.skip_spikes(
        optax.named_chain(
            ("before", optaxclip.clip_by_global_norm(1.0)),
            ("adam", adam()),
            ("after", optaxclip.clip_by_value(1e-3)),
        )
    )
    tx = optax.chain(optax.identity(), optaxclip.dynamic_loss_scale(inner, 4.0))
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    report = optaxclip.metrics(state)
    assert list(report)[-2:] == ["loss_scale", "overflow_count"]
    assert (report["loss_scale"], report["overflow_count"]) == (4.0, 0)
    assert report["skip_count"] == 0
    assert report["1/before/step_count"] == report["1/after/step_count"] == 1
    alone = optaxclip.metrics(optaxclip.dynamic_loss_scale(optax.sgd(1.0)).init(PARAMS))
    assert list(alone) == ["loss_scale", "overflow_count"]


@pytest.mark.parametrize("name", optaxclip.LossScaleState._fields)
def test_field_names_are_found_once_beside_an_optimizer(name):
    params = {"scale": jnp.ones(2), "norm": jnp.ones(2), "count": jnp.ones(2)}
    clip = optaxclip.clip_by_percentile(50, 4)
    tx = optaxclip.dynamic_loss_scale(optax.chain(clip, optax.adamw(1e-3)))
    assert len(optax.tree.get_all_with_path(tx.init(params), name)) == 1


def message(expected):
    return pytest.raises(ValueError, match=f"^{re.escape(expected)}$")


def test_no_loss_scale_or_several():
    sgd = optax.sgd(1.0).init(PARAMS)
    with message(
        "`loss_scale(opt_state=...)` must hold the state of one `dynamic_loss_scale`, "
        "got 0 in EmptyState."
    ):
        optaxclip.loss_scale(sgd)
    tx = optaxclip.dynamic_loss_scale(optaxclip.dynamic_loss_scale(optax.sgd(1.0)))
    state = tx.init(PARAMS)
    with message(
        "`loss_scale(opt_state=...)` must hold the state of one `dynamic_loss_scale`, "
        "got 2 in LossScaleState, EmptyState."
    ):
        optaxclip.loss_scale(state)


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("init_scale", 0.5, "between `min_scale` and `max_scale`"),
        ("init_scale", 2.0**25, "between `min_scale` and `max_scale`"),
        ("init_scale", np.nan, "between `min_scale` and `max_scale`"),
        ("init_scale", "1", "a number that is between `min_scale` and `max_scale`"),
        ("growth_interval", 0, "an integer of at least 1"),
        ("growth_interval", 2.0, "an integer of at least 1"),
        ("growth_interval", True, "an integer of at least 1"),
        ("growth_interval", np.inf, "an integer of at least 1"),
        ("growth_factor", 1.0, "above 1"),
        ("growth_factor", np.nan, "above 1"),
        ("backoff_factor", 1.0, "above 0 and below 1"),
        ("backoff_factor", 0.0, "above 0 and below 1"),
        ("min_scale", 0.0, "between 2**-126 and 2**126"),
        ("min_scale", -1.0, "between 2**-126 and 2**126"),
        ("max_scale", 0.5, "between `min_scale` and 2**126"),
        ("max_scale", np.inf, "between `min_scale` and 2**126"),
    ],
)
def test_bad_arguments(argument, value, rule):
    with message(
        f"`dynamic_loss_scale({argument}=...)` must be {rule}, got {value!r}."
    ):
        optaxclip.dynamic_loss_scale(optax.sgd(1.0), **{argument: value})


def test_the_optimizer_sees_parameters_in_float32():
    seen = []

    def update(updates, state, params=None):
        seen.append((updates["w"].dtype, params["w"].dtype))
        return updates, state

    inner = optax.GradientTransformation(lambda params: params, update)
    tx = optaxclip.dynamic_loss_scale(inner)
    params = {"w": jnp.ones(2, jnp.float16)}
    state = tx.init(params)
    tx.update(params, state, params)
    assert state.inner_state["w"].dtype == jnp.float32
    assert set(seen) == {(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))}


def not_scaled(tx, wrap=lambda f: f):
    state = tx.init(PARAMS)
    return wrap(tx.update)(PARAMS, state, PARAMS)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "around",
    [lambda tx: tx, lambda tx: optax.chain(optax.identity(), tx)],
    ids=["bare", "chain"],
)
def test_a_loss_that_nobody_scaled_is_told_once(wrap, around, loss_scale_is_known):
    loss_scale_is_known._is_known = False
    tx = around(optaxclip.dynamic_loss_scale(optax.sgd(1.0)))
    with pytest.warns(UserWarning, match="nothing has called `optaxclip.loss_") as told:
        not_scaled(tx, wrap)
    assert [warning.filename for warning in told] == [__file__]
    not_scaled(tx, lambda f: jax.jit(lambda *args: f(*args)))  # a second trace


def test_whoever_asks_for_the_loss_scale_is_not_told(loss_scale_is_known):
    loss_scale_is_known._is_known = False
    tx = optaxclip.dynamic_loss_scale(optax.sgd(1.0))
    state = tx.init(PARAMS)

    @jax.jit
    def step(state):
        return tx.update(times(optaxclip.loss_scale(state)), state, PARAMS)

    step(state)


def test_to_read_the_field_is_not_to_ask(loss_scale_is_known):
    loss_scale_is_known._is_known = False
    tx = optaxclip.dynamic_loss_scale(optax.sgd(1.0))
    state = tx.init(PARAMS)
    assert state.loss_scale == optaxclip.metrics(state)["loss_scale"]
    with pytest.warns(UserWarning, match="Take the gradients of"):
        tx.update(PARAMS, state, PARAMS)


def test_an_nnx_optimizer_is_told_where_it_is_updated(loss_scale_is_known):
    loss_scale_is_known._is_known = False
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optaxclip.dynamic_loss_scale(optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with pytest.warns(UserWarning, match="nothing has called") as told:
        optimizer.update(model, nnx.state(model, nnx.Param))
    assert told[0].filename == __file__
