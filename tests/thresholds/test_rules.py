"""What every rule that remembers norms keeps, whatever its equation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import RULES, assert_same_bits
from streams import lognormal, scan

import optaxclip
from optaxclip import ema, quantile, tracked_quantile, window_zscore, zscore

SLOW = ("sketched_quantile",)  # to compile; its other tests are in `tests/contrib`
every_rule = pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in RULES],
)


def rule_of(name):
    make, numbers = RULES[name]
    return make(*numbers)


def looks_at_the_norm(name):
    """Whether a threshold depends on the very norm that it is for."""
    return name.startswith("zscore") or "include_current" in name


def assert_same_memory(name, actual, expected):
    """Counts, and norms as they came, exactly; averages and the like to rounding."""
    if name.startswith("quantile"):
        return assert_same_bits(actual, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    # A logarithm of 4.6, and the remainder of its last rounding, of 2.4e-7 at most.
    atol = 1e-6 if name.startswith("tracked") else 0
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(y.dtype, jnp.integer):
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=atol)


@pytest.mark.parametrize(
    ("name", "useless"),
    [(name, 0.0) for name in RULES]
    + [
        (name, useless)  # these rules promise it; for the others, `clip_by` sees to it
        for name in RULES
        if name.startswith(("quantile", "tracked_quantile"))
        for useless in (np.nan, np.inf)
    ],
)
@pytest.mark.sample(4)
def test_useless_norms_get_a_threshold_and_leave_no_trace(name, useless):
    """One at first, then 100 in the warm-up, after it and at the end."""
    rule, norms = rule_of(name), lognormal(0.1, 250)
    before, many = [0, 5, 120, 250], [1, 100, 100, 100]
    expected, expected_state = scan(rule, norms)
    at = np.repeat(before, many)
    thresholds, state = scan(rule, np.insert(norms, at, np.float32(useless)))
    assert_same_bits(state, expected_state)
    added = at + np.arange(len(at))
    np.testing.assert_array_equal(np.delete(thresholds, added), expected)
    rows = np.split(np.asarray(thresholds)[added], np.cumsum(many)[:-1])
    assert all(row[0] > 0 and np.all(row == row[0]) for row in rows)
    assert rows[-1][0] < 1
    if not looks_at_the_norm(name):
        assert [row[0] for row in rows[:-1]] == np.asarray(expected)[
            before[:-1]
        ].tolist()


@every_rule
@pytest.mark.sample(2)
def test_every_norm_has_its_own_memory(name):
    rule = rule_of(name)
    tree = {
        "scalar": lognormal(0.1, 80, seed=1),
        "units": [lognormal(0.3, 80, (1, 3), seed=2), None],
    }
    tree["units"][0][5:30, 0, 1] = 0.0  # this one warms up later
    thresholds, state = scan(rule, tree)
    parts = [lambda tree: tree["scalar"]]
    parts += [lambda tree, i=i: tree["units"][0][..., 0, i] for i in range(3)]
    for part in parts:
        expected, expected_state = scan(rule, part(tree))
        np.testing.assert_allclose(part(thresholds), expected, rtol=1e-6)
        # Each field of a state is a tree like the norms.
        fields = jax.tree.map(part, state, is_leaf=lambda x: isinstance(x, dict))
        assert_same_memory(name, fields, expected_state)


@every_rule
@pytest.mark.sample(3)
def test_eager_jit_scan_and_vmap_agree(name):
    norms = lognormal(0.3, 40, (2,))
    norms[[0, 25], 0] = 0
    norms[30] *= 100
    rule = rule_of(name)
    expected, expected_state = scan(rule, norms)
    for update in (rule.update, jax.jit(rule.update, donate_argnums=1)):
        state, thresholds = rule.init(norms[0]), []
        for norm in norms:
            threshold, state = update(jnp.asarray(norm), state)
            thresholds.append(threshold)
        np.testing.assert_allclose(jnp.stack(thresholds), expected, rtol=1e-6)
        assert_same_memory(name, state, expected_state)
    mapped, mapped_state = jax.vmap(lambda n: scan(rule, n), 1, -1)(norms)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    assert_same_memory(name, mapped_state, expected_state)


@every_rule
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.sample(2)
def test_the_state_keeps_its_form_and_shares_no_buffer(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        rule = rule_of(name)
        norms = {"w": jnp.ones((1, 3)), "b": jnp.ones(()), "none": None}
        types = jax.tree.map(jax.typeof, norms)
        first = state = rule.init(norms)
        for _ in range(3):
            leaves = jax.tree.leaves(state)
            assert {leaf.dtype for leaf in leaves} <= {
                jnp.dtype(dtype),
                jnp.dtype("i4"),
            }
            buffers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
            assert len(buffers) == len(leaves) > 0
            thresholds, state = jax.jit(rule.update)(norms, state)
            assert jax.tree.map(jax.typeof, thresholds) == types
            assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, first)
        for field in getattr(state, "_fields", ()):
            assert optax.tree.get(state, field) is getattr(state, field)


@every_rule
def test_an_empty_tree(name):
    rule = rule_of(name)
    empty = rule.init({})
    assert rule.update({}, empty) == ({}, empty)
    assert not jax.tree.leaves(empty)


@every_rule
@pytest.mark.sample(2)
def test_a_multiple_and_a_cap_do_not_enter_the_memory(name):
    rule, norms = rule_of(name), lognormal(0.5, 100)
    expected, expected_state = scan(rule, norms)
    doubled, (state, _) = scan(optax.chain(rule, optax.scale(2.0)), norms)
    np.testing.assert_array_equal(doubled, 2 * expected)
    assert_same_bits(state, expected_state)
    cap = np.median(expected)
    capped, (state, _) = scan(optaxclip.lowest(rule, cap), norms)
    np.testing.assert_array_equal(capped, np.minimum(expected, cap))
    assert 0 < np.sum(capped < expected) < 100
    assert_same_bits(state, expected_state)


@every_rule
@pytest.mark.sample(4)
def test_norms_that_share_an_array_are_each_as_alone(name):
    rule, norms = rule_of(name), {"b": lognormal(0.3, 60), "a": 7 * lognormal(0.1, 60)}
    together, state = scan(rule, norms)
    for leaf in norms:
        alone, _ = scan(rule, norms[leaf])
        np.testing.assert_allclose(together[leaf], alone, rtol=1e-6)
    shapes = {x.shape[-1:] for x in jax.tree.leaves(state)}
    assert shapes == {(2,)}


@every_rule
def test_numbers_may_be_traced(name):
    make, numbers = RULES[name]
    norms = lognormal(0.3, 150)
    traced, _ = jax.jit(lambda *traced: scan(make(*traced), norms))(*numbers)
    np.testing.assert_allclose(traced, scan(make(*numbers), norms)[0], 1e-5)


@every_rule
@pytest.mark.sample(4)
def test_the_memory_is_constant_to_a_derivative(name):
    def total(norms):
        thresholds, _ = scan(rule_of(name), norms)
        return jnp.sum(jnp.where(thresholds < 1e30, thresholds, 0))

    norms = np.float32([0, 0] + [1] * 60 + [0.9, 1e-40, 0, 0.9, 1e20])
    slopes = np.asarray(jax.grad(total)(norms))
    assert np.all(slopes[:-1] == 0)
    assert np.isfinite(slopes[-1])
    if not looks_at_the_norm(name):
        assert slopes[-1] == 0


@every_rule
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 30])
@pytest.mark.sample(4)
def test_bad_batches_leave_no_trace_in_a_clip(name, at, bad):
    random = np.random.default_rng(0)
    shapes = {"a": (40, 3), "b": (40, 2, 2)}
    grads = {
        leaf: (0.02 * random.normal(size=shape)).astype(np.float32)
        for leaf, shape in shapes.items()
    }
    grads["b"][20] *= 100
    tx = optaxclip.clip_by(optaxclip.leaf_norm, rule_of(name))
    clipped, expected = scan(tx, grads)
    assert 0 < expected.clip_count < 40
    spoiled = jax.tree.map(lambda g: np.insert(g, at, g[0], axis=0), grads)
    spoiled["a"][at, 1] = bad
    result, state = scan(tx, spoiled)
    assert_same_bits(state.rule_state, expected.rule_state)
    assert state.nonfinite_count == 1
    for leaf in grads:
        np.testing.assert_array_equal(np.delete(result[leaf], at, 0), clipped[leaf])


COUNT = "an integer of at least 1"
POSITIVE = "positive and finite"
VALID = {quantile: {"q": 0.5, "window": 9}, tracked_quantile: {"q": 0.5, "rate": 0.1}}


@pytest.mark.parametrize(
    ("make", "argument", "rule", "values"),
    [
        (quantile, "q", "a number in [0, 1]", [150.0, -0.1, np.nan, [0.1, 0.2]]),
        (quantile, "window", COUNT, [0, 2.0, True, "ten"]),
        (quantile, "min_count", "an integer from 1 to 9", [0, 10, 2.0, True]),
        (tracked_quantile, "q", "between 0 and 1", [0.0, 1, np.nan]),
        (tracked_quantile, "rate", POSITIVE, [0, np.inf]),
        (tracked_quantile, "start", POSITIVE, [-1.0]),
        (tracked_quantile, "floor", POSITIVE, [0.0]),
        (zscore, "z_threshold", "positive", [0.0]),
        (zscore, "decay", "in [0, 1)", [1.0]),
        (zscore, "warmup", COUNT, [0, 2.0, True]),
        (zscore, "min_deviation", "non-negative", [-1.0]),
        (zscore, "floor", "non-negative", [np.nan]),
        (zscore, "start", "a function such as `optaxclip.rules.moments`", ["mean"]),
        (window_zscore, "z_threshold", "positive", [0.0]),
        (window_zscore, "window", "an integer of at least 2", [1, 128.0, True]),
        (window_zscore, "min_count", "an integer from 2 to 128", [1, 129, 64.0]),
        (ema, "ratio", "above 1", [1.0]),
        (ema, "decay", "in [0, 1)", [-0.1]),
        (ema, "warmup", COUNT, [2.5, 2.0, True]),
        (ema, "floor", "non-negative", [-1.0]),
    ],
)
def test_bad_arguments(make, argument, rule, values):
    for value in values:
        message = f"`{make.__name__}({argument}=...)` must be {rule}, got {value!r}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make(**VALID.get(make, {}) | {argument: value})


@pytest.mark.parametrize("exponent", [-90, 90])
def test_the_spread_of_a_window_has_no_scale_of_its_own(exponent):
    rule, norms = window_zscore(1.0, window=8, min_count=2), lognormal(0.5, 30)
    scaled, _ = scan(rule, norms * np.float32(2.0**exponent))
    expected = scan(rule, norms)[0] * np.float32(2.0**exponent)
    np.testing.assert_array_equal(scaled, expected)


def test_the_spread_of_a_window_is_that_of_each_unit():
    rule = window_zscore(1.0, window=8, min_count=2)
    update = jax.jit(rule.update)
    norms = jnp.asarray(lognormal(0.5, 30).reshape(10, 3, 1), jnp.float32)
    state, alone = rule.init(norms[0]), [rule.init(norms[0, i, 0]) for i in range(3)]
    for norm in norms:
        thresholds, state = update(norm, state)
        for i in range(3):
            threshold, alone[i] = update(norm[i, 0], alone[i])
            np.testing.assert_allclose(thresholds[i, 0], threshold, rtol=1e-6)
    assert np.all(np.isfinite(thresholds))
