"""Reading metrics out of every kind of optimizer state."""

import collections

import flax.linen
import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

import optaxclip

PARAMS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0, 12.0])}  # norms 5, 12, 13
KEYS = [
    "grad_norm",
    "clipped_grad_norm",
    "clip_threshold",
    "clip_scale",
    "clipped_norm_fraction",
    "step_count",
    "clip_count",
    "nonfinite_count",
    "clip_fraction",
]


def after(tx, *gradients):
    """The state after updates by multiples of PARAMS."""
    state = tx.init(PARAMS)
    for factor in gradients:
        updates = jax.tree.map(lambda x, f=factor: x * f, PARAMS)
        with jax.numpy_dtype_promotion("standard"):
            _, state = jax.jit(tx.update)(updates, state, PARAMS)
    return state


def values(report):
    assert all(isinstance(v, jax.Array) and v.shape == () for v in report.values())
    assert {v.dtype for v in report.values()} <= {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    return {k: float(v) for k, v in report.items()}


def test_before_the_first_step():
    report = values(optaxclip.metrics(optaxclip.clip_by_global_norm(1.0).init(PARAMS)))
    assert list(report) == KEYS
    assert report["clip_threshold"] == np.inf
    assert report["clip_scale"] == 1
    assert sum(report.values()) == np.inf  # all others are 0


def test_counters_and_the_last_step():
    state = after(optaxclip.clip_by_global_norm(6.5), 1, 0.1, np.nan, 10, 1)
    report = values(optaxclip.metrics(state))
    assert report == pytest.approx(
        {
            "grad_norm": 13,
            "clipped_grad_norm": 6.5,
            "clip_threshold": 6.5,
            "clip_scale": 0.5,
            "clipped_norm_fraction": 1,
            "step_count": 5,
            "clip_count": 3,
            "nonfinite_count": 1,
            "clip_fraction": 0.6,
        }
    )


def test_a_step_that_is_not_clipped():
    report = values(optaxclip.metrics(after(optaxclip.clip_by_global_norm(26), 1)))
    assert report["grad_norm"] == report["clipped_grad_norm"] == 13
    assert (report["clip_scale"], report["clipped_norm_fraction"]) == (1, 0)
    assert report["clip_fraction"] == 0


def test_an_infinite_threshold_measures():
    report = values(optaxclip.metrics(after(optaxclip.clip_by_leaf_norm(jnp.inf), 1)))
    assert report["grad_norm"] == 12  # the largest of the leaves
    assert report["clip_scale"] == 1


def test_several_norms_report_the_one_that_exceeds_its_threshold_most():
    thresholds = optax.partition(
        {"a": optaxclip.constant(1.0), "b": optaxclip.constant(6.0)},
        {"a": "a", "b": "b"},
    )
    state = after(optaxclip.clip_by(optaxclip.leaf_norm, thresholds), 1)
    report = values(optaxclip.metrics(state))
    assert (report["grad_norm"], report["clip_threshold"]) == (5, 1)
    assert report["clip_scale"] == pytest.approx(0.2)
    assert report["clipped_norm_fraction"] == 1
    report = values(optaxclip.metrics(state, per_leaf=True))
    assert list(report)[len(KEYS) :] == [
        f"{key}/{leaf}" for leaf in "ab" for key in KEYS[:4]
    ]
    assert (report["grad_norm/b"], report["clip_scale/b"]) == (12, 0.5)


def test_units_are_summed_up_leaf_by_leaf():
    params = {"w": jnp.array([[3.0, 0.3], [4.0, 0.4]]), "b": jnp.array([2.0, 0.0])}
    tx = optaxclip.clip_by(optaxclip.unit_norm, 1.0)
    _, state = tx.update(params, tx.init(params))
    report = values(optaxclip.metrics(state, per_leaf=True))
    assert report["grad_norm"] == report["grad_norm/w"] == 5
    assert report["grad_norm/b"] == 2
    assert report["clipped_norm_fraction"] == pytest.approx(2 / 3)


def test_per_leaf_adds_nothing_to_a_global_norm():
    state = after(optaxclip.clip_by_global_norm(1.0), 1)
    assert list(optaxclip.metrics(state, per_leaf=True)) == KEYS


@pytest.mark.parametrize("make", [dict, lambda: {"i": jnp.arange(3)}])
def test_a_tree_without_gradients(make):
    tx = optaxclip.clip_by_leaf_norm(1.0)
    _, state = tx.update(make(), tx.init(make()))
    report = values(optaxclip.metrics(state))
    assert (report["grad_norm"], report["clip_scale"], report["step_count"]) == (
        0,
        1,
        1,
    )


def test_a_norm_that_is_not_a_number_shows():
    report = values(optaxclip.metrics(after(optaxclip.clip_by_leaf_norm(1.0), np.nan)))
    assert np.isnan(report["grad_norm"])
    assert np.isnan(report["clip_scale"])


CLIP = optaxclip.clip_by_global_norm
PREFIXES = {
    "alone": (lambda: CLIP(1.0), [""]),
    "chain": (lambda: optax.chain(CLIP(1.0), optax.adam(1e-3)), [""]),
    "two in a chain": (
        lambda: optax.chain(CLIP(1.0), optax.adam(1e-3), CLIP(2.0)),
        ["0/", "2/"],
    ),
    "nested chains": (
        lambda: optax.chain(CLIP(1.0), optax.chain(optax.adam(1e-3), CLIP(2.0))),
        ["0/", "1/1/"],
    ),
    "named chain": (
        lambda: optax.named_chain(
            ("before", CLIP(1.0)), ("adam", optax.adam(1e-3)), ("after", CLIP(2.0))
        ),
        ["before/", "after/"],
    ),
    "partition": (
        lambda: optax.partition({"x": CLIP(1.0), "y": CLIP(2.0)}, {"a": "x", "b": "y"}),
        ["x/", "y/"],
    ),
    "MultiSteps": (lambda: optax.MultiSteps(CLIP(1.0), 1), [""]),
    "masked": (lambda: optax.masked(CLIP(1.0), {"a": True, "b": False}), [""]),
    "inject_hyperparams": (
        lambda: optax.inject_hyperparams(CLIP)(max_norm=1.0),
        [""],
    ),
    "wrapped twice": (
        lambda: optax.chain(
            optax.masked(CLIP(1.0), {"a": True, "b": False}),
            optax.inject_hyperparams(CLIP)(max_norm=1.0),
        ),
        ["0/", "1/"],
    ),
    "names that spell alike": (
        lambda: optax.named_chain(
            ("a/b", CLIP(1.0)), ("a", optax.named_chain(("b", CLIP(2.0))))
        ),
        ["['a/b']/", "['a']['b']/"],
    ),
    "a state with two attributes": (
        lambda: pair(CLIP(1.0), CLIP(2.0)),
        ["one/", "two/"],
    ),
}


def pair(one, two):
    """A wrapper that keeps two states as attributes, not at positions."""
    state_type = collections.namedtuple("PairState", ["one", "two"])

    def init(params):
        return state_type(one.init(params), two.init(params))

    def update(updates, state, params=None):
        updates, first = one.update(updates, state.one, params)
        updates, second = two.update(updates, state.two, params)
        return updates, state_type(first, second)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(("make", "prefixes"), PREFIXES.values(), ids=PREFIXES)
@pytest.mark.sample(3)
def test_names(make, prefixes):
    report = optaxclip.metrics(after(make(), 1))
    assert list(report) == [f"{p}{key}" for p in prefixes for key in KEYS]
    assert all(report[f"{p}step_count"] == 1 for p in prefixes)


@pytest.mark.parametrize("make", [CLIP, optaxclip.clip_by_leaf_norm])
@pytest.mark.sample(1)
@pytest.mark.slow
def test_inside_jit_scan_and_stacked_by_vmap_and_pmap(make):
    tx = optax.chain(make(1.0, axis_name=()), optax.trace(0.9))
    factors = jnp.arange(1.0, 5.0)

    def step(state, factor):
        updates = jax.tree.map(lambda x: x * factor, PARAMS)
        _, state = tx.update(updates, state, PARAMS)
        return state, optaxclip.metrics(state)

    state = tx.init(PARAMS)
    _, scanned = jax.jit(lambda: jax.lax.scan(step, state, factors))()
    worst = 13.0 if make is CLIP else 12.0
    np.testing.assert_allclose(scanned["grad_norm"], worst * factors, rtol=1e-6)
    stacked, _ = jax.vmap(lambda f: step(state, f))(factors)
    replicated, _ = jax.pmap(lambda f: step(state, f), devices=jax.devices()[:4])(
        factors
    )
    for stack in (stacked, replicated):
        report = optaxclip.metrics(stack)
        assert list(report) == KEYS
        np.testing.assert_allclose(report["grad_norm"], worst * factors, rtol=1e-6)
        np.testing.assert_array_equal(report["step_count"], [1, 1, 1, 1])


def test_flax_train_state():
    train_state = flax.training.train_state.TrainState.create(
        apply_fn=lambda x: x, params=PARAMS, tx=optax.chain(CLIP(1.0), optax.sgd(0.1))
    )
    train_state = jax.jit(lambda s: s.apply_gradients(grads=PARAMS))(train_state)
    for source in (train_state, train_state.opt_state):
        assert values(optaxclip.metrics(source))["grad_norm"] == 13


def test_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(optaxclip.clip_by_leaf_norm(0.5), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model)
        optimizer.update(model, grads)
        return optaxclip.metrics(optimizer)

    inside = values(step(model, optimizer))
    for source in (optimizer, optimizer.opt_state):
        assert values(optaxclip.metrics(source)) == inside
    assert inside["grad_norm"] == pytest.approx(6**0.5)
    report = values(optaxclip.metrics(optimizer, per_leaf=True))
    assert report["grad_norm/bias"] == pytest.approx(3**0.5)


def test_counters_survive_flax_serialization(tmp_path):
    state = after(optax.chain(CLIP(1.0), optax.adam(1e-3)), 1, 1, np.nan)
    saved = flax.serialization.to_bytes(state)
    fresh = optax.chain(CLIP(1.0), optax.adam(1e-3)).init(PARAMS)
    restored = flax.serialization.from_bytes(fresh, saved)
    assert (
        values(optaxclip.metrics(jax.tree.map(jnp.asarray, restored)))["clip_count"]
        == 2
    )


def test_counters_survive_orbax(tmp_path):
    state = after(optax.chain(optaxclip.clip_by_leaf_norm(1.0), optax.adam(1e-3)), 1, 1)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.eval_shape(lambda: state)
        )
    assert values(optaxclip.metrics(restored)) == values(optaxclip.metrics(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_a_clip_within_a_skip():
    tx = optaxclip.skip_nonfinite(optax.chain(CLIP(6.5), optax.trace(0.9)))
    report = values(optaxclip.metrics(after(tx, 1, np.nan, np.nan)))
    assert list(report)[: len(KEYS)] == KEYS
    assert (report["step_count"], report["grad_norm"]) == (1, 13)
    assert report["skip_count"] == report["skipped_in_a_row"] == 2
    assert report["skip_nonfinite_count"] == 2
    assert np.isnan(report["skip_norm"])
    assert report["skip_threshold"] == np.inf


def test_metrics_are_read_without_the_optimizer():
    """A state is all it takes: no module, no transform, no host."""
    state = after(optaxclip.clip_by_leaf_norm(1.0), 1)
    jaxpr = str(jax.make_jaxpr(optaxclip.metrics)(state))
    assert "callback" not in jaxpr
