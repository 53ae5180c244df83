"""Under `shard_map`, `pmap` and `vmap` a clip of shares is that of the whole tree.

With varying-axes checking types say what is a share, without it `axis_name` does. The
expectation is the same run on one device, see `meshes.run`.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _hlo import figures
from jax.sharding import PartitionSpec as P
from meshes import (
    EVERY,
    KINDS,
    MEASURING,
    OF_UNITS,
    ONE_AXIS,
    THRESHOLD,
    TWO_AXES,
    assert_same_run,
    gradients,
    mesh,
    parameters,
    put,
    run,
    stacked,
)

import optaxclip

ONE, TWO = ((8,), ONE_AXIS), ((4, 2), TWO_AXES)
ON_ONE = ["clip_by(leaf_norm, ord=inf)", "autoclip", "clip_by_percentile(leaf)"]
OF_LEAVES = sorted(EVERY.keys() - OF_UNITS)


def names(specs):
    """`axis_name` for a layout: the axes of each leaf, or None."""

    def of(spec):
        axes = [a for entry in spec if entry for a in np.ravel(entry).tolist()]
        return tuple(axes) or None

    return jax.tree.map(of, specs)


def mapped(tx, specs, **options):
    return jax.shard_map(
        functools.partial(run, tx),
        in_specs=(specs, P(), stacked(specs)),
        out_specs=(P(), (stacked(specs), P())),
        **options,
    )


def run_mapped(tx, shape, specs, **options):
    on = mesh(KINDS["auto"], *shape)
    state = tx.init(parameters())
    program = jax.jit(mapped(tx, specs, mesh=on, **options))
    return program(put(parameters(), specs, on), state, gradients())


def cases(names):
    return [(name, *(ONE if name in ON_ONE else TWO)) for name in names]


@pytest.mark.parametrize(("name", "shape", "specs"), cases(OF_LEAVES))
@pytest.mark.sample(3)
def test_types_say_what_is_a_share(name, shape, specs):
    assert_same_run(run_mapped(EVERY[name](THRESHOLD), shape, specs), name)


@pytest.mark.parametrize(("name", "shape", "specs"), cases(MEASURING))
@pytest.mark.sample(1)
def test_axis_name_says_what_is_a_share(name, shape, specs):
    tx = EVERY[name](THRESHOLD, axis_name=names(specs))
    assert_same_run(run_mapped(tx, shape, specs, check_vma=False), name)


@pytest.mark.parametrize("name", ["clip_by_percentile", "skip_spikes"])
@pytest.mark.sample(1)
def test_where_types_tell_axis_name_changes_nothing(name):
    tx = EVERY[name](THRESHOLD, axis_name=names(ONE_AXIS))
    assert_same_run(run_mapped(tx, (8,), ONE_AXIS), name)


def split(tree, specs, leading=0):
    """Shares of a tree along a new first axis, and the axes to map over."""

    def cut(x, spec):
        if "x" not in spec:
            return x
        return jnp.stack(jnp.split(x, 8, axis=leading + list(spec).index("x")))

    in_axes = jax.tree.map(lambda spec: 0 if "x" in spec else None, specs)
    return jax.tree.map(cut, tree, specs), in_axes


def joined(tree, specs):
    def join(x, spec):
        if "x" not in spec:
            return x[0]
        return jnp.concatenate(list(x), axis=1 + list(spec).index("x"))

    return jax.tree.map(join, tree, specs)


@pytest.mark.parametrize("over", [jax.pmap, jax.vmap])
@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.sample(3)
def test_pmap_and_vmap_with_shares(name, over):
    tx = EVERY[name](THRESHOLD, axis_name=names(ONE_AXIS))
    params, params_axes = split(parameters(), ONE_AXIS)
    steps, steps_axes = split(gradients(), ONE_AXIS, leading=1)
    in_axes = (params_axes, None, steps_axes)
    program = over(functools.partial(run, tx), axis_name="x", in_axes=in_axes)
    state, (updates, metrics) = program(params, tx.init(parameters()), steps)
    for x in jax.tree.leaves((state, metrics)):
        assert_bitwise_equal(x)
    first = jax.tree.map(lambda x: x[0], (state, metrics))
    assert_same_run((first[0], (joined(updates, ONE_AXIS), first[1])), name)


def assert_bitwise_equal(copies):
    copies = [np.asarray(copy).tobytes() for copy in copies]
    assert len(set(copies)) == 1


@pytest.mark.parametrize(
    "name", ["clip_by_percentile", "clip_by_percentile(leaf)", "zclip", "skip_spikes"]
)
@pytest.mark.sample(1)
def test_a_thousand_steps_leave_the_same_bits_on_all_devices(name):
    """Of the state, whose copies nothing keeps together but the same decisions."""
    tx, on = EVERY[name](THRESHOLD, axis_name="x"), mesh(KINDS["auto"], 8)

    def train(state, seed):
        def step(state, key):
            key = jax.random.fold_in(key, jax.lax.axis_index("x"))
            size = jnp.exp(2 * jax.random.normal(key))
            grads = {"w": size * jax.random.normal(key, (3, 5))}
            return tx.update(grads, state)[::-1]

        state, updates = jax.lax.scan(step, state, jax.random.split(seed, 1000))
        return jax.tree.map(lambda x: x[None], state), updates

    program = jax.shard_map(
        train, mesh=on, in_specs=(P(), P()), out_specs=(P("x"), P(None, "x")),
        check_vma=False,
    )  # fmt: skip
    state = tx.init({"w": jnp.zeros((3, 5))})
    states, updates = jax.jit(program)(state, jax.random.key(0))
    assert len({x.tobytes() for x in np.split(np.asarray(updates["w"]), 8, 1)}) == 8
    for leaf in jax.tree.leaves(states):
        assert_bitwise_equal(leaf)


@pytest.mark.parametrize("name", ["global", "leaf", "value"])
def test_one_all_reduce_for_a_whole_tree(name):
    clips = {
        "global": optaxclip.clip_by_global_norm,
        "leaf": optaxclip.clip_by_leaf_norm,
        "value": optaxclip.clip_by_value,
    }
    tx, on = clips[name](1.0), mesh(KINDS["auto"], 8)
    # Of few elements on a device, and of many.
    params = [jax.ShapeDtypeStruct((rows, 2048), jnp.float32) for rows in (16, 128, 16)]
    program = jax.shard_map(
        lambda g, s: tx.update(g, s), mesh=on, in_specs=(P("x"), P()),
        out_specs=(P("x"), P()),
    )  # fmt: skip
    state = jax.eval_shape(tx.init, params)
    counted = figures(jax.jit(program).lower(params, state).compile())
    assert {name: of["count"] for name, of in counted["collectives"].items()} == {
        "all-reduce": 1
    }


BLIND = {
    "pmap": lambda f: jax.pmap(f, axis_name="x"),
    "shard_map": lambda f: jax.shard_map(
        f,
        mesh=mesh(KINDS["auto"], 8),
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=False,
    ),
}
WARNED = {
    "clip": lambda **kwargs: optaxclip.clip_by_percentile(95, **kwargs),
    "units": lambda **kwargs: optaxclip.adaptive_grad_clip(0.1, **kwargs),
    "value": lambda **kwargs: optaxclip.clip_by_value(0.1, **kwargs),
    "skip": lambda **kwargs: optaxclip.skip_nonfinite(
        optax.chain(optaxclip.clip_by_global_norm(1.0, **kwargs), optax.scale(-1.0)),
        **kwargs,
    ),
}


@pytest.mark.parametrize("where", BLIND)
@pytest.mark.parametrize("name", WARNED)
@pytest.mark.sample(1)
def test_one_warning_where_nobody_said_what_is_a_share(name, where):
    def step(tx, x):
        state = tx.init(x)
        return tx.update(x, state, x)[0]

    x = jnp.ones((8, 4, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = jax.jit(BLIND[where](functools.partial(step, WARNED[name]())))
        program(x)
        program(x)  # no trace, no warning
    messages = [str(w.message) for w in caught if "axis_name" in str(w.message)]
    assert len(messages) == 1
    assert "axes ['x']" in messages[0]
    assert "`axis_name=()`" in messages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = WARNED[name](axis_name=())
        quiet = jax.jit(BLIND[where](functools.partial(step, told)))(x)
    np.testing.assert_array_equal(program(x), quiet)


@pytest.mark.parametrize(
    ("axis_name", "message"),
    [
        ("y", r"must name axes of .* that it runs in, got 'y'"),
        ({"w": "x"}, r"prefix tree of these and None .* got \{'w': 'x'\}"),
        ({"kernel": 3}, r"prefix tree of these and None .* got \{'kernel': 3\}"),
    ],
)
def test_axis_names_that_do_not_fit(axis_name, message):
    tx = optaxclip.clip_by_global_norm(1.0, axis_name=axis_name)
    params = {"kernel": jnp.ones((8, 2))}
    state = tx.init(params)  # outside of any map
    with pytest.raises(ValueError, match=message):
        jax.pmap(lambda g: tx.update({"kernel": g}, state)[0], axis_name="x")(
            params["kernel"]
        )


def mean(updates, params=None):
    return jax.tree.map(lambda x: jax.lax.pmean(x, "x"), updates)


@pytest.mark.parametrize(
    ("inner", "decay", "grads_at", "params_at", "out"),
    [
        (optax.add_decayed_weights(0.5), 0.5, P(), P("x"), P("x")),
        (optax.stateless(mean), 0.0, P("x"), P(), P()),
    ],
    ids=["varying more", "varying less"],
)
def test_inner_updates_that_vary_elsewhere(inner, decay, grads_at, params_at, out):
    tx = optaxclip.skip_nonfinite(inner)
    state = tx.init(jnp.ones(()))
    program = jax.shard_map(
        lambda grads, params: tx.update(grads, state, params)[0],
        mesh=mesh(KINDS["auto"], 8), in_specs=(grads_at, params_at), out_specs=out,
    )  # fmt: skip
    grads, params = jnp.ones(1 if grads_at == P() else 8), jnp.ones(8)
    for size, expected in [(2.0, 2 + decay), (jnp.nan, 0)]:
        np.testing.assert_allclose(jax.jit(program)(size * grads, params), expected)


@pytest.mark.parametrize("name", sorted(OF_UNITS))
def test_units_of_shares_are_refused(name):
    with pytest.raises(ValueError, match="Measure units under `jit` instead"):
        run_mapped(EVERY[name](THRESHOLD), (8,), ONE_AXIS)


def test_a_loss_that_differs_between_devices_is_refused():
    tx = optaxclip.skip_spikes(optax.sgd(1.0), watch_loss=True)
    state = tx.init(jnp.zeros(8))

    def step(mean, x):
        loss = jnp.mean(x)
        loss = jax.lax.pmean(loss, "x") if mean else loss
        return tx.update(x, state, x, loss=loss)[0]

    def program(mean):
        return jax.shard_map(
            functools.partial(step, mean), mesh=mesh(KINDS["auto"], 8),
            in_specs=P("x"), out_specs=P("x"),
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"`update\(loss=.*'x'.*pmean"):
        jax.jit(program(False))(jnp.ones(8))
    np.testing.assert_array_equal(jax.jit(program(True))(jnp.ones(8)), -jnp.ones(8))


def test_unreduced_shares_are_refused_with_the_way_out():
    tx = optaxclip.clip_by_global_norm(1.0)
    state = tx.init({"w": jnp.zeros(8)})

    def step(reduce, x):
        grads = {"w": jax.lax.pcast(x, ("x",), to="unreduced")}
        if reduce:
            grads = jax.lax.psum(grads, "x")
        return tx.update(grads, state)[0]

    def program(reduce):
        return jax.shard_map(
            functools.partial(step, reduce), mesh=mesh(KINDS["auto"], 8),
            in_specs=P("x"), out_specs=P(),
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"'w'.*\['x'\].*`jax\.lax\.psum`"):
        jax.jit(program(False))(jnp.ones(8))
    np.testing.assert_allclose(jax.jit(program(True))(jnp.ones(8))["w"], 1.0)


def told_skip(outer, inner):
    def given(axis_name):
        return {} if axis_name == "untold" else {"axis_name": axis_name}

    clip = optaxclip.clip_by_global_norm(1.0, **given(inner))
    return optaxclip.skip_nonfinite(clip, **given(outer))


@pytest.mark.parametrize(("outer", "inner"), [("x", "untold"), ("x", "x")])
def test_a_clip_trusts_the_skip_around_it(outer, inner):
    tx, grads = told_skip(outer, inner), jnp.arange(1.0, 9.0)
    state = tx.init(grads[:1])
    updates = jax.pmap(lambda g: tx.update(g[None], state)[0], axis_name="x")(grads)
    np.testing.assert_allclose(updates[:, 0], grads / np.linalg.norm(grads), rtol=1e-6)


@pytest.mark.parametrize("outer", ["untold", ()])
@pytest.mark.filterwarnings("ignore:`axis_name=` is missing")
def test_shares_within_a_skip_that_takes_them_as_whole_are_refused(outer):
    """Devices that skip would leave those that do not waiting for their sum."""
    tx = told_skip(outer, "x")
    state = tx.init(jnp.ones(1))
    with pytest.raises(ValueError, match="give the skip, loss scale or"):
        jax.pmap(lambda g: tx.update(g[None], state), axis_name="x")(jnp.ones(8))


@pytest.mark.parametrize("opaque", [False, True])
def test_shares_within_a_skip_by_another_norm_that_was_told_of_them(opaque):
    largest = functools.partial(optaxclip.global_norm, ord=np.inf)

    def own(tree):  # which nobody can look into
        return largest(tree, axis_name="x")

    norm, told = (own, {}) if opaque else (largest, {"axis_name": "x"})
    clip = optaxclip.clip_by_global_norm(1.0, axis_name="x")
    tx, grads = optaxclip.skip_by(clip, norm, **told), jnp.arange(1.0, 9.0)
    state = tx.init(grads[:1])
    updates = jax.pmap(lambda g: tx.update(g[None], state)[0], axis_name="x")(grads)
    np.testing.assert_allclose(updates[:, 0], grads / np.linalg.norm(grads), rtol=1e-6)


def test_a_clip_that_asks_another_norm_than_the_skip_around_it_is_warned():
    skip = optaxclip.skip_nonfinite(optaxclip.clip_by_leaf_norm(1.0), axis_name="x")
    state = skip.init(jnp.ones(1))
    with pytest.warns(UserWarning, match="`axis_name=` is missing"):
        jax.pmap(lambda g: skip.update(g[None], state), axis_name="x")(jnp.ones(8))


def test_the_warning_points_at_the_caller():
    tx = optaxclip.clip_by_global_norm(1.0)
    state = tx.init(jnp.ones(1))
    with pytest.warns(UserWarning, match="`axis_name=` is missing") as caught:
        jax.pmap(lambda g: tx.update(g[None], state))(jnp.ones(8))
    assert caught[0].filename == __file__


def test_axis_names_of_whole_leaves_change_nothing_where_types_tell():
    tx = optaxclip.clip_by_percentile(95, 20, max_norm=THRESHOLD, axis_name=("x", "y"))
    assert_same_run(run_mapped(tx, (4, 2), TWO_AXES), "clip_by_percentile")


@pytest.mark.parametrize("check_vma", [True, False])
def test_an_optimizer_in_place_of_a_rule_is_refused_there_too(check_vma):
    tx = optaxclip.clip_by(optaxclip.global_norm, optax.sgd(0.1), axis_name=())
    with pytest.raises(ValueError, match=r"threshold.*negative, as the updates"):
        jax.shard_map(
            tx.init,
            mesh=mesh(KINDS["auto"], 4, 2),
            in_specs=P(),
            out_specs=P(),
            check_vma=check_vma,
        )(jnp.ones(3))


@pytest.mark.parametrize(
    ("norm", "ord"), [(optaxclip.global_norm, 2), (optaxclip.leaf_norm, np.inf)]
)
@pytest.mark.sample(1)
def test_derivatives_through_a_clip_of_shares(norm, ord):
    """Each device's part of the derivative is that of one device."""
    tx = optaxclip.clip_by(functools.partial(norm, ord=ord), 0.5)
    params = jax.tree.map(lambda x: x * 1.0, parameters())
    params["kernel"] = params["kernel"].at[0, 0].set(9.0).at[-1, -1].set(-9.0)  # ties
    weights = jax.tree.map(lambda x: jnp.cos(7 * x), params)

    def loss(params, weights):
        updates, _ = tx.update(params, tx.init(params))
        parts = jax.tree.map(lambda u, w: jnp.sum(u * w), updates, weights)
        return parts

    def whole(params):
        return sum(jax.tree.leaves(loss(params, weights)))

    def of_shares(params, weights):
        def total(params):
            parts = loss(params, weights)
            sums = [
                jax.lax.psum(part, axes) if (axes := varying(part)) else part
                for part in jax.tree.leaves(parts)
            ]
            return sum(sums)

        return jax.grad(total)(params)

    def varying(x):
        return tuple(sorted(jax.typeof(x).manual_axis_type.varying))

    on = mesh(KINDS["auto"], 4, 2)
    program = jax.shard_map(
        of_shares, mesh=on, in_specs=(TWO_AXES, TWO_AXES), out_specs=TWO_AXES
    )
    expected = jax.jit(jax.grad(whole))(params)
    actual = jax.jit(program)(params, weights)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
