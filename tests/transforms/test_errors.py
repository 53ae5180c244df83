"""Bad arguments: the error names call, argument, rule and value."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import unit_axes

GRADS = {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(2)}


def message(expected):
    return pytest.raises(ValueError, match=f"^{re.escape(expected)}$")


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        ("clip_by_value", "max_value"),
        ("clip_by_global_norm", "max_norm"),
        ("clip_by_leaf_norm", "max_norm"),
        ("clip_by_block_rms", "threshold"),
        ("adaptive_grad_clip", "clipping"),
        ("constant", "value"),
        ("relative", "ratio"),
    ],
)
@pytest.mark.parametrize("value", [-1.0, math.nan, "1", np.array([1.0, -2.0])])
def test_thresholds_must_be_non_negative_numbers(call, argument, value):
    with message(f"`{call}({argument}=...)` must be non-negative, got {value!r}."):
        getattr(optaxclip, call)(value)


@pytest.mark.parametrize("call", [optaxclip.adaptive_grad_clip, optaxclip.relative])
def test_the_floor_of_the_parameter_norm_must_be_non_negative(call):
    name, argument = {
        optaxclip.relative: ("relative", "floor"),
        optaxclip.adaptive_grad_clip: ("adaptive_grad_clip", "eps"),
    }[call]
    with message(f"`{name}({argument}=...)` must be non-negative, got -0.1."):
        call(0.1, -0.1)


def test_traced_and_scheduled_thresholds_are_not_looked_at():
    jax.jit(lambda t: optaxclip.constant(t) and t)(-1.0)
    optaxclip.constant(lambda step: -1.0)


@pytest.mark.parametrize("call", ["global_norm", "leaf_norm", "unit_norm"])
def test_ord(call):
    with message(f"`{call}(ord=...)` must be 2, 1 or inf, got 3."):
        getattr(optaxclip, call)(GRADS, ord=3)


def test_axes_that_a_leaf_lacks():
    with message(
        "`unit_norm(axis=...)` must name axes of the leaf 'b' of shape (2,), got (1,)."
    ):
        optaxclip.unit_norm(GRADS, axis=1)
    with message(
        "`unit_norm(axis=...)` must name axes of the leaf 'w' of shape (3,), got (2,)."
    ):
        stacked = unit_axes.stacked(lambda path, leaf: 2)
        optaxclip.unit_norm(GRADS["a"], axis=stacked)


def test_more_axes_than_there_is_a_convention_for():
    with message(
        "`unit_norm(axis=...)` must be given for leaves of more than 5 axes, got None "
        "for the leaf 'w' of shape (2, 2, 2, 2, 2, 2)."
    ):
        optaxclip.unit_norm({"w": jnp.ones((2,) * 6)})


def test_missing_params():
    tx = optaxclip.adaptive_grad_clip(0.1)
    with message(
        "`relative` compares gradients with parameters, but `params` is None: call "
        "`update(updates, state, params)`."
    ):
        tx.update(GRADS, tx.init(GRADS))


@pytest.mark.parametrize("argument", ["updates", "params"])
def test_another_tree_structure(argument):
    tx = optaxclip.clip_by_leaf_norm(1.0)
    arguments = {"updates": GRADS, "params": GRADS}
    arguments[argument] = {"a": {"v": jnp.ones(3)}, "b": jnp.ones(2)}
    with message(
        f"`update({argument}=...)` must have the tree structure of the parameters "
        "given to `init`, got leaves ['a/v'] that `init` did not see, and none at "
        "['a/w']."
    ):
        tx.update(state=tx.init(GRADS), **arguments)


@pytest.mark.parametrize("value", [np.ones(2), np.ones(1), [1.0]])
def test_an_array_that_does_not_broadcast(value):
    tx = optaxclip.clip_by_global_norm(value)
    shape = np.shape(value)
    with message(
        "`constant(value=...)` must broadcast against every norm, got an array of "
        f"shape {shape} for a norm of shape ()."
    ):
        tx.update(GRADS, tx.init(GRADS))


@pytest.mark.parametrize("value", [2**31, 10**30, True])
def test_whole_numbers_of_any_size_are_thresholds(value):
    tx = optaxclip.clip_by_global_norm(value)
    _, state = tx.update(GRADS, tx.init(GRADS))
    assert state.clip_metrics.clip_threshold == np.float32(value)


def test_units_of_shares():
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    norm = jax.shard_map(optaxclip.unit_norm, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match=r"shares of them over the mesh axes \['x'\]"):
        norm(jnp.ones((8, 3)))


def test_no_rules():
    with message("`lowest(*rules)` must be given at least one rule, got none."):
        optaxclip.lowest()


def test_a_state_without_clips():
    with message(
        "`metrics(opt_state=...)` must hold the state of an optaxclip transformation, "
        "got PyTreeDef(*)."
    ):
        optaxclip.metrics(jnp.ones(2))


def test_a_norm_that_inject_hyperparams_took_for_a_schedule():
    with pytest.raises(ValueError, match=re.escape("`clip_by(norm=...)`")) as error:
        optax.inject_hyperparams(optaxclip.zclip, static_args="warmup")().init(GRADS)
    assert str(error.value).startswith(
        "`clip_by(norm=...)` must be a function of a tree, got "
    )
    assert str(error.value).endswith(
        ". `optax.inject_hyperparams` needs `norm` in its `static_args`."
    )
