"""Norms of groups of leaves, and thresholds by the name of a norm."""

import functools
import pickle

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import array
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

TREE = {
    "encoder": [{"kernel": array(4, 3), "bias": array(3)}, {"kernel": array(3, 3)}],
    "head": {"kernel": array(3, 2, seed=1), "bias": array(2, seed=1)},
    "scale": array(),
    "steps": jnp.arange(3),
}
GROUPS = {
    1: {"encoder": 3, "head": 2, "scale": 1},
    2: {"encoder/0": 2, "encoder/1": 1, "head/bias": 1, "head/kernel": 1, "scale": 1},
    "last": {"kernel": 3, "bias": 2, "scale": 1},
}


def test_norms_are_pickled_as_a_plain_dict():
    norms = optaxclip.subtree_norm({"a": jnp.ones(4), "b": jnp.zeros(2)})
    again = pickle.loads(pickle.dumps(norms))
    assert type(again) is dict
    assert again == {"a": 2.0, "b": 0.0}


def last(path):
    return path.split("/")[-1]


def members(name, by):
    """The leaves of a group, told by their paths alone."""
    leaves = jax.tree_util.tree_leaves_with_path({**TREE, "steps": None})
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]

    def of(path):
        return last(path) if by == "last" else "/".join(path.split("/")[:by])

    return [
        np.ravel(x)
        for path, (_, x) in zip(paths, leaves, strict=True)
        if of(path) == name
    ]


@pytest.mark.parametrize("ord", [1, 2, np.inf])
@pytest.mark.parametrize("by", GROUPS)
def test_a_norm_is_that_of_its_leaves_together(by, ord):
    given = {"group": last} if by == "last" else {"depth": by}
    norms = optaxclip.subtree_norm(TREE, ord=ord, **given)
    assert sorted(norms) == sorted(GROUPS[by])
    for name, count in GROUPS[by].items():
        leaves = members(name, by)
        assert len(leaves) == count
        expected = np.linalg.norm(np.concatenate(leaves), ord)
        np.testing.assert_allclose(norms[name], expected, rtol=1e-6)


def test_every_group_at_its_own_extreme():
    tree = {
        "huge": [jnp.full(4, 1e30), jnp.full(5, 1e30)],
        "half": [jnp.full(4, 300.0, jnp.float16)],
    }
    norms = optaxclip.subtree_norm(tree)
    for name, norm in {"huge": 3e30, "half": 600.0}.items():
        np.testing.assert_allclose(norms[name], norm, rtol=1e-6)


def test_groups_whose_squares_all_vanish():
    tree = {"a": [jnp.full(4, 1e-30), jnp.full(5, 1e-30)], "b": jnp.zeros(3)}
    norms = optaxclip.subtree_norm(tree)
    np.testing.assert_allclose(norms["a"], 3e-30, rtol=1e-6)
    assert norms["b"] == 0


def test_a_clip_scales_each_group_by_one_number():
    tx = optaxclip.clip_by_subtree_norm(1.0, group=last)
    updates, state = jax.jit(tx.update)(TREE, tx.init(TREE))
    norms = optaxclip.subtree_norm(TREE, group=last)
    for x, y, name in [
        (updates["head"]["bias"], TREE["head"]["bias"], "bias"),
        (updates["encoder"][1]["kernel"], TREE["encoder"][1]["kernel"], "kernel"),
        (updates["scale"], TREE["scale"], "scale"),
    ]:
        np.testing.assert_allclose(x, y * min(1, 1 / float(norms[name])), rtol=1e-6)
    assert set(state.clip_metrics.grad_norm.norm_names) == {"kernel", "bias", "scale"}
    assert optaxclip.metrics(state, per_leaf=True)["clip_scale/kernel"] < 1


def test_a_group_without_gradients_keeps_its_memory():
    tx = optaxclip.clip_by_percentile(50, 5, norm=optaxclip.subtree_norm)
    update = jax.jit(tx.update)
    _, seen = update(TREE, tx.init(TREE))
    _, state = update({**TREE, "head": None}, seen)
    names = sorted(state.clip_metrics.grad_norm.norm_names)
    before, after = (
        dict(zip(names, s.rule_state.quantile_ring.T, strict=True))
        for s in (seen, state)
    )
    np.testing.assert_array_equal(before["head"], after["head"])
    assert np.any(before["encoder"] != after["encoder"])
    assert optaxclip.metrics(state, per_leaf=True)["grad_norm/head"] == 0


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)])
        self.head = nnx.Linear(2, 1, rngs=nnx.Rngs(2))


def of_nnx():
    return nnx.state(Model(), nnx.Param)


def of_equinox():
    mlp = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    return eqx.filter(mlp, eqx.is_inexact_array)


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(1, name="head")(flax.linen.Dense(2, name="body")(x))


@pytest.mark.parametrize("make", [of_nnx, of_equinox])
def test_layers_of_models(make):
    tx = optaxclip.clip_by_subtree_norm(0.1, depth=2)
    params = make()
    updates, state = tx.update(params, tx.init(params))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert {"layers/0", "layers/1"} <= set(state.clip_metrics.grad_norm.norm_names)
    norms = optaxclip.subtree_norm(updates, depth=2)
    assert all(norm <= 0.1 * (1 + 1e-6) for norm in norms.values())


@pytest.mark.parametrize("collection", [True, False])
def test_layers_of_a_linen_model(collection):
    """Of its variables, `params` and all, and of the dict that is trained."""
    variables = Linen().init(jax.random.key(0), jnp.ones(2))
    params = variables if collection else variables["params"]
    tx = optaxclip.clip_by_subtree_norm(0.1, depth=1 + collection)
    updates, state = tx.update(params, tx.init(params))
    names = ["params/body", "params/head"] if collection else ["body", "head"]
    assert sorted(state.clip_metrics.grad_norm.norm_names) == names
    for name, layer in (updates["params"] if collection else updates).items():
        given = jax.tree.leaves(variables["params"][name])
        expected = np.linalg.norm(np.concatenate([np.ravel(x) for x in given]))
        assert expected > 0.1
        scale = layer["kernel"] / variables["params"][name]["kernel"]
        np.testing.assert_allclose(scale, 0.1 / expected, rtol=1e-5)


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_one_all_reduce_for_all_groups(names):
    on = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tree = {name: [jnp.ones((8, 4)), jnp.ones(8)] for name in names}
    specs = {name: [P("x"), P("x")] for name in names}
    placed = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(on, spec)), tree, specs
    )

    def norms(tree):
        return dict(optaxclip.subtree_norm(tree))

    by_hand = jax.shard_map(norms, mesh=on, in_specs=(specs,), out_specs=P())
    for program in (jax.jit(norms), jax.jit(by_hand)):
        compiled = program.lower(placed).compile()
        ordinary, _, _ = (
            compiled.as_text().partition("ENTRY")[2].partition("conditional(")
        )
        assert ordinary.count(" all-reduce(") == 1
        for norm in compiled(placed).values():
            np.testing.assert_allclose(norm, np.sqrt(40), rtol=1e-6)


def test_names_stay_apart_where_keys_spell_alike():
    tree = {"a/b": jnp.ones(4), "a": {"b": jnp.ones(9)}}
    norms = optaxclip.subtree_norm(tree, depth=2)
    np.testing.assert_allclose(sorted(norms.values()), [2, 3], rtol=1e-6)


def test_thresholds_by_the_name_of_a_group():
    rule = {"encoder": 1.0, "scale": optaxclip.quantile(0.5, 4)}
    capped = optaxclip.by_name(rule, default=optax.linear_schedule(0.5, 10.5, 10))
    tx = optaxclip.clip_by(optaxclip.subtree_norm, capped)
    state = tx.init(TREE)
    for step in range(2):
        _, state = jax.jit(tx.update)(TREE, state)
        report = optaxclip.metrics(state, per_leaf=True)
        assert report["clip_threshold/encoder"] == 1
        np.testing.assert_allclose(report["clip_threshold/head"], 0.5 + step, rtol=1e-6)
    np.testing.assert_allclose(
        report["clip_threshold/scale"], jnp.abs(TREE["scale"]), rtol=1e-6
    )
    without_default = optaxclip.clip_by_subtree_norm(rule)
    _, state = without_default.update(TREE, without_default.init(TREE))
    assert optaxclip.metrics(state, per_leaf=True)["clip_threshold/head"] == np.inf


def test_a_rule_by_name_of_parameter_norms():
    relative = optaxclip.relative(0.1, floor=1e-3)
    tx = optaxclip.clip_by(optaxclip.leaf_norm, optaxclip.by_name({"w": relative}))
    params, grads = {"w": jnp.full(4, 5.0), "b": jnp.ones(1)}, {"w": jnp.ones(4)}
    updates, _ = tx.update(grads | {"b": jnp.ones(1)}, tx.init(params), params)
    np.testing.assert_allclose(optaxclip.global_norm(updates["w"]), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: {"decoder": 1.0},
            r"subtree_norm\(max_norm=.*\['decoder'\].*'encoder'",
        ),
        (lambda: {"encoder": -1.0}, r"clip_by_subtree_norm\(max_norm=.*-1.0"),
        (lambda: {1: 1.0}, r"clip_by_subtree_norm\(max_norm=.*dict from names"),
        (lambda: optaxclip.by_name([1.0]), r"by_name\(thresholds=.*dict from names"),
    ],
)
def test_bad_thresholds_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        optaxclip.clip_by_subtree_norm(make()).init(TREE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": 0}, r"subtree_norm\(depth=.*at least 1.*0"),
        ({"depth": 1.0}, r"subtree_norm\(depth=.*1\.0"),
        ({"group": "encoder"}, r"subtree_norm\(group=.*'encoder'"),
        ({"group": len}, r"subtree_norm\(group=.*string, got \d+ for the leaf '"),
        ({"ord": 3}, r"subtree_norm\(ord=.*3"),
    ],
)
def test_bad_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        optaxclip.subtree_norm(TREE, **given)
    if "ord" not in given:
        with pytest.raises(ValueError, match=message):
            optaxclip.clip_by_subtree_norm(1.0, **given).init(TREE)


def test_one_norm_has_no_name():
    with pytest.raises(ValueError, match="the only norm has no name"):
        optaxclip.clip_by(optaxclip.global_norm, optaxclip.by_name({"w": 1.0})).init(
            TREE
        )


def test_a_skip_by_layers_measures_once_for_the_clip_within():
    norm = functools.partial(optaxclip.subtree_norm, depth=1)
    clip = optaxclip.clip_by(norm, 0.1)
    tx = optaxclip.skip_by(clip, norm, 1e3)
    _, state = tx.update(TREE, tx.init(TREE))
    bad = {**TREE, "scale": jnp.float32(1e6)}
    updates, state = tx.update(bad, state)
    assert state.skip_count == 1
    assert not np.any(updates["head"]["kernel"])
