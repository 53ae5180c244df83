"""The contracts that every transform keeps, on every kind of tree."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    HIGH,
    LOW,
    TRANSFORMS,
    TREES,
    assert_same_bits,
    is_gradient,
    split_leaves,
)

import optaxclip

every_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)

# A rule meets norms alone: those that learn need not meet every kind of tree again.
LEARNING = list(TRANSFORMS)[list(TRANSFORMS).index("clip_by_percentile") :]
PAIRS = [
    pytest.param(tree, make, id=f"{tree}-{name}")
    for tree in TREES
    for name, make in TRANSFORMS.items()
    if name not in LEARNING or tree in ("float32", "mixed with float64", "empty")
]


@pytest.fixture
def tree(request):
    needs_x64, make_tree = TREES[request.param]
    with jax.enable_x64(needs_x64):
        yield make_tree()


def shapes_and_dtypes(tree):
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree
    )


@pytest.mark.parametrize(("tree", "make"), PAIRS, indirect=["tree"])
@pytest.mark.sample(24)
def test_a_step_on_every_kind_of_tree(make, tree):
    """Compiled once, for a threshold that nothing exceeds and one that all exceed."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(updates, state, threshold):
        return make(threshold).update(updates, state, tree)

    def check(updates, state, initial):
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert shapes_and_dtypes(updates) == shapes_and_dtypes(tree)
        assert jax.tree.structure(state) == jax.tree.structure(initial)
        assert shapes_and_dtypes(state) == shapes_and_dtypes(initial)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))

    initial = make(HIGH).init(tree)
    assert_no_buffer_is_shared(initial)
    assert_statistics_are_wide(initial, tree)
    kept, state = step(tree, make(HIGH).init(tree), HIGH)
    check(kept, state, initial)
    assert_untouched(kept, state, tree)
    clipped, state = step(tree, make(LOW).init(tree), LOW)
    check(clipped, state, initial)
    if sum(x.size for x in split_leaves(tree)[0]):
        assert_clipped(clipped, state, tree)
    assert_same_bits(split_leaves(clipped)[1], split_leaves(tree)[1])
    clipped, state = step(tree, state, LOW)  # which took the state
    check(clipped, state, initial)
    assert state.step_count == 2


def assert_no_buffer_is_shared(state):
    """Donation takes each of them."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def assert_statistics_are_wide(state, tree):
    """Float32, for float64 leaves float64."""
    wide = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    has_wide = any(x.dtype in wide for x in split_leaves(tree)[0])
    dtypes = {x.dtype for x in jax.tree.leaves(state.clip_metrics)}
    assert dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)}
    assert (jnp.dtype(jnp.float64) in dtypes) == has_wide


def assert_untouched(updates, state, tree):
    assert_same_bits(updates, tree)
    assert state.clip_count == 0
    assert all(np.all(x == 1) for x in jax.tree.leaves(state.clip_metrics.clip_scale))


def assert_clipped(updates, state, tree):
    assert state.clip_count == state.step_count == 1
    assert state.nonfinite_count == 0
    changed = False
    pairs = zip(split_leaves(tree)[0], split_leaves(updates)[0], strict=True)
    for before, after in pairs:
        wide = [np.abs(np.asarray(x).astype(np.complex128)) for x in (before, after)]
        assert np.all(wide[1] <= wide[0])
        changed |= bool(np.any(np.asarray(after) != np.asarray(before)))
    assert changed


@every_transform
@pytest.mark.sample(3)
def test_leaves_that_are_no_gradients_are_not_counted(make):
    """Eagerly, as every step must work, too."""
    tree = TREES["of all kinds"][1]()
    gradients = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if is_gradient(path, leaf) else None, tree
    )
    tx = make(LOW)
    updates, state = tx.update(tree, tx.init(tree), tree)
    assert_same_bits(split_leaves(updates)[1], split_leaves(tree)[1])
    _, alone = tx.update(gradients, tx.init(gradients), gradients)
    chex.assert_trees_all_close(state.clip_metrics, alone.clip_metrics, rtol=1e-6)


@every_transform
@pytest.mark.sample(3)
def test_jit_scan_and_vmap_agree_with_eager(make):
    tx = make(0.5)
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    steps = {
        "w": jnp.linspace(-1, 1, 24).reshape(4, 3, 2),
        "b": jnp.linspace(0, 1, 8).reshape(4, 2),
    }
    fresh = tx.init(params)

    def one(state, updates):
        updates, state = tx.update(updates, state, params)
        return state, (updates, state)

    state, in_turn, apart = fresh, [], []
    for i in range(4):
        updates = jax.tree.map(lambda x, i=i: x[i], steps)
        state, result = one(state, updates)
        in_turn.append(result)
        apart.append(one(fresh, updates)[1])
    _, scanned = jax.lax.scan(jax.jit(one), fresh, steps)
    _, mapped = jax.vmap(one, in_axes=(None, 0))(fresh, steps)
    for actual, expected in [(scanned, in_turn), (mapped, apart)]:
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *expected)
        pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(stacked), strict=True)
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=2e-6)


@every_transform
@pytest.mark.sample(2)
def test_traces_once(make):
    tx, traces = make(LOW), 0
    params = {"w": jnp.ones((3, 2))}

    @jax.jit
    def step(updates, state):
        nonlocal traces
        traces += 1
        return tx.update(updates, state, params)

    state = tx.init(params)
    for i in range(10):
        _, state = step({"w": jnp.full((3, 2), float(i))}, state)
    assert traces == 1


@every_transform
@pytest.mark.sample(3)
def test_the_gradient_through_a_clip_is_finite(make):
    tx = make(0.1)
    params = {"w": jnp.ones((3, 2))}

    def loss(w, dtype):
        updates, _ = tx.update({"w": w.astype(dtype)}, tx.init(params), params)
        w = updates["w"].astype(jnp.float32)
        return jnp.sum(jnp.square(w)) + jnp.sum(w)

    @jax.jit
    def derivatives(w):
        first, second = [], []
        for dtype in (jnp.float32, jnp.bfloat16):
            f = functools.partial(loss, dtype=dtype)
            first += [jax.grad(f)(w), jax.jvp(f, (w,), (jnp.ones_like(w),))[1]]
            second.append(jax.grad(lambda w, f=f: jnp.sum(jax.grad(f)(w)))(w))
        return first, second

    for value in (0.0, 1.0, 1e-30):
        first, second = derivatives(jnp.full((3, 2), value))
        assert all(np.all(np.isfinite(x)) for x in first)
        if value != 1e-30:  # whose inverse square is infinite
            assert np.all(np.isfinite(second))


@every_transform
@pytest.mark.sample(3)
def test_a_bad_step_is_counted_and_leaves_the_rule_as_it_was(make):
    tx = make(LOW)
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    for bad in (np.nan, np.inf, -np.inf):
        bad_updates = {"w": params["w"].at[1, 1].set(bad), "b": params["b"]}
        updates, after = update(bad_updates, state, params)
        assert_same_bits(after.rule_state, state.rule_state)
        assert (after.nonfinite_count, after.clip_count, after.step_count) == (1, 1, 2)
        if np.isnan(bad):
            assert not np.all(np.isfinite(updates["w"]))  # a clip lets it through


@every_transform
@pytest.mark.sample(3)
def test_a_clip_within_optax_wrappers(make):
    """Masked, partitioned, accumulated, named: the state survives, the clip clips."""
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2,))}
    labels = {"a": "x", "b": "y"}
    wrapped = {
        "masked": optax.masked(make(LOW), {"a": True, "b": False}),
        "parts": optax.partition({"x": make(LOW), "y": optax.identity()}, labels),
        "accumulated": optax.MultiSteps(make(LOW), 2),
        "named": optax.named_chain(("clip", make(LOW)), ("sgd", optax.sgd(1.0))),
        "chained": optax.chain(make(LOW), optax.adam(1e-3)),
    }

    @jax.jit  # all of them, each on the same gradient: one program
    def step(states):
        return {k: tx.update(params, states[k], params)[1] for k, tx in wrapped.items()}

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps of optax needs it
        states = {name: tx.init(params) for name, tx in wrapped.items()}
        structure = jax.tree.structure(states)
        for _ in range(4):
            states = step(states)
    assert jax.tree.structure(states) == structure
    for name, state in states.items():
        expected = 2 if name == "accumulated" else 4
        assert optax.tree.get(state, "clip_count") == expected, name


@every_transform
@pytest.mark.parametrize(
    "name", optaxclip.ClipState._fields + optaxclip.ClipMetrics._fields
)
@pytest.mark.sample(5)
def test_field_names_are_found_once_beside_an_optimizer(make, name):
    # Parameters with names that a state must not use.
    params = {"scale": jnp.ones((3, 2)), "norm": jnp.ones(2), "count": jnp.ones(2)}
    tx = optax.chain(make(LOW), optax.adamw(1e-3))
    found = optax.tree.get_all_with_path(tx.init(params), name)
    assert len(found) == 1
