"""The recorder: every step once, in loops and on meshes, and no second read."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _hlo import figures
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import KINDS, ONE_AXIS, STEPS, gradients, mesh, parameters, put
from programs import compiled_step, gpt_like

import optaxclip

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
SIZES = [0.1, 2.0, 40.0, jnp.nan, 0.2, 3.0, 1e4, 0.3]


def grads_of(size):
    return {"w": jnp.full((3, 2), size, jnp.float32), "b": jnp.full(2, 0.5)}


def norms_of(size):
    w, b = np.float32(size) * np.sqrt(np.float32(6)), np.sqrt(np.float32(0.5))
    return w, b, np.hypot(w, b)


def clip_and_step(axis_name=None):
    return optax.chain(
        optaxclip.clip_by_global_norm(5.0, axis_name=axis_name), optax.sgd(0.1)
    )


def train(tx, sizes, state=None, **extra):
    state = tx.init(PARAMS) if state is None else state
    update = jax.jit(tx.update)
    for size in sizes:
        _, state = update(grads_of(size), state, PARAMS, **extra)
    return state


def rows(state, length):
    """Steps, oldest first, and their entries."""
    count = int(state.history_count)
    steps = np.arange(max(0, count - length), count)
    return steps, jax.tree.map(lambda x: np.asarray(x)[steps % length], state.history)


@pytest.mark.parametrize("length", [1, 3, 8, 20])
@pytest.mark.sample(1)
def test_every_step_has_a_row(length):
    tx = optaxclip.record_history(clip_and_step(), length, leaf_norms=True)
    steps, history = rows(train(tx, SIZES), length)
    expected = np.array([norms_of(SIZES[step]) for step in steps])
    assert len(steps) == min(length, len(SIZES))
    np.testing.assert_allclose(history.history_norm, expected[:, 2], rtol=1e-6)
    np.testing.assert_array_equal(history.history_threshold, np.float32(5))
    scale = np.where(expected[:, 2] <= 5, 1, 5 / expected[:, 2])
    np.testing.assert_allclose(history.history_scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(history.history_clipped, expected[:, 2] > 5)
    assert not history.history_skipped.any()
    assert not history.history_has_loss.any()
    leaf_norms = history.history_leaf_norms
    assert list(leaf_norms.norm_names) == ["b", "w"]
    np.testing.assert_allclose(leaf_norms.norm_values, expected[:, 1::-1], rtol=1e-6)


def test_a_skipped_step_has_the_norm_that_decided_and_scale_0():
    guarded = optaxclip.skip_by(clip_and_step(), threshold=1000.0)
    tx = optaxclip.record_history(guarded, 20)
    _, history = rows(train(tx, SIZES), 20)
    skipped = [False, False, False, True, False, False, True, False]
    np.testing.assert_array_equal(history.history_skipped, skipped)
    norms = [norms_of(size)[2] for size in SIZES]
    np.testing.assert_allclose(history.history_norm, norms, rtol=1e-6)
    thresholds = np.where(skipped, 1000, 5)
    np.testing.assert_array_equal(history.history_threshold, thresholds)
    np.testing.assert_array_equal(history.history_scale == 0, skipped)
    clipped = [False, False, True, False, False, True, False, False]
    np.testing.assert_array_equal(history.history_clipped, clipped)


def test_a_skip_alone_is_recorded_by_its_own_norm():
    tx = optaxclip.record_history(optaxclip.skip_by(optax.sgd(1.0), threshold=90.0), 20)
    _, history = rows(train(tx, SIZES), 20)
    norms = np.array([norms_of(size)[2] for size in SIZES])
    np.testing.assert_allclose(history.history_norm, norms, rtol=1e-6)
    within = norms <= 90
    np.testing.assert_array_equal(history.history_scale, within)
    np.testing.assert_array_equal(history.history_skipped, ~within)


def test_an_overflow_of_the_loss_scale_is_a_skipped_step():
    tx = optaxclip.record_history(
        optaxclip.dynamic_loss_scale(clip_and_step(), init_scale=4.0), 4
    )
    _, history = rows(train(tx, [0.4, np.inf, 0.4]), 4)
    np.testing.assert_array_equal(history.history_skipped, [False, True, False])
    ordinary = norms_of(0.4)[2]
    expected = [ordinary / 4, np.inf, ordinary / 2]
    np.testing.assert_allclose(history.history_norm, expected, rtol=1e-6)
    np.testing.assert_array_equal(history.history_scale, [1, 0, 1])


def test_the_loss_is_recorded_and_a_step_skipped_for_it_keeps_its_norm():
    skip = optaxclip.skip_by(
        clip_and_step(), threshold=optaxclip.constant(50.0), watch_loss=True
    )
    tx = optaxclip.record_history(skip, 4)
    state = train(tx, [0.1], loss=2.0)
    state = train(tx, [0.2], state, loss=jnp.float32(99.0))
    _, history = rows(state, 4)
    np.testing.assert_array_equal(history.history_loss, np.float32([2, 99]))
    np.testing.assert_array_equal(history.history_skipped, [False, True])
    np.testing.assert_allclose(history.history_norm[1], norms_of(0.2)[2], rtol=1e-6)
    assert history.history_threshold[1] == 50


@pytest.mark.parametrize(("where", "length"), [("inside", 10), ("outside", 2)])
@pytest.mark.sample(1)
def test_micro_batches_are_no_steps(where, length):
    """Nor do they overwrite the oldest row of a full buffer."""

    def recorded(tx):
        return optaxclip.record_history(tx, length)

    with jax.numpy_dtype_promotion("standard"):
        if where == "inside":
            tx = optax.MultiSteps(recorded(clip_and_step()), 2)
            state = train(tx, [0.0, 2.0, 4.0, 8.0, 5.0]).inner_opt_state
        else:
            tx = recorded(optax.MultiSteps(clip_and_step(), 2))
            state = train(tx, [0.0, 2.0, 4.0, 8.0, 5.0])
    steps, history = rows(state, length)
    assert len(steps) == 2
    expected = [norms_of(1.0)[2], norms_of(6.0)[2]]
    np.testing.assert_allclose(history.history_norm, expected, rtol=1e-6)


def test_scan_and_donation_keep_the_state():
    tx = optaxclip.record_history(clip_and_step(), 3, leaf_norms=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(state, sizes):
        def step(state, size):
            return tx.update(grads_of(1.0) | {"b": size * jnp.ones(2)}, state)[1], None

        return jax.lax.scan(step, state, sizes)[0]

    state = scan(scan(tx.init(PARAMS), jnp.arange(4.0)), jnp.arange(4.0))
    _, history = rows(state, 3)
    assert state.history_count == 8
    expected = np.sqrt(2) * np.array([1, 2, 3])
    biases = history.history_leaf_norms.norm_values[:, 0]
    np.testing.assert_allclose(biases, expected, rtol=1e-6)


def test_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optaxclip.record_history(clip_and_step(), 4, leaf_norms=True)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        def loss_of(model):
            return jnp.mean(jnp.square(model(x)))

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads, loss=loss)
        return optaxclip.global_norm(grads), loss

    seen = [step(model, optimizer, jnp.full((5, 3), size)) for size in (1.0, 100.0)]
    state = jax.tree.map(
        lambda x: x.get_value(),
        optimizer.opt_state,
        is_leaf=lambda x: hasattr(x, "get_value"),
    )
    _, history = rows(state, 4)
    norms, losses = zip(*seen, strict=True)
    np.testing.assert_allclose(history.history_norm, norms, rtol=1e-6)
    np.testing.assert_allclose(history.history_loss, losses, rtol=1e-6)


MAPS = ["jit", "explicit", "shard_map", "pmap"]


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.sample(1)
def test_on_a_mesh_it_records_what_one_device_would(where):
    def of(axis_name):
        skip = optaxclip.skip_nonfinite(clip_and_step(axis_name), axis_name=axis_name)
        return optaxclip.record_history(skip, 10, leaf_norms=True, axis_name=axis_name)

    def run(tx, state, steps):
        def step(state, grads):
            return tx.update(grads, state, parameters())[1], None

        return jax.lax.scan(step, state, steps)[0].history

    def sharded(kind, over=None):
        on = mesh(KINDS[kind], 8)
        with jax.set_mesh(on):
            return jax.jit(functools.partial(run, tx))(
                tx.init(parameters()), put(gradients(), ONE_AXIS, on, (None,))
            )

    tx = of(None)
    state = tx.init(parameters())
    expected = jax.jit(functools.partial(run, tx))(state, gradients())
    if where == "jit":
        actual = sharded("auto")
    elif where == "explicit":
        actual = sharded("explicit")
    elif where == "shard_map":
        specs = jax.tree.map(lambda spec: P(None, *spec), ONE_AXIS)
        program = jax.shard_map(
            functools.partial(run, tx),
            mesh=mesh(KINDS["auto"], 8),
            in_specs=(P(), specs),
            out_specs=P(),
        )
        actual = jax.jit(program)(state, gradients())
    else:
        axes = {"kernel": "x", "bias": None, "layers": ["x", "x"], "scalar": None}
        tx = of(axes)
        steps = gradients()
        shares = {
            "kernel": jnp.stack(jnp.split(steps["kernel"], 8, 1)),
            "bias": steps["bias"],
            "layers": [
                jnp.stack(jnp.split(steps["layers"][0], 8, 2)),
                jnp.stack(jnp.split(steps["layers"][1], 8, 1)),
            ],
            "scalar": steps["scalar"],
        }
        in_axes = jax.tree.map(
            lambda axis: None if axis is None else 0, axes, is_leaf=lambda x: x is None
        )
        program = jax.pmap(
            functools.partial(run, tx), axis_name="x", in_axes=(None, in_axes)
        )
        actual = jax.tree.map(lambda x: x[0], program(state, shares))
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5)
    assert actual.history_skipped[:STEPS].tolist() == [False] * 4 + [True, False]


CLIPS = {
    "global": optaxclip.clip_by_global_norm(1.0),
    "leaf": optaxclip.clip_by_leaf_norm(1.0),
}


@pytest.mark.parametrize("leaf_norms", [False, True])
@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.sample(1)
def test_it_reads_no_gradient_again_and_calls_nobody_back(name, leaf_norms):
    params = gpt_like(jnp.float32)
    grad_bytes = sum(4 * x.size for x in jax.tree.leaves(params))
    with jax.numpy_dtype_promotion("standard"):
        chain = optax.chain(CLIPS[name], optax.adamw(1e-3))
        without = compiled_step(chain, params)
        recorder = optaxclip.record_history(chain, leaf_norms=leaf_norms)
        recorded = compiled_step(recorder, params)
    more = [
        (figures(recorded)[count] - figures(without)[count]) / grad_bytes
        for count in ("bytes_moved", "temp_bytes")
    ]
    assert max(more) <= 0.01
    assert not re.search(r"custom-call.*callback|outfeed|infeed", recorded.as_text())


def test_one_of_several_clips():
    chain = optax.named_chain(
        ("before", optaxclip.clip_by_global_norm(5.0)),
        ("sgd", optax.sgd(0.1)),
        ("after", optaxclip.clip_by_leaf_norm(0.1)),
    )
    tx = optaxclip.record_history(chain, 4, clip="after")
    _, history = rows(train(tx, [0.1, 2.0]), 4)
    np.testing.assert_array_equal(history.history_threshold, np.float32(0.1))
    names = r"must be one of \['before', 'after'\], got None"
    with pytest.raises(ValueError, match=names):
        optaxclip.record_history(chain).init(PARAMS)


@pytest.mark.parametrize("length", [0, -1, 2.0, 2.5, True])
def test_bad_length(length):
    rule = "must be an integer of at least 1, got"
    with pytest.raises(ValueError, match=rf"`record_history\(length=...\)` {rule}"):
        optaxclip.record_history(optaxclip.clip_by_global_norm(1.0), length)


def test_a_loss_that_is_no_scalar():
    tx = optaxclip.record_history(clip_and_step())
    with pytest.raises(ValueError, match=r"`update\(loss=...\)` must be a scalar, got"):
        train(tx, [1.0], loss=jnp.ones(3))


def test_nothing_to_record():
    with pytest.raises(ValueError, match="must hold a clip or a skip of optaxclip"):
        optaxclip.record_history(optax.sgd(1.0)).init(PARAMS)


def test_there_is_nothing_to_choose_from_one_clip():
    tx = optaxclip.record_history(clip_and_step(), 4, clip="main")
    with pytest.raises(ValueError, match=r"must be None where .* one clip, got 'main'"):
        tx.init(PARAMS)
