"""Under `jit` a clip of sharded leaves is that of one device, with one all-reduce.

The expectation is the same run on one device, see `meshes.run`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _hlo import figures
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from meshes import (
    EVERY,
    KINDS,
    MEASURING,
    OF_UNITS,
    ONE_AXIS,
    SKIPS,
    TWO_AXES,
    assert_same_run,
    gradients,
    mesh,
    parameters,
    put,
    run,
)

import optaxclip

ONE, TWO = ((8,), ONE_AXIS), ((4, 2), TWO_AXES)
ON_ONE = ["clip_by(leaf_norm, ord=inf)", "clip_by_value"]
AUTO_TOO = ["clip_by_leaf_norm", "clip_by(unit_norm, lowest)", *SKIPS]
CASES = [
    pytest.param(kind, name, *(ONE if name in ON_ONE else TWO), id=f"{of}-{name}")
    for of, kind in KINDS.items()
    for name in [*MEASURING, *sorted(OF_UNITS)]
    if of == "explicit" or name in AUTO_TOO
]
EVERYWHERE = {  # one placement for all leaves of rank 2
    "replicated": P(),
    "rows": P("x"),
    "columns": P(None, "x"),
}


@pytest.mark.parametrize(("kind", "name", "shape", "specs"), CASES)
@pytest.mark.sample(3)
def test_equals_one_device(kind, name, shape, specs):
    on, tx = mesh(kind, *shape), EVERY[name](0.5)
    with jax.set_mesh(on):
        params = put(parameters(), specs, on)
        steps = put(gradients(), specs, on, leading=(None,))
        state = jax.jit(tx.init)(params)
        program = jax.jit(functools.partial(run, tx)).lower(params, state, steps)
        program = program.compile()
        result = program(params, state, steps)
    assert_same_run(result, name)
    assert "all-gather" not in program.as_text()  # in no branch, however rare
    updates = result[1][0]
    for update, grads in zip(
        jax.tree.leaves(updates), jax.tree.leaves(steps), strict=True
    ):
        assert update.sharding.is_equivalent_to(grads.sharding, grads.ndim)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("spec", EVERYWHERE.values(), ids=EVERYWHERE)
@pytest.mark.parametrize(
    "norm", [optaxclip.global_norm, optaxclip.leaf_norm, optaxclip.leaf_rms]
)
@pytest.mark.sample(2)
def test_norms_wherever_the_leaves_lie(norm, spec, kind):
    on = mesh(kind, 8)
    tree = [jnp.arange(64.0).reshape(8, 8) + i for i in range(3)]
    jitted = jax.jit(norm)
    for scale in (1.0, 1e30, 1e-30):  # where squares overflow or vanish, too
        scaled = [scale * x for x in tree]
        with jax.set_mesh(on):
            actual = jitted(put(scaled, [spec] * 3, on))
        rows = zip(jax.tree.leaves(actual), jax.tree.leaves(norm(tree)), strict=True)
        for x, y in rows:
            np.testing.assert_allclose(x, scale * y, rtol=2e-6)


CLIPS = {
    "global": lambda: optaxclip.clip_by_global_norm(1.0),
    "percentile": lambda: optaxclip.clip_by_percentile(95, 10),
    "leaf": lambda: optaxclip.clip_by_leaf_norm(1.0),
    "rms": lambda: optaxclip.clip_by_block_rms(1.0),
    "value": lambda: optaxclip.clip_by_value(1.0),
    "skip": lambda: optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(1.0)),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.sample(2)
def test_one_all_reduce_for_a_whole_tree(name, kind):
    on, tx = mesh(kind, 8), CLIPS[name]()
    specs = [P("x"), P(None, "x"), P("x"), P()]
    shapes = [(16, 2048), (16, 2048), (16,), (8,)]
    with jax.set_mesh(on):
        params = [
            jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=jax.NamedSharding(on, spec)
            )
            for shape, spec in zip(shapes, specs, strict=True)
        ]
        state = jax.eval_shape(tx.init, params)
        program = jax.jit(tx.update).lower(params, state, params).compile()
    collectives = figures(program)["collectives"]
    assert {name: of["count"] for name, of in collectives.items()} == {"all-reduce": 1}


def test_units_that_lie_whole_on_a_device():
    on = mesh(KINDS["explicit"], 8)
    tree = [large(jax.NamedSharding(on, P(None, "x")))] * 3
    norm = functools.partial(optaxclip.unit_norm, axis=0)
    with jax.set_mesh(on):
        collectives = figures(jax.jit(norm).lower(tree).compile())["collectives"]
    assert not collectives


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["cut", "whole"])
def test_one_all_reduce_for_units_of_gradients_and_parameters(spec):
    """Of the sums where units are cut, and else of whether all of them are finite."""
    on, tx = mesh(KINDS["auto"], 8), optaxclip.adaptive_grad_clip(0.1)
    tree = [large(jax.NamedSharding(on, spec))] * 3
    with jax.set_mesh(on):
        state = jax.eval_shape(tx.init, tree)
        program = jax.jit(tx.update).lower(tree, state, tree).compile()
        # A state that is sharded in another way costs no more of them.
        spread = jax.NamedSharding(on, P(None, "x"))
        state = jax.tree.map(
            lambda x: x.update(sharding=spread) if x.ndim == 2 else x, state
        )
        of_spread = jax.jit(tx.update).lower(tree, state, tree).compile()
    for compiled in (program, of_spread):
        collectives = figures(compiled)["collectives"]
        counts = {name: of["count"] for name, of in collectives.items()}
        assert counts == {"all-reduce": 1}
    assert "conditional(" not in program.as_text()


def large(sharding):
    """Of more elements than a single device sums without a branch."""
    return jax.ShapeDtypeStruct((1024, 128), jnp.float32, sharding=sharding)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.sample(3)
def test_state_and_parameters_keep_their_shardings(name):
    """From `jit(tx.init)` on, so that the second step compiles nothing."""
    on, tx, traces = mesh(KINDS["explicit"], 8), EVERY[name](0.5), 0

    def update(grads, state, params):
        nonlocal traces
        traces += 1
        return tx.update(grads, state, params)

    with jax.set_mesh(on):
        params = put(parameters(), ONE_AXIS, on)
        state = jax.jit(tx.init)(params)
        step = jax.jit(update)
        for _ in range(3):
            updates, new_state = step(params, state, params)
            before, after = (
                jax.tree.leaves((params, state)),
                jax.tree.leaves((updates, new_state)),
            )
            for x, y in zip(before, after, strict=True):
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
            state = new_state
    assert traces == 1


SKIPPING = {
    "skip": optaxclip.skip_nonfinite,
    "loss scale": lambda inner: optaxclip.dynamic_loss_scale(inner, init_scale=1.0),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("at", [P("x"), P()], ids=["sharded", "replicated"])
@pytest.mark.parametrize("name", SKIPPING)
@pytest.mark.sample(2)
def test_updates_lie_where_the_inner_ones_do(name, at, compiled):
    """Called eagerly too, and where decay adds sharded to replicated values."""
    on, tx = mesh(KINDS["explicit"], 8), SKIPPING[name](optax.add_decayed_weights(0.5))
    with jax.set_mesh(on):
        params, grads = put([jnp.ones(8), jnp.arange(8.0)], [P("x"), at], on)
        update = jax.jit(tx.update) if compiled else tx.update
        updates, state = update(grads, tx.init(params), params)
        skipped, _ = update(jnp.nan * grads, state, params)
    np.testing.assert_array_equal(updates, np.arange(8) + 0.5)
    np.testing.assert_array_equal(skipped, np.zeros(8))
    assert updates.sharding.is_equivalent_to(skipped.sharding, 1)


def test_unreduced_gradients_are_refused_with_the_way_out():
    on = mesh(KINDS["explicit"], 8)

    def partial_product(x, w):
        unreduced = P(None, None, unreduced={"x"})
        return {"w": jnp.einsum("ib,bj->ij", x, w, out_sharding=unreduced)}

    with jax.set_mesh(on):
        x, w = put(
            [jnp.ones((4, 8)), jnp.ones((8, 4))], [P(None, "x"), P("x", None)], on
        )
        tx = optaxclip.clip_by_global_norm(1.0)

        @jax.jit
        def update(x, w, reduce):
            grads = partial_product(x, w)
            if reduce:
                grads = jax.tree.map(lambda g: jax.reshard(g, P()), grads)
            return tx.update(grads, tx.init({"w": jnp.zeros((4, 4))}))

        update = jax.jit(update.__wrapped__, static_argnums=2)
        with pytest.raises(ValueError, match=r"'w'.*\['x'\].*jax\.reshard"):
            update(x, w, False)
        updates, _ = update(x, w, True)
    assert abs(float(optaxclip.global_norm(updates)) - 1) < 1e-6


def test_a_train_step_with_an_optimizer_behind():
    """Sharded AdamW behind a percentile clip equals the same on one device."""
    params = parameters()
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.chain(optaxclip.clip_by_percentile(90, 5), optax.adamw(0.1))

        @jax.jit
        def train(params, steps):
            def step(carry, grads):
                params, state = carry
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), steps)[0][0]

        steps = jax.tree.map(lambda x: x[:4], gradients())
        alone = train(params, steps)
        on = mesh(KINDS["auto"], 4, 2)
        together = train(put(params, TWO_AXES, on), put(steps, TWO_AXES, on, (None,)))
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_init_is_traced_for_devices_that_are_not_there(name):
    tx, params = EVERY[name](0.5), jax.eval_shape(parameters)
    nowhere = AbstractMesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(nowhere):
        state = jax.eval_shape(tx.init, params)
    here = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(here)
    for one, two in zip(*map(jax.tree.leaves, (state, here)), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
