"""Taking an optimizer's state over to other clips: what goes on, what starts fresh."""

import collections
import functools
import pathlib

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import states_of_0_1_0
from cases import HIGH, TRANSFORMS, array, assert_same_bits
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip

PARAMS = {"w": array(8, 3), "layers": [array(3, seed=i) for i in range(2)]}
every_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


def percentile(window=4):
    return optaxclip.clip_by_percentile(90, window)


def optimizer():
    """With moments of two kinds and two counts, under any promotion of dtypes."""
    schedule = optax.linear_schedule(0.1, 0.05, 100)
    return optax.chain(
        optax.trace(0.9), optax.scale_by_rss(), optax.scale_by_learning_rate(schedule)
    )


def standard(tx):
    """Some of optax needs the standard promotion of dtypes."""
    tx = optax.with_extra_args_support(tx)
    promotion = jax.numpy_dtype_promotion("standard")
    return optax.GradientTransformationExtraArgs(
        promotion(tx.init), promotion(tx.update)
    )


def after(tx, steps=3, state=None):
    """The state some steps later, and the last updates."""
    state, update = tx.init(PARAMS) if state is None else state, jax.jit(tx.update)
    updates = None
    for step in range(steps):
        grads = jax.tree.map(lambda x, step=step: x * (step + 1.0), PARAMS)
        updates, state = update(grads, state, PARAMS)
    return updates, state


def assert_fresh(state, tx):
    assert_same_bits(state, tx.init(PARAMS))


def as_it_is(state, path):
    del path
    return state


def by_orbax(state, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state")


def by_flax(state, path):
    del path
    if type(state) is collections.OrderedDict:  # of `named_chain`, not known to Flax
        state = dict(state)
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))


# From optax


OPTAX_CLIPS = {
    "global": optax.clip_by_global_norm(1e6),
    "value": optax.clip(1e6),
    "block": optax.clip_by_block_rms(1e6),
    "none": optax.identity(),
}


@functools.cache
def from_optax():
    """A state, and the updates of the next step."""
    tx = optax.chain(optax.clip_by_global_norm(1e6), optimizer())
    _, state = after(tx)
    return state, after(tx, 1, state)[0]


@every_transform
@pytest.mark.sample(1)
def test_from_a_clip_of_optax_the_optimizer_goes_on(make):
    new = optax.chain(make(HIGH), optimizer())
    old_state, expected = from_optax()
    state = optaxclip.migrate_state(old_state, new, PARAMS)
    assert_same_bits(state[1], old_state[1])
    assert_fresh(state[0], make(HIGH))
    updates, _ = after(new, 1, state)
    for x, y in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("clip", OPTAX_CLIPS.values(), ids=OPTAX_CLIPS)
def test_from_every_clip_of_optax_and_from_none(clip):
    new = optaxclip.skip_spikes(optax.chain(percentile(), optimizer()))
    _, old_state = after(optax.chain(clip, optimizer()))
    state = optaxclip.migrate_state(old_state, new, PARAMS)
    assert_same_bits(state.inner_state[1], old_state[1])
    _, bare = after(optimizer())
    state = optaxclip.migrate_state(bare, new, PARAMS)
    assert_same_bits(state.inner_state[1], bare)
    assert_fresh(state._replace(inner_state=new.init(PARAMS).inner_state), new)


def test_from_apply_if_finite_by_what_it_holds():
    old = standard(optax.apply_if_finite(optimizer(), 3))
    new = optaxclip.skip_nonfinite(optimizer())
    _, old_state = after(old)
    state = optaxclip.migrate_state(old_state.inner_state, new, PARAMS)
    assert_same_bits(state.inner_state, old_state.inner_state)
    with pytest.raises(ValueError, match=r"no place for: .*notfinite_count"):
        optaxclip.migrate_state(old_state, new, PARAMS)


# Among clips of this package


@every_transform
@pytest.mark.sample(1)
def test_what_stayed_the_same_is_kept_bit_for_bit(make):
    tx = optaxclip.skip_by(optax.chain(make(1.0), optimizer()), threshold=HIGH)
    _, old_state = after(tx)
    assert_same_bits(optaxclip.migrate_state(old_state, tx, PARAMS), old_state)


def test_another_window_starts_fresh_and_the_rest_goes_on():
    measure = optaxclip.clip_by_leaf_norm(jnp.inf)
    old = optax.chain(measure, percentile(4), optimizer())
    new = optax.chain(measure, percentile(5), optimizer())
    _, old_state = after(old)
    state = optaxclip.migrate_state(old_state, new, PARAMS)
    assert_same_bits((state[0], state[2]), (old_state[0], old_state[2]))
    assert_fresh(state[1], percentile(5))


def test_a_skip_is_put_around_and_taken_off():
    bare = optax.chain(percentile(), optimizer())
    guarded = optaxclip.skip_nonfinite(bare)
    twice = optaxclip.skip_spikes(guarded, window=8, min_count=4)
    _, old_state = after(bare)
    once = optaxclip.migrate_state(old_state, guarded, PARAMS)
    assert_same_bits(once.inner_state, old_state)
    assert_fresh(once._replace(inner_state=bare.init(PARAMS)), guarded)
    _, once = after(guarded, 2, once)
    both = optaxclip.migrate_state(once, twice, PARAMS)
    assert_same_bits(both.inner_state, once)
    assert_same_bits(optaxclip.migrate_state(both, guarded, PARAMS), once)
    assert_same_bits(optaxclip.migrate_state(both, bare, PARAMS), once.inner_state)


def test_a_clip_put_in_front_or_behind_does_not_take_the_place_of_another():
    _, old_state = after(optax.chain(percentile(), optimizer()))
    other = optaxclip.clip_by_global_norm(1.0)
    new = optax.chain(other, percentile(), optimizer(), other)
    state = optaxclip.migrate_state(old_state, new, PARAMS)
    assert_same_bits(state[1:3], old_state)
    assert_fresh(state[0], other)
    assert_fresh(state[3], other)


def test_of_two_alike_none_is_kept_when_one_was_added():
    _, old_state = after(optax.chain(percentile(), optimizer()))
    new = optax.chain(percentile(), percentile(), optimizer())
    state = optaxclip.migrate_state(old_state, new, PARAMS)
    assert_fresh(state[:2], optax.chain(percentile(), percentile()))
    assert_same_bits(state[2], old_state[1])


def test_names_of_a_named_chain_tell_two_alike_apart():
    old = optax.named_chain(("before", percentile()), ("sgd", optimizer()))
    new = optax.named_chain(
        ("first", percentile()), ("before", percentile()), ("sgd", optimizer())
    )
    _, old_state = after(old)
    state = optaxclip.migrate_state(old_state, new, PARAMS)
    assert_same_bits({k: state[k] for k in old_state}, dict(old_state))
    assert_fresh(state["first"], percentile())


def test_from_a_chain_to_a_named_chain():
    _, old_state = after(optax.chain(percentile(), optimizer()))
    new = optax.named_chain(("clip", percentile()), ("sgd", optimizer()))
    by_name = dict(zip(("clip", "sgd"), old_state, strict=True))
    state = optaxclip.migrate_state(by_name, new, PARAMS)
    assert_same_bits((state["clip"], state["sgd"]), old_state)


# In wrappers, and as a checkpoint restores it


def injected(make):
    return optax.inject_hyperparams(
        lambda max_norm: optax.chain(make(max_norm), optimizer())
    )(max_norm=1.0)


def labels(params):
    return {"w": "x", "layers": ["y"] * len(params["layers"])}


# From a clip to an optimizer that holds it.
WRAPPERS = {
    "chain": lambda make: optax.chain(make(1.0), optimizer()),
    "named_chain": lambda make: optax.named_chain(
        ("clip", make(1.0)), ("sgd", optimizer())
    ),
    "masked": lambda make: optax.masked(
        optax.chain(make(1.0), optimizer()),
        lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    ),
    "partition": lambda make: optax.partition(
        {"x": optax.chain(make(1.0), optimizer()), "y": optax.trace(0.5)}, labels
    ),
    "MultiSteps": lambda make: optax.MultiSteps(
        optax.chain(make(1.0), optimizer()), 2
    ).gradient_transformation(),
    "inject_hyperparams": injected,
    "skip": lambda make: optaxclip.skip_nonfinite(
        optax.chain(make(1.0), optaxclip.skip_nonfinite(optimizer()))
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.sample(1)
def test_in_every_wrapper_from_every_kind_of_checkpoint(wrap, tmp_path):
    old, new, other = (
        standard(wrap(make))
        for make in (optax.clip_by_global_norm, TRANSFORMS["adagc"], optaxclip.autoclip)
    )
    _, old_state = after(old)
    _, new_state = after(new, 4, optaxclip.migrate_state(old_state, new, PARAMS))
    for restore in (as_it_is, by_orbax, by_flax):
        path = tmp_path / restore.__name__
        state = optaxclip.migrate_state(restore(old_state, path / "0"), new, PARAMS)
        assert_same_bits(without_clips(state), without_clips(old_state))
        assert optax.tree.get(state, "step_count") == 0
        restored = restore(new_state, path / "1")
        state = optaxclip.migrate_state(restored, new, PARAMS)
        assert_same_bits(state, new_state)
        state = optaxclip.migrate_state(restored, other, PARAMS)
        assert jax.tree.structure(state) == jax.tree.structure(other.init(PARAMS))
        assert_same_bits(without_clips(state), without_clips(new_state))
        assert optax.tree.get(state, "step_count") == 0


def without_clips(state):
    return jax.tree.leaves(
        jax.tree.map(
            lambda x: () if isinstance(x, optaxclip.ClipState) else x,
            state,
            is_leaf=lambda x: isinstance(x, optaxclip.ClipState),
        )
    )


@pytest.mark.parametrize(
    "save", [nnx.state, lambda o: nnx.to_pure_dict(nnx.state(o))], ids=["state", "pure"]
)
@pytest.mark.parametrize("restore", [as_it_is, by_orbax])
@pytest.mark.sample(1)
def test_an_nnx_optimizer_goes_on_with_another_clip(save, restore, tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    measure = optaxclip.clip_by_leaf_norm(jnp.inf)  # a state with an empty field
    old = nnx.Optimizer(
        model, optax.chain(measure, percentile(4), optimizer()), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 2)))))(model)
        optimizer.update(model, grads)

    step(model, old)
    tx = optax.chain(measure, percentile(5), optimizer())
    new = nnx.Optimizer(model, tx, wrt=nnx.Param)
    restored = restore(save(old), tmp_path)
    state = optaxclip.migrate_state(
        restored["opt_state"], tx, nnx.state(model, nnx.Param)
    )
    nnx.update(new, {"opt_state": nnx.state(state)})
    for i in (0, 2):
        leaves = [jax.tree.leaves(o.opt_state[i]) for o in (old, new)]
        assert_same_bits(*leaves)
    assert optaxclip.metrics(new)["1/step_count"] == 0
    step(model, new)
    report = optaxclip.metrics(new)
    assert (report["0/step_count"], report["1/step_count"]) == (2, 1)


class Sharded(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((8, 3)), out_sharding=("data", None))
        self.b = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return x @ self.w[...] + self.b[...][None]


@nnx.jit
def train(model, optimizer):
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 8))) ** 2))(model)
    optimizer.update(model, grads)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "save_and_restore",
    [
        lambda state, path: nnx.to_pure_dict(state),
        by_orbax,
        lambda state, path: by_orbax(nnx.to_pure_dict(state), path),
    ],
    ids=["pure", "by_orbax", "pure by_orbax"],
)
@pytest.mark.sample(1)
def test_the_recipe_for_nnx_with_sharded_parameters(save_and_restore, kind, tmp_path):
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(kind,))):
        model, adam = Sharded(), standard(optax.adam(0.1))
        old = nnx.Optimizer(model, adam, wrt=nnx.Param)
        train(model, old)
        saved = save_and_restore(nnx.state(old), tmp_path)
        # As docs/checkpoints.md has it.
        tx = optax.chain(percentile(), adam)
        new = nnx.Optimizer(model, tx, wrt=nnx.Param)
        opt_state = optaxclip.migrate_state(
            saved["opt_state"], tx, nnx.state(model, nnx.Param)
        )
        (step,) = jax.tree.leaves(saved["step"])
        nnx.update(new, {"opt_state": nnx.state(opt_state), "step": step})
        # Everything is what and where it was, and training goes on.
        for x, y in zip(moments(new.opt_state[1]), moments(old.opt_state), strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert jax.tree.structure(nnx.state(new)) == jax.tree.structure(
            nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))
        )
        for count in (2, 3):
            train(model, new)
            assert int(new.step[...]) == int(new.opt_state[1][0].count[...]) == count
            assert new.opt_state[1][0].mu["w"][...].sharding.spec[0] == "data"


def moments(state):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(state)))


@pytest.mark.parametrize("restore", [by_orbax, by_flax])
def test_more_than_ten_layers_stay_in_their_order(restore, tmp_path):
    params = {"list": [jnp.array([i, 1.0]) for i in range(12)]}
    params["numbers"] = {i: jnp.array([i, 2.0]) for i in range(12)}
    old = optax.chain(*[optax.trace(0.9)] * 12)
    _, old_state = old.update(params, old.init(params))
    new = optax.chain(percentile(), *[optax.trace(0.9)] * 12)
    restored = restore(old_state, tmp_path)
    state = optaxclip.migrate_state(restored, new, params)
    assert_same_bits(state[1:], old_state)


# What a fresh state is like


def test_shardings_are_those_of_the_new_state():
    mesh = jax.make_mesh((8,), ("x",))
    sharded = NamedSharding(mesh, PartitionSpec("x"))
    params = PARAMS | {"w": jax.device_put(PARAMS["w"], sharded)}
    old, new = optimizer(), optax.chain(percentile(), optimizer())
    _, old_state = after(old)
    on_one_device = jax.tree.map(
        lambda x: jax.device_put(x, jax.devices()[0]), old_state
    )
    for source in (old_state, on_one_device, by_flax(old_state, None)):
        state = optaxclip.migrate_state(source, new, params)
        fresh = new.init(params)
        for x, y in zip(*map(jax.tree.leaves, (state, fresh)), strict=True):
            assert (x.sharding, x.committed) == (y.sharding, y.committed)
            assert x.weak_type == y.weak_type
        assert state[1][0].trace["w"].sharding == sharded
        updates, _ = jax.jit(new.update)(params, state, params)
        assert updates["w"].shape == (8, 3)


def test_both_states_can_be_donated():
    tx = optax.chain(percentile(), optimizer())
    _, old_state = after(tx)
    state = optaxclip.migrate_state(old_state, tx, PARAMS)
    step = jax.jit(tx.update, donate_argnums=1)
    results = [step(PARAMS, each, PARAMS) for each in (state, old_state)]
    assert_same_bits(*results)


def test_within_jit_vmap_and_eval_shape():
    old, new = optimizer(), optax.chain(percentile(), optimizer())
    _, old_state = after(old)
    expected = optaxclip.migrate_state(old_state, new, PARAMS)

    def migrate(state):
        return optaxclip.migrate_state(state, new, PARAMS)

    assert_same_bits(jax.jit(migrate)(old_state), expected)
    shapes = jax.eval_shape(migrate, jax.eval_shape(lambda: old_state))
    assert shapes == jax.eval_shape(lambda: expected)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), old_state)
    stacked = jax.vmap(migrate)(two)
    assert_same_bits(jax.tree.map(lambda x: x[1], stacked), expected)


def test_random_keys_go_on():
    noise = optax.add_noise(0.1, 0.5, jax.random.key(3))
    old = standard(optax.chain(noise, optimizer()))
    new = standard(optax.chain(percentile(), noise, optimizer()))
    _, old_state = after(old)
    state = optaxclip.migrate_state(old_state, new, PARAMS)
    assert_same_bits(state[1:], old_state)


# What cannot be taken over


def migrated_from(old, tx, params=PARAMS):
    return optaxclip.migrate_state(old.init(PARAMS), tx, params)


def test_a_leaf_that_would_be_lost():
    new = optax.chain(percentile(), optax.scale_by_rss())
    with pytest.raises(ValueError, match="migrate_state") as error:
        migrated_from(optax.chain(optax.trace(0.9), optax.scale_by_rss()), new)
    assert str(error.value) == (
        "`migrate_state(old_state=...)` must be a state of the optimizer in `tx`, "
        "clips and skips of optaxclip aside, got leaves that the new state has no "
        "place for: 0/trace/layers/0, 0/trace/layers/1, 0/trace/w."
    )


def test_a_leaf_that_is_not_there():
    schedule = optax.scale_by_schedule(lambda step: 0.1)
    new = optaxclip.skip_nonfinite(optax.chain(percentile(), schedule, schedule))
    with pytest.raises(ValueError, match="migrate_state") as error:
        migrated_from(schedule, new)
    assert str(error.value).endswith(
        "got none for these of the new state: inner_state/2/count."
    )


def test_another_shape_or_dtype():
    new = optax.chain(percentile(), optax.trace(0.9, accumulator_dtype=jnp.bfloat16))
    params = {"w": jnp.ones((8, 4)), "layers": PARAMS["layers"][:1]}
    with pytest.raises(ValueError, match="migrate_state") as error:
        optaxclip.migrate_state(
            optax.trace(0.9).init(params | {"w": jnp.ones(8)}), new, params
        )
    assert str(error.value).endswith(
        "got another shape or dtype: "
        "1/trace/layers/0 (float32[3] for bfloat16[3]), "
        "1/trace/w (float32[8] for bfloat16[8, 4])."
    )


def test_all_differences_at_once():
    old = optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda step: 0.1))
    new = optax.chain(percentile(), optax.scale_by_rss())
    with pytest.raises(ValueError, match=r"no place for: .*; none for") as e:
        migrated_from(old, new)
    assert "1/sum_of_squares/w" in str(e.value)


@pytest.mark.parametrize("old_state", [None, {}, [None, {}]])
def test_a_state_that_is_empty(old_state):
    clip = percentile()
    assert_fresh(optaxclip.migrate_state(old_state, clip, PARAMS), clip)
    with pytest.raises(ValueError, match="none for these of the new state"):
        optaxclip.migrate_state(old_state, optimizer(), PARAMS)


def test_of_very_many_leaves_ten_are_named():
    params = [jnp.ones(2)] * 32
    with pytest.raises(ValueError, match="migrate_state") as error:
        optaxclip.migrate_state(optax.trace(0.9).init(params), percentile(), params)
    assert str(error.value).endswith("trace/8, trace/9, and 22 more.")


OF_0_1_0 = [name for name in TRANSFORMS if name != "clip_by_subtree_norm"]


@pytest.mark.parametrize("name", OF_0_1_0)
@pytest.mark.sample(3)
def test_states_of_version_0_1_0_go_on(name):
    """Nested trees of norms, infinity for no bound, NaN for no loss: all taken over."""
    path = pathlib.Path(states_of_0_1_0.__file__).with_suffix(".msgpack")
    saved = flax.serialization.msgpack_restore(path.read_bytes())
    assert set(saved) == {*OF_0_1_0}
    old, tx = saved[name], states_of_0_1_0.optimizer(TRANSFORMS[name])
    state = optaxclip.migrate_state(old["state"], tx, states_of_0_1_0.PARAMS)
    assert state.history_count == 5
    np.testing.assert_array_equal(state.history.history_has_loss, [1, 0, 0])
    np.testing.assert_array_equal(state.history.history_loss, [3, 0, 0])
    np.testing.assert_array_equal(state.history.history_skipped, [0, 0, 1])
    memory = jax.tree.leaves((state.inner_state.inner_state, state.history[1:4]))
    assert all(np.all(np.isfinite(x)) for x in memory)
    later, state = states_of_0_1_0.run(tx, state, 5, 8)
    expected = flax.serialization.from_state_dict(later, old["later"])
    for x, y in zip(*map(jax.tree.leaves, (later, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert state.history_count == 8


@pytest.mark.parametrize(
    "params",
    [
        {"1": jnp.ones(2), "01": 3 * jnp.ones(2)},
        {"a/value": jnp.ones(2), "a": 3 * jnp.ones(2)},
        {"a/b": jnp.ones(2), "a": {"b": 3 * jnp.ones(2)}},
    ],
)
def test_no_leaf_gets_the_memory_of_another(params):
    tx = optaxclip.clip_by_percentile(50, 2, norm=optaxclip.leaf_norm)
    _, state = tx.update(params, tx.init(params))
    assert_same_bits(optaxclip.migrate_state(state, tx, params), state)


def test_infinities_of_0_1_0_beside_a_watched_loss():
    """There the names of norms begin with `grad_norm`."""
    rule = optaxclip.quantile(0.9, 6, min_count=3)
    tx = optaxclip.skip_by(optax.sgd(0.1), optaxclip.leaf_norm, rule, watch_loss=True)
    state = tx.init(PARAMS)
    old = state._replace(
        skip_rule_state=jax.tree.map(
            lambda x: jnp.full_like(x, jnp.inf) if x.dtype == jnp.float32 else x,
            state.skip_rule_state,
        )
    )
    assert_same_bits(optaxclip.migrate_state(old, tx, PARAMS), state)
