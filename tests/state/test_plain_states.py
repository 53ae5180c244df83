"""States are plain: arrays in tuples and dicts, whatever the parameters are made of."""

import functools
import pickle

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ONE_OF_EACH, TRANSFORMS, assert_same_bits
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip

every_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
every_kind = pytest.mark.parametrize("make", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "scale": 0.5}
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
LEAVES = ["dense/bias", "dense/kernel", "scale"]
BIAS = 0  # its place among the leaves
LOW = 0.05


def everything(make, length=4):
    """A clip with all that can stand around it."""
    optimizer = optax.chain(make(LOW), optax.adam(1e-3))
    guarded = optaxclip.skip_nonfinite(optaxclip.skip_spikes(optimizer))
    return optaxclip.record_history(guarded, length, leaf_norms=True)


# Flax NNX with shardings


class Sharded(nnx.Module):
    """A layer whose parameters say where they belong."""

    def __init__(self):
        kernel = jnp.arange(64.0).reshape(8, 8) / 64
        self.kernel = nnx.Param(kernel, out_sharding=("data", None))
        self.bias = nnx.Param(jnp.ones(8), out_sharding=("data",))


def sharded_loss(model, x):
    kernel = jax.sharding.reshard(model.kernel[...], P(None, None))
    return jnp.sum((x @ kernel) ** 2) + jnp.sum(model.bias[...])


EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
MESHES = [
    (EXPLICIT, 8, "clip_by_percentile(leaf)"),
    (EXPLICIT, 4, "clip_by_block_rms"),
    (EXPLICIT, 8, "adaptive_grad_clip"),
    (AUTO, 8, "clip_by_leaf_norm"),
    (AUTO, 4, "adaptive_grad_clip"),
]


@pytest.mark.parametrize(("kind", "devices", "name"), MESHES)
@pytest.mark.sample(1)
def test_parameters_of_flax_nnx_with_shardings(kind, devices, name):
    make = TRANSFORMS[name]
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
    x = jnp.ones((2, 8))
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        model = Sharded()
        optimizer = nnx.Optimizer(model, everything(make), wrt=nnx.Param)

        def step(model, optimizer):
            optimizer.update(model, nnx.grad(sharded_loss)(model, x))

        jitted = nnx.jit(step)
        jitted(model, optimizer)
        jitted(model, optimizer)
    state = nnx.as_pure(optimizer.opt_state)
    for moments in (optax.tree.get(state, "mu"), optax.tree.get(state, "nu")):
        assert moments["kernel"].sharding.spec[0] == "data"
        assert moments["bias"].sharding.spec == P("data")
    report = optaxclip.metrics(optimizer, per_leaf=True)
    counts = [x for name, x in report.items() if name.endswith("step_count")]
    assert counts
    assert all(count == 2 for count in counts)
    assert {*state.history.history_leaf_norms.norm_names} == {"kernel", "bias"}


# Gradients that are missing


def without_bias(tree):
    return eqx.tree_at(lambda tree: tree["dense"]["bias"], tree, None)


@every_transform
@pytest.mark.sample(3)
def test_a_gradient_that_is_none_is_not_measured_and_its_memory_stays(make):
    tx = optaxclip.record_history(make(LOW), 4, leaf_norms=True)
    _, seen = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    updates, state = tx.update(without_bias(PARAMS), seen, PARAMS)
    assert updates["dense"]["bias"] is None
    assert jax.tree.structure(state) == jax.tree.structure(seen)
    for x, y in zip(
        *(jax.tree_util.tree_leaves_with_path(s.inner_state) for s in (state, seen)),
        strict=True,
    ):
        name = jax.tree_util.keystr(x[0])
        if "rule_state" in name and "dense/bias" in name:
            assert_same_bits(x[1], y[1])
        elif "rule_state" in name and x[1].shape[-1:] == (len(LEAVES),):
            assert_same_bits(x[1][..., BIAS], y[1][..., BIAS])
    assert state.history.history_leaf_norms.norm_values[1, BIAS] == 0
    alone = make(LOW)
    frozen = without_bias(PARAMS)
    _, expected = alone.update(frozen, alone.init(frozen), frozen)
    _, first = tx.update(frozen, tx.init(PARAMS), PARAMS)
    for name, value in optaxclip.metrics(expected, per_leaf=True).items():
        if "clipped_norm_fraction" not in name:  # of fewer norms
            np.testing.assert_allclose(
                optaxclip.metrics(first, per_leaf=True)[name], value, rtol=1e-6
            )


@every_kind
@pytest.mark.sample(1)
def test_an_integer_leaf_whose_gradient_is_none(make):
    params = {"w": jnp.ones((3, 2)), "n": jnp.arange(3)}
    tx = everything(make)
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init({"w": params["w"], "n": None})
        grads = {"w": params["w"], "n": None}
        updates, state = jax.jit(tx.update)(grads, state, params)
    assert updates["n"] is None
    assert np.all(np.isfinite(updates["w"]))
    assert set(state.history.history_leaf_norms) == {"w"}


def test_equinox_freezes_layers_its_own_way():
    """`init` on the whole model; gradients that are None for what is frozen."""
    model = eqx.nn.MLP(3, 2, 4, depth=2, key=jax.random.key(0))
    spec = jax.tree.map(lambda _: False, model)
    spec = eqx.tree_at(
        lambda tree: (tree.layers[-1].weight, tree.layers[-1].bias), spec, (True, True)
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for make in ONE_OF_EACH.values():
            tx = optax.chain(make(LOW), optax.sgd(0.1))
            state = tx.init(eqx.filter(model, eqx.is_inexact_array))
            trained, frozen = eqx.partition(model, spec)

            def loss(trained, frozen=frozen):
                return jnp.sum(eqx.combine(trained, frozen)(jnp.ones(3)) ** 2)

            grads = eqx.filter_grad(loss)(trained)
            updates, state = eqx.filter_jit(tx.update)(
                grads, state, eqx.filter(model, eqx.is_inexact_array)
            )
            new = eqx.apply_updates(model, updates)
            assert not np.array_equal(new.layers[-1].bias, model.layers[-1].bias)
            assert_same_bits(new.layers[0].weight, model.layers[0].weight)


@every_kind
@pytest.mark.sample(1)
def test_a_skip_around_a_clip_takes_gradients_that_are_none(make):
    tx = optaxclip.skip_nonfinite(optax.chain(make(LOW), optax.sgd(0.1)))
    state = tx.init(PARAMS)
    bad = without_bias(jax.tree.map(lambda x: x * jnp.nan, PARAMS))
    for gradients, skipped in [(without_bias(PARAMS), 0), (bad, 1)]:
        updates, state = tx.update(gradients, state, PARAMS)
        assert state.skip_count == skipped
        assert updates["dense"]["bias"] is None


@every_transform
def test_a_leaf_that_init_did_not_see_is_named(make):
    tx = make(LOW)
    if "dense/bias" not in str(tx.init(PARAMS).clip_metrics):
        pytest.skip("no norm of this leaf alone")
    state = tx.init(without_bias(PARAMS))
    with pytest.raises(ValueError, match=r"updates=.*\['dense/bias'\]"):
        tx.update(PARAMS, state, PARAMS)


def test_parameters_that_are_missing_are_named():
    tx = optaxclip.adaptive_grad_clip(0.1)
    with pytest.raises(ValueError, match=r"params=.*none at \['dense/bias'\]"):
        tx.update(PARAMS, tx.init(PARAMS), without_bias(PARAMS))


class Critic(eqx.Module):
    """A module with the method that Flax NNX has on its variables."""

    layer: eqx.nn.Linear

    def get_value(self, observation):
        return self.layer(observation)


def test_a_module_with_a_method_get_value_is_no_variable():
    critic = Critic(eqx.nn.Linear(2, 1, key=jax.random.key(0)))
    params = eqx.filter(critic, eqx.is_inexact_array)
    tx = optaxclip.clip_by_leaf_norm(LOW)
    updates, state = tx.update(params, tx.init(params))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    names = state.clip_metrics.grad_norm.norm_names
    assert set(names) == {"layer/bias", "layer/weight"}


def test_a_name_does_not_change_with_the_leaves_beside_it():
    x, y = jnp.ones(2), jnp.ones(3)
    tx = optaxclip.record_history(optaxclip.clip_by_leaf_norm(LOW), 2, leaf_norms=True)
    state = tx.init({"a/b": x, "a": {"b": y}})
    _, state = tx.update({"a/b": None, "a": {"b": y}}, state)
    report = optaxclip.metrics(state, per_leaf=True)
    np.testing.assert_allclose(report["grad_norm/['a']['b']"], np.sqrt(3), rtol=1e-6)
    assert report["grad_norm/['a/b']"] == 0


# States that are mixed, checked for NaN, printed


WRAPPED = {
    **{name: (lambda make=make: make(LOW)) for name, make in TRANSFORMS.items()},
    "skip_nonfinite": lambda: optaxclip.skip_nonfinite(optax.identity()),
    "skip_spikes": lambda: optaxclip.skip_spikes(optax.identity(), 6.0, 4, 2),
    "dynamic_loss_scale": lambda: optaxclip.dynamic_loss_scale(optax.identity()),
    "record_history": lambda: optaxclip.record_history(
        optaxclip.clip_by_leaf_norm(LOW), 3, leaf_norms=True
    ),
}
wrapped = pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
LOSS = {"loss": np.float32(2.0)}


@wrapped
@pytest.mark.sample(1)
def test_sam_ends_with_the_parameters_of_its_opaque_mode(make):
    """Its default mode adds up states, each times 0 or 1."""
    target = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}

    def grad(params, _=None):
        return jax.tree.map(lambda p, t: 4 * (p - t) ** 3, params, target)

    def sam(opaque):
        adversary = optax.chain(make(), optax.contrib.normalize(), optax.sgd(0.1))
        outer = optax.chain(make(), optax.sgd(0.01))
        return optax.contrib.sam(
            outer, adversary, opaque_mode=opaque, reset_state=False
        )

    ends = []
    with jax.numpy_dtype_promotion("standard"):
        for opaque in (True, False):
            tx = sam(opaque)
            params = jax.tree.map(jnp.zeros_like, target)
            state = tx.init(params)
            structure = jax.eval_shape(lambda s: s, state)
            extra = {"grad_fn": grad} if opaque else {}

            @jax.jit
            def step(params, state, tx=tx, extra=extra):
                updates, state = tx.update(grad(params), state, params, **extra)
                return optax.apply_updates(params, updates), state

            for _ in range(6 if opaque else 12):
                params, state = step(params, state)
            ends.append(params)
        same = jax.tree.map(lambda x, y: x.dtype == y.dtype, state, structure)
    assert jax.tree.all(same)
    for x, y in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@wrapped
@pytest.mark.sample(2)
def test_nothing_is_nan_or_infinite_unless_a_gradient_was(make):
    with jax.debug_nans(True), jax.debug_infs(True):
        tx = make()
        state = tx.init(PARAMS)
        # Eagerly each operation is checked, and jitted, what comes out.
        for update, extra in ((tx.update, {}), (jax.jit(tx.update), LOSS)):
            _, new = update(PARAMS, state, PARAMS, **extra)
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(new))
        report = optaxclip.metrics(state)
        assert all(np.isfinite(value) for value in report.values())
    for name, value in optaxclip.metrics(tx.init(PARAMS)).items():
        if name.endswith("threshold"):
            assert value == np.inf


@wrapped
@pytest.mark.sample(1)
def test_a_state_prints_on_one_screen(make):
    many = {f"layer_{i}": {"kernel": jnp.ones((3, 3))} for i in range(100)}
    tx = make()
    for state in (tx.update(PARAMS, tx.init(PARAMS), PARAMS)[1], tx.init(many)):
        text = repr(state)
        lines = sum(len(line) // 80 + 1 for line in text.splitlines())
        assert lines <= 24, text
        assert "count=" in text or "loss_scale=" in text


def test_how_a_state_prints():
    tx = optaxclip.clip_by_percentile(95, window=100, norm=optaxclip.leaf_norm)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert repr(state).startswith(
        "ClipState(step_count=1, clip_count=1, nonfinite_count=0, "
        "rule_state=QuantileState(quantile_ring=float32[100, 3], "
    )
    assert "grad_norm={'dense/bias': 1.41421, 'dense/kernel': 2.44949" in repr(state)
    shapes = repr(jax.eval_shape(tx.init, PARAMS))
    assert "step_count=int32[]" in shapes
    assert "grad_norm=3 named: float32[3]" in shapes


@pytest.mark.parametrize("make", [optaxclip.zclip, optaxclip.adagc])
def test_a_state_prints_within_a_trace(make):
    state = make().init(PARAMS)
    text = repr(state)
    assert "no bound" in text
    jax.jit(lambda x: (x, text == repr(state) or 1 / 0)[0])(1.0)


def test_norms_with_names_go_to_transform_non_params_whole():
    """Optax asks `init` with one placeholder, so the names cannot be known there."""
    tx = optaxclip.clip_by_leaf_norm(LOW)
    state = tx.init(PARAMS)
    seen = []
    optax.tree_map_params(tx, lambda x: x, state, transform_non_params=seen.append)
    whole = [x for x in seen if hasattr(x, "norm_names")]
    assert len(whole) == len(state.clip_metrics)
    assert all(x.norm_names == state.clip_metrics.grad_norm.norm_names for x in whole)


@every_transform
def test_tree_map_params_takes_no_norm_threshold_or_scale_for_a_parameter(make):
    tx = everything(make)
    state = tx.init(PARAMS)
    marked = optax.tree_map_params(
        tx,
        lambda x, param: f"{x.shape} for {param.shape}",
        state,
        PARAMS,
        transform_non_params=lambda _: "other",
    )
    marks = jax.tree.leaves(jax.tree.broadcast(marked, state))
    moments = [f"{x.shape} for {x.shape}" for x in jax.tree.leaves(PARAMS)]
    assert sorted(mark for mark in marks if mark != "other") == sorted(2 * moments)


# States that come from elsewhere


@pytest.mark.parametrize("foreign", [None, (), optax.EmptyState(), {"step_count": 1}])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("ClipState", lambda: optaxclip.clip_by_global_norm(1.0)),
        ("ClipState", optaxclip.adagc),
        ("SkipState", lambda: optaxclip.skip_nonfinite(optax.sgd(1.0))),
        ("HistoryState", lambda: optaxclip.record_history(optaxclip.zclip(), 3)),
        ("LossScaleState", lambda: optaxclip.dynamic_loss_scale(optax.sgd(1.0))),
    ],
)
def test_a_foreign_state_is_told_to_come_from_init(foreign, kind, make):
    with pytest.raises(ValueError, match=rf"must be a {kind}.*init\(.*migrate_state"):
        make().update(PARAMS, foreign, PARAMS)


def test_guarded_step_refuses_a_foreign_state():
    guarded = optaxclip.guarded_step(optax.sgd(1.0))
    with pytest.raises(ValueError, match="must be a SkipState"):
        guarded.step(PARAMS, PARAMS, optax.EmptyState())


def clip(rule):
    return optaxclip.clip_by(optaxclip.global_norm, rule)


def recorder(length):
    return optaxclip.record_history(optaxclip.clip_by_global_norm(1.0), length)


SIZED = {
    "record_history": (recorder, "history/history_clipped", 4, 9),
    "zclip": (lambda n: optaxclip.zclip(warmup=n), "zscore_window", 10, 25),
    "quantile": (lambda n: clip(optaxclip.quantile(0.9, n)), "quantile_ring", 3, 7),
    "window_zscore": (
        lambda n: clip(optaxclip.window_zscore(window=n, min_count=2)),
        "window_zscore_ring",
        6,
        8,
    ),
    "percentile of leaves": (
        lambda n: optaxclip.clip_by_percentile(50, n, norm=optaxclip.leaf_norm),
        "quantile_ring",
        3,
        7,
    ),
}


def with_flax(state, template):
    return flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))


def with_pickle(state, template):
    return pickle.loads(pickle.dumps(state))


def train(update, state, steps):
    for step in range(steps):
        grads = jax.tree.map(lambda x, step=step: x * (1.0 + step % 3), PARAMS)
        _, state = update(grads, state, PARAMS)
    return state


@functools.cache
def trained(name, size, steps):
    tx = SIZED[name][0](size)
    return train(jax.jit(tx.update), tx.init(PARAMS), steps)


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("restored", [with_flax, with_pickle])
@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.sample(2)
def test_a_state_of_another_size_is_refused(name, restored, grown):
    make, field, small, large = SIZED[name]
    old, new = (small, large) if grown else (large, small)
    state = restored(trained(name, old, 2 * small), make(new).init(PARAMS))
    of_leaves = f" {len(LEAVES)}" if name == "percentile of leaves" else ""
    sizes = rf"\({old},{of_leaves}\) in place of \({new},{of_leaves}\)"
    for update in (make(new).update, jax.jit(make(new).update)):
        with pytest.raises(ValueError, match=rf"{field}.*{sizes}.*migrate_state"):
            update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("restored", [with_flax, with_pickle])
@pytest.mark.sample(1)
def test_a_restored_state_of_the_same_size_goes_on(name, restored):
    make, _, size, _ = SIZED[name]
    tx, state = make(size), trained(name, size, 2 * size)
    update = jax.jit(tx.update)
    on_host = jax.tree.map(np.asarray, restored(state, tx.init(PARAMS)))
    assert_same_bits(train(update, on_host, 3), train(update, state, 3))


@wrapped
def test_states_of_numpy_arrays_work_eagerly(make):
    tx = make()
    state = train(tx.update, tx.init(PARAMS), 1)
    on_host = jax.tree.map(np.asarray, state)
    assert_same_bits(train(tx.update, on_host, 1), train(tx.update, state, 1))


@pytest.mark.parametrize("warmup", [3, 10])
def test_ema_goes_on_with_another_warmup(warmup):
    tx, other = clip(optaxclip.ema(warmup=5)), clip(optaxclip.ema(warmup=warmup))
    state = train(tx.update, tx.init(PARAMS), 4)
    count = other.update(PARAMS, state, PARAMS)[1].rule_state.ema_count
    assert count == (4 if warmup == 3 else 5)
