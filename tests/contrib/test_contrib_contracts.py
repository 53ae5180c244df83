"""What each clip of `optaxclip.contrib` keeps, as those of the package do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CONTRIB, array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip

# The others are norms, rules and an `apply` of these, put together by `clip_by`.
FEW = ("clippy", "clip_coordinate_spikes", "with_error_feedback", "normalize")
every_clip = pytest.mark.parametrize(
    "name",
    [x if x in FEW else pytest.param(x, marks=pytest.mark.slow) for x in CONTRIB],
)
PARAMS = {"w": array(3, 2), "b": array(4, seed=1)}


def stream(steps, seed=0):
    """Gradients of some steps, their sizes up and down by a factor of 4."""
    random = np.random.default_rng(seed)
    sizes = 4.0 ** random.uniform(-1, 1, steps)
    return {
        name: jnp.asarray(
            sizes.reshape(-1, *[1] * x.ndim) * random.normal(size=(steps, *x.shape)),
            jnp.float32,
        )
        for name, x in PARAMS.items()
    }


def forms(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def mixed():
    """Leaves of every dtype, and some that are no gradients."""
    return {
        "float32": array(),
        "bfloat16": array(3, 2, dtype=jnp.bfloat16),
        "float16": array(2, dtype=jnp.float16),
        "float64": array(2, 2, dtype=jnp.float64),
        "complex64": array(2, dtype=jnp.complex64),
        "others": [jnp.arange(3), None, array(0, 3)],
    }


@pytest.mark.parametrize("make_tree", [mixed, dict])
@pytest.mark.parametrize("name", CONTRIB)
@pytest.mark.sample(1)
def test_every_tree_keeps_its_form_and_so_does_the_state(name, make_tree):
    """Traced only: forms are known then."""
    with jax.enable_x64(True):
        grads, tx = make_tree(), CONTRIB[name](0.3)
        state = jax.eval_shape(tx.init, grads)
        updates, after = jax.eval_shape(tx.update, grads, state, grads)
        assert forms(updates) == forms(grads)
        assert forms(after) == forms(state)
    narrow = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}
    assert not narrow & {x.dtype for x in jax.tree.leaves(state)}
    assert not any(x.weak_type for x in jax.tree.leaves(state))


def assert_plain(state):
    """Counts, and finite numbers of no less than float32."""
    for x in jax.tree.leaves(state):
        assert x.dtype in (jnp.int32, jnp.float32, jnp.float64, jnp.complex64)
        assert not x.weak_type
        assert np.all(np.isfinite(x))


@every_clip
@pytest.mark.sample(1)
def test_eager_scan_and_vmap_agree_and_bad_batches_leave_no_trace(name):
    tx = CONTRIB[name](0.5)

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS)
        return state, updates

    def scanned(grads):
        return jax.lax.scan(step, tx.init(PARAMS), grads)

    grads = stream(12)
    expected_state, expected = jax.jit(scanned)(grads)
    _, updates = step(tx.init(PARAMS), jax.tree.map(lambda g: g[0], grads))
    for leaf in PARAMS:
        np.testing.assert_allclose(updates[leaf], expected[leaf][0], rtol=3e-6)

    longer = jax.tree.map(lambda g: np.insert(g, 4, g[0], axis=0), grads)
    spoiled = {leaf: np.stack([g, g]) for leaf, g in longer.items()}
    spoiled["w"][:, 4, 1, 1] = np.nan, np.inf
    states, results = jax.jit(jax.vmap(scanned))(spoiled)
    for i in range(2):
        state = jax.tree.map(lambda x, i=i: x[i], states)
        assert optax.tree.get(state, "nonfinite_count") == 1
        for leaf in PARAMS:
            rest = np.delete(results[leaf][i], 4, axis=0)
            np.testing.assert_allclose(rest, expected[leaf], rtol=3e-6, atol=1e-7)
        assert_same_memory(state, expected_state)
        assert_plain(state)


def assert_same_memory(actual, expected):
    """All of the state but what was counted of the bad step."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(expected),
        strict=True,
    )
    for (path, x), y in pairs:
        text = jax.tree_util.keystr(path)
        if "step_count" not in text and "nonfinite_count" not in text:
            np.testing.assert_allclose(x, y, rtol=3e-6, atol=1e-6, err_msg=text)


@pytest.mark.slow
def test_shards_come_to_what_one_device_does():
    """Within `shard_map`, `w` over 8 devices and `b` whole."""
    params = {"w": array(8, 2), "b": array(4, seed=1)}
    grads = {"w": 3 * array(8, 2, seed=2), "b": array(4, seed=3)}
    clips = {n: make(0.5) for n, make in CONTRIB.items() if n != "normalize"}  # units

    def steps(params, grads):
        results = {}
        for name, tx in clips.items():

            def step(state, _, tx=tx):
                updates, state = tx.update(grads, state, params)
                return state, updates

            _, updates = jax.lax.scan(step, tx.init(params), None, length=2)
            results[name] = jax.tree.map(lambda x: x[-1], updates)
        return results

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = {"w": P("x"), "b": P()}
    sharded = jax.jit(
        jax.shard_map(
            steps,
            mesh=mesh,
            in_specs=(specs, specs),
            out_specs=dict.fromkeys(clips, specs),
        )
    )
    actual, expected = sharded(params, grads), jax.jit(steps)(params, grads)
    for name in clips:
        for leaf in params:
            np.testing.assert_allclose(
                actual[name][leaf], expected[name][leaf], rtol=3e-6, err_msg=name
            )


@pytest.mark.parametrize(
    "name",
    ["smooth_clip", "clippy", "clip_coordinate_spikes", "normalize"],
)
def test_derivatives_are_finite(name):
    tx = CONTRIB[name](0.5)

    @jax.jit
    def slope(w):
        def total(w):
            state = tx.init(PARAMS)
            for _ in range(2):
                updates, state = tx.update(PARAMS | {"w": w}, state, PARAMS)
            return jnp.sum(updates["w"] ** 2 + updates["w"])

        return jax.grad(total)(w)

    for value in (0.0, 1.0, 1e-30):
        assert np.all(np.isfinite(slope(jnp.full((3, 2), value))))


def test_metrics_are_found():
    for name in ("clip_coordinate_spikes", "with_error_feedback"):
        tx = optax.chain(CONTRIB[name](0.5), optax.scale(1.0))
        report = optaxclip.metrics(tx.init(PARAMS))
        assert report["step_count"] == 0
        assert report["clip_scale"] == 1
