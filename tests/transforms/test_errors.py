"""Bad arguments: the error names call, argument, rule and value."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import contrib, unit_axes

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
@pytest.mark.parametrize("value", [-1.0, math.nan, np.array([1.0, -2.0])])
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
        "`update(params=...)` must be given: this clip compares gradients with "
        "parameters. Call `update(updates, state, params)`."
    ):
        tx.update(GRADS, tx.init(GRADS))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "updates",
            "`update(updates=...)` must have the tree structure of the parameters "
            "given to `init`, got leaves ['a/v'] that `init` did not see; it saw "
            "['a/w', 'b'].",
        ),
        (
            "params",
            "`update(params=...)` must hold the parameters of all updates, got none "
            "at ['a/w'].",
        ),
    ],
)
def test_another_tree_structure(argument, expected):
    tx = optaxclip.clip_by_leaf_norm(1.0)
    arguments = {"updates": GRADS, "params": GRADS}
    arguments[argument] = {"a": {"v": jnp.ones(3)}, "b": jnp.ones(2)}
    with message(expected):
        tx.update(state=tx.init(GRADS), **arguments)


@pytest.mark.parametrize("value", [np.ones(2), np.ones(1)])
def test_an_array_that_does_not_broadcast(value):
    tx = optaxclip.clip_by_global_norm(value)
    shape = np.shape(value)
    with message(
        "A threshold must broadcast against every norm, got an array of "
        f"shape {shape} for a norm of shape ()."
    ):
        tx.update(GRADS, tx.init(GRADS))


@pytest.mark.parametrize("value", [2**31, 10**30])
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
        "got an ArrayImpl."
    ):
        optaxclip.metrics(jnp.ones(2))


SGD = optax.sgd(1.0)
SCALED = optaxclip.dynamic_loss_scale(SGD)
NUMBER = "a number that is non-negative"
INTEGER = "an integer of at least 1"
RULE = "a number, a schedule or a rule from norms to thresholds, such as " + (
    "`optaxclip.quantile(0.95)`"
)
CHAINED = "transformations of gradients go into `optax.chain`, next to the clip"


class Named:
    """Something to pass, with a short name."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


def once(tx, **arguments):
    return tx.update(GRADS, tx.init(GRADS), GRADS, **arguments)


# name -> (a call, what it says). The call that is named is the one that was made.
MESSAGES = {
    "a text": (
        lambda: optaxclip.clip_by_global_norm("1.0"),
        f"`clip_by_global_norm(max_norm=...)` must be {NUMBER}, got '1.0'.",
    ),
    "None": (
        lambda: optaxclip.adaptive_grad_clip(None),
        f"`adaptive_grad_clip(clipping=...)` must be {NUMBER}, got None.",
    ),
    "True": (
        lambda: optaxclip.clip_by_leaf_norm(True),
        f"`clip_by_leaf_norm(max_norm=...)` must be {NUMBER}, got True.",
    ),
    "a list": (
        lambda: optaxclip.clip_by_block_rms([1.0]),
        f"`clip_by_block_rms(threshold=...)` must be {NUMBER}, got [1.0].",
    ),
    "a complex number": (
        lambda: optaxclip.constant(1j),
        f"`constant(value=...)` must be {NUMBER}, got 1j.",
    ),
    "a key": (
        lambda: optaxclip.clip_by_global_norm(jax.random.key(0)),
        f"`clip_by_global_norm(max_norm=...)` must be {NUMBER}, got "
        f"{jax.random.key(0)!r}.",
    ),
    "a large integer": (
        lambda: optaxclip.clip_by_global_norm(10**5000),
        "`clip_by_global_norm(max_norm=...)` must be a number that fits a float and is "
        "non-negative, got an integer too long to print.",
    ),
    "a number in place of an optimizer to scale for": (
        lambda: optaxclip.dynamic_loss_scale(1.0),
        "`dynamic_loss_scale(inner=...)` must be an `optax.GradientTransformation`, "
        "got 1.0.",
    ),
    "a number in place of a norm to skip by": (
        lambda: optaxclip.skip_by(SGD, norm=2.0),
        "`skip_by(norm=...)` must be a function of a tree, got 2.0.",
    ),
    "a text for a share": (
        lambda: optaxclip.dynamic_loss_scale(SGD, backoff_factor="0.5"),
        "`dynamic_loss_scale(backoff_factor=...)` must be a number that is above 0 and "
        "below 1, got '0.5'.",
    ),
    "a factor of 0": (
        lambda: optaxclip.clip_by_percentile(factor=0.0),
        "`clip_by_percentile(factor=...)` must be a number above 0 and below infinity, "
        "got 0.0.",
    ),
    "a ramp below 0": (
        lambda: optaxclip.clip_by_percentile(ramp=-1),
        "`clip_by_percentile(ramp=...)` must be an integer of at least 0, got -1.",
    ),
    "a float window": (
        lambda: optaxclip.clip_by_percentile(window=2.0),
        f"`clip_by_percentile(window=...)` must be {INTEGER}, got 2.0.",
    ),
    "a true window": (
        lambda: optaxclip.autoclip(window=True),
        f"`autoclip(window=...)` must be {INTEGER}, got True.",
    ),
    "no length": (
        lambda: optaxclip.record_history(optaxclip.zclip(), 0),
        f"`record_history(length=...)` must be {INTEGER}, got 0.",
    ),
    "a window of a skip": (
        lambda: optaxclip.skip_spikes(SGD, window=1),
        "`skip_spikes(window=...)` must be an integer of at least 2, got 1.",
    ),
    "more than the window": (
        lambda: optaxclip.skip_spikes(SGD, window=8, min_count=9),
        "`skip_spikes(min_count=...)` must be an integer from 2 to 8, got 9.",
    ),
    "a traced window": (
        lambda: optaxclip.zclip(warmup=jnp.int32(5)),
        "`zclip(warmup=...)` must be an integer of at least 1, got "
        "Array(5, dtype=int32): it is a shape, not data. If "
        "`optax.inject_hyperparams` made an array of it, name it there: "
        "`static_args=('warmup', ...)`.",
    ),
    "a ratio": (
        lambda: optaxclip.adagc(ratio=1.0),
        "`adagc(ratio=...)` must be above 1, got 1.0.",
    ),
    "a percentile": (
        lambda: optaxclip.autoclip(101),
        "`autoclip(percentile=...)` must be in [0, 100], got 101.",
    ),
    "a percentile for a quantile": (
        lambda: optaxclip.quantile(95, 10),
        "`quantile(q=...)` must be a number in [0, 1], got 95: the 95th percentile is "
        "q=0.95.",
    ),
    "a cap": (
        lambda: optaxclip.zclip(max_norm=-1.0),
        "`zclip(max_norm=...)` must be non-negative, got -1.0.",
    ),
    "neither value": (
        optaxclip.clip_by_value,
        "`clip_by_value` must be given one of `max_value` and `max_delta`, got "
        "neither.",
    ),
    "both values": (
        lambda: optaxclip.clip_by_value(1.0, max_delta=1.0),
        "`clip_by_value` must be given one of `max_value` and `max_delta`, got "
        "max_value and max_delta.",
    ),
    "max_delta": (
        lambda: optaxclip.clip_by_value(max_delta=-1.0),
        "`clip_by_value(max_delta=...)` must be non-negative, got -1.0.",
    ),
    "a threshold of clip_by": (
        lambda: optaxclip.clip_by(optaxclip.global_norm, -1.0),
        "`clip_by(threshold=...)` must be non-negative, got -1.0.",
    ),
    "a threshold of skip_by": (
        lambda: optaxclip.skip_by(SGD, threshold=None),
        f"`skip_by(threshold=...)` must be {NUMBER}, got None.",
    ),
    "a threshold of guarded_step": (
        lambda: optaxclip.guarded_step(SGD, threshold="1"),
        f"`guarded_step(threshold=...)` must be {NUMBER}, got '1'.",
    ),
    "a threshold of lowest": (
        lambda: optaxclip.lowest(1.0, -1.0),
        "`lowest(rules=...)` must be non-negative, got -1.0.",
    ),
    "an optimizer for a rule": (
        lambda: optaxclip.clip_by(optaxclip.global_norm, SGD).init(GRADS),
        f"`clip_by(threshold=...)` must be {RULE}, got one whose thresholds are "
        f"negative, as the updates of an optimizer are: {CHAINED}.",
    ),
    "an optimizer for the rule of a name": (
        lambda: optaxclip.clip_by_subtree_norm({"w": SGD}).init({"w": jnp.ones(2)}),
        f"`clip_by_subtree_norm(max_norm=...)` must be {RULE}, got one whose "
        f"thresholds are negative, as the updates of an optimizer are: {CHAINED}.",
    ),
    "an optimizer for all other names": (
        lambda: optaxclip.skip_by(
            SGD, optaxclip.leaf_norm, optaxclip.by_name({"w": 1.0}, default=SGD)
        ).init({"w": jnp.ones(2), "b": jnp.ones(2)}),
        f"`skip_by(threshold=...)` must be {RULE}, got one whose thresholds are "
        f"negative, as the updates of an optimizer are: {CHAINED}.",
    ),
    "an optimizer among the lowest": (
        lambda: optaxclip.clip_by(
            optaxclip.global_norm, optaxclip.lowest(1.0, SGD)
        ).init(GRADS),
        f"`clip_by(threshold=...)` must be {RULE}, got one whose thresholds are "
        f"negative, as the updates of an optimizer are: {CHAINED}.",
    ),
    "a clip for a rule": (
        lambda: optaxclip.skip_by(SGD, threshold=optaxclip.zclip()).init(GRADS),
        f"`skip_by(threshold=...)` must be {RULE}, got a clip or a skip: {CHAINED}.",
    ),
    "a skip for a rule": (
        lambda: optaxclip.guarded_step(
            SGD, threshold=optaxclip.skip_nonfinite(SGD)
        ).init(GRADS),
        f"`guarded_step(threshold=...)` must be {RULE}, got a clip or a skip: "
        f"{CHAINED}.",
    ),
    "no norm": (
        lambda: optaxclip.zclip(norm=3),
        "`zclip(norm=...)` must be a function of a tree, got 3: "
        "`optax.inject_hyperparams` needs `norm` in its `static_args`.",
    ),
    "a norm that is no array": (
        lambda: optaxclip.clip_by(lambda tree: 3.0, 1.0).init(GRADS),
        "A norm must be a function from a tree to arrays, got one that returns 3.0.",
    ),
    "no apply": (
        lambda: optaxclip.clip_by(optaxclip.global_norm, 1.0, apply="clamp"),
        "`clip_by(apply=...)` must be a function such as `optaxclip.clamp`, got "
        "'clamp'.",
    ),
    "no start": (
        lambda: optaxclip.ema(start=1.0),
        "`ema(start=...)` must be a function such as `optaxclip.rules.smallest`, got "
        "1.0.",
    ),
    "no record": (
        lambda: optaxclip.zscore(record="at_mean"),
        "`zscore(record=...)` must be a function such as `optaxclip.rules.at_bound`, "
        "got 'at_mean'.",
    ),
    "an axis": (
        lambda: optaxclip.unit_norm({"w": jnp.ones((2, 2))}, axis="x"),
        "`unit_norm(axis=...)` must be an integer, a tuple of integers or a function "
        "from a path and a leaf to these, got 'x' for the leaf 'w'.",
    ),
    "an order": (
        lambda: optaxclip.global_norm(GRADS, ord=[2]),
        "`global_norm(ord=...)` must be 2, 1 or inf, got [2].",
    ),
    "no optimizer": (
        lambda: optaxclip.skip_nonfinite(1.0),
        "`skip_nonfinite(inner=...)` must be an `optax.GradientTransformation`, got "
        "1.0.",
    ),
    "no optimizer to migrate to": (
        lambda: optaxclip.migrate_state((), Named("adam"), GRADS),
        "`migrate_state(tx=...)` must be an `optax.GradientTransformation`, got adam.",
    ),
    "a skip around the loss scale": (
        lambda: optaxclip.skip_nonfinite(SCALED).init(GRADS),
        "A skip must go inside `dynamic_loss_scale`, not around it: a step that "
        "overflows is skipped before the scale can back off. The loss scale skips such "
        "steps by itself.",
    ),
    "no loss": (
        lambda: once(optaxclip.skip_spikes(SGD, watch_loss=True)),
        "`skip_spikes(watch_loss=True)` compares losses, but `loss` is None: call "
        "`update(updates, state, params, loss=loss)`.",
    ),
    "no loss for a step": (
        lambda: (lambda tx: tx.step(GRADS, GRADS, tx.init(GRADS)))(
            optaxclip.guarded_step(SGD, watch_loss=True)
        ),
        "`guarded_step(watch_loss=True)` compares losses, but `loss` is None: call "
        "`step(updates, params, state, loss=loss)`.",
    ),
    "no clip in a state": (
        lambda: optaxclip.metrics(optax.adam(1.0).init(GRADS)),
        "`metrics(opt_state=...)` must hold the state of an optaxclip transformation, "
        "got ScaleByAdamState, EmptyState.",
    ),
    "no state": (
        lambda: optaxclip.metrics({"a": 1}),
        "`metrics(opt_state=...)` must hold the state of an optaxclip transformation, "
        "got a dict.",
    ),
    "no clip to record": (
        lambda: optaxclip.record_history(SGD).init(GRADS),
        "`record_history(inner=...)` must hold a clip or a skip of optaxclip, got "
        "EmptyState.",
    ),
    "no loss scale": (
        lambda: optaxclip.loss_scale(SGD.init(GRADS)),
        "`loss_scale(opt_state=...)` must hold the state of one `dynamic_loss_scale`, "
        "got 0 in EmptyState.",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_said(name):
    call, expected = MESSAGES[name]
    with message(expected):
        call()


@pytest.mark.parametrize(
    "use",
    [
        lambda tx: tx.update(GRADS, None),
        lambda tx: optax.chain(tx, SGD).update(GRADS, (None, None)),
    ],
    ids=["bare", "chain"],
)
def test_a_guarded_step_is_no_transformation(use):
    with pytest.raises(AttributeError) as error:
        use(optaxclip.guarded_step(SGD))
    assert str(error.value) == (
        "`guarded_step` does not return an `optax.GradientTransformation`: its `step` "
        "takes and returns parameters. In `optax.chain` or a Flax optimizer, use "
        "`skip_by`."
    )


def test_norms_in_another_type_of_tree_are_refused():
    tx = optaxclip.clip_by(lambda tree: [optaxclip.global_norm(tree)], 1.0)
    with pytest.raises(ValueError, match="got a list for gradients in a dict") as error:
        once_of(tx, GRADS)
    assert str(error.value).startswith(
        "`clip_by(norm=...)` must return a tree of the same types as the gradients, "
    )


@pytest.mark.parametrize("value", [0.95, np.float32(0.5)])
@pytest.mark.parametrize("call", ["clip_by_percentile", "autoclip"])
def test_a_fraction_for_a_percentile_is_told(call, value):
    with pytest.warns(UserWarning) as told:  # noqa: PT030
        getattr(optaxclip, call)(value)
    assert [str(warning.message) for warning in told] == [
        f"`{call}(percentile={value})` is the {value}th percentile of the norms and "
        f"clips nearly every step. Did you mean {100 * value:g}?"
    ]
    assert told[0].filename == __file__


INJECTED = [
    ("clip_by_value", (1.0,)),
    ("clip_by_global_norm", (1.0,)),
    ("clip_by_leaf_norm", (1.0,)),
    ("clip_by_subtree_norm", (1.0,)),
    ("clip_by_block_rms", (1.0,)),
    ("adaptive_grad_clip", (1.0,)),
    ("clip_by_percentile", ()),
    ("autoclip", ()),
    ("zclip", ()),
    ("adagc", ()),
]


@pytest.mark.parametrize(("call", "arguments"), INJECTED, ids=dict(INJECTED))
@pytest.mark.sample(1)
def test_inject_hyperparams_needs_no_static_args(call, arguments):
    tx = optax.inject_hyperparams(getattr(optaxclip, call))(*arguments)
    grads = jax.tree.map(lambda x: 10 * x, GRADS)
    updates, state = jax.jit(tx.update)(grads, tx.init(GRADS), GRADS)
    expected, _ = once_of(getattr(optaxclip, call)(*arguments), grads)
    for x, y in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert optaxclip.metrics(state)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [(getattr(optaxclip, call), arguments) for call, arguments in INJECTED]
    + [(contrib.clip_coordinate_spikes, ())],
)
def test_inject_hyperparams_takes_no_default_for_data(make, arguments):
    optax.inject_hyperparams(make)(*arguments).init(GRADS)


def once_of(tx, grads):
    return tx.update(grads, tx.init(GRADS), GRADS)


@pytest.mark.parametrize(
    ("call", "hyperparameters"),
    [
        ("skip_nonfinite", {}),
        ("skip_spikes", {"z_threshold": 3.0}),
        ("dynamic_loss_scale", {"growth_factor": 4.0}),
    ],
)
def test_inject_hyperparams_around_an_optimizer_needs_inner_to_be_static(
    call, hyperparameters
):
    make = optax.inject_hyperparams(getattr(optaxclip, call), static_args=("inner",))
    tx = make(SGD, **hyperparameters)
    updates, state = jax.jit(tx.update)(GRADS, tx.init(GRADS), GRADS)
    assert hyperparameters.items() <= state.hyperparams.items()
    assert np.all(jax.tree.leaves(updates)[0] < 0)


@pytest.mark.parametrize(("names", "end"), [("a", ": was"), ("ab", " and 1 more: was")])
def test_three_sizes_that_are_wrong_are_told(names, end):
    """Each rule has two arrays."""
    of_4 = {x: optaxclip.quantile(0.5, 4) for x in names}
    of_5 = {x: optaxclip.quantile(0.5, 5) for x in names}
    params = {x: jnp.ones(2) for x in names}
    old, new = (optaxclip.clip_by_subtree_norm(rules) for rules in (of_4, of_5))
    with pytest.raises(ValueError, match=r"must have the sizes that `init`") as error:
        new.update(params, old.init(params))
    assert str(error.value).count("in place of") == min(2 * len(names), 3)
    assert end in str(error.value)
