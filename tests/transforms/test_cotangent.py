"""The gradient that flows back through one value, clipped there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip


def pulled(cotangent, max_norm=None, **kwargs):
    """What a cotangent is after the clip."""
    zeros = jax.tree.map(jnp.zeros_like, cotangent)
    _, pull = jax.vjp(lambda x: optaxclip.clip_cotangent(x, max_norm, **kwargs), zeros)
    return jax.jit(pull)(cotangent)[0]


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
)
@pytest.mark.parametrize("axis", [None, -1, (1, 2)])
def test_every_unit_by_its_own_norm(axis, dtype):
    g = array(4, 3, 5, dtype=dtype) * jnp.arange(4, dtype=dtype)[:, None, None]
    actual = pulled(g, 2.0, axis=axis)
    wide = np.asarray(g, np.complex128 if dtype == jnp.complex64 else np.float64)
    norms = np.sqrt(np.sum(np.abs(wide) ** 2, axis, keepdims=axis is not None))
    expected = wide * np.minimum(1, 2 / np.maximum(norms, 1e-30))
    assert actual.dtype == dtype
    assert np.mean(norms > 2) > 0  # some are clipped
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(actual, expected.dtype), expected, rtol=4 * eps, atol=1e-7
    )
    within = np.broadcast_to(norms <= 2, g.shape)
    np.testing.assert_array_equal(np.asarray(actual)[within], np.asarray(g)[within])


def test_one_norm_over_a_tree_and_at_extremes():
    tree = {"h": jnp.full(4, 1e30), "c": (jnp.full(5, 1e30),), "n": jnp.float32(0)}
    clipped = pulled(tree, 3.0)
    np.testing.assert_allclose(clipped["h"], np.ones(4), rtol=1e-6)
    half = pulled(jnp.full(4, 6e4, jnp.float16), 1.0)
    np.testing.assert_array_equal(half, np.full(4, 0.5, np.float16))
    assert np.all(np.isnan(pulled(jnp.array([np.nan, 1.0]), 1.0)))
    np.testing.assert_array_equal(pulled(jnp.zeros(3), 0.0), np.zeros(3))


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.complex64]
)
def test_elements_by_value(dtype):
    g = (3 * array(4, 5)).astype(dtype) * (1j if dtype == jnp.complex64 else 1)
    actual = pulled({"a": g, "b": g[0]}, max_value=1.0)
    wide = np.asarray(g.astype(jnp.complex64))
    expected = wide / np.maximum(np.abs(wide), 1)
    assert 0 < np.mean(np.abs(wide) > 1) < 1
    for leaf, rows in zip(jax.tree.leaves(actual), (slice(None), 0), strict=True):
        assert leaf.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(leaf.astype(jnp.complex64)), expected[rows], rtol=1e-6
        )
    within = np.abs(wide) <= 1
    np.testing.assert_array_equal(
        np.asarray(actual["a"])[within], np.asarray(g)[within]
    )


def test_values_at_extremes_and_a_bound_for_each_element():
    g = jnp.array([np.inf, -np.inf, np.nan, 1e30, -0.5, 0.0])
    np.testing.assert_array_equal(pulled(g, max_value=2.0), [2, -2, np.nan, 2, -0.5, 0])
    np.testing.assert_array_equal(pulled(g, max_value=np.inf), g)
    np.testing.assert_array_equal(pulled(g[3:], max_value=0), np.zeros(3))
    bounds = jnp.array([1, 2], jnp.int32)  # one for each column
    np.testing.assert_array_equal(
        pulled(jnp.full((3, 2), 5.0), max_value=bounds), np.tile([1.0, 2.0], (3, 1))
    )


def recurrent(max_norm, wrap=lambda step: step, name="max_norm"):
    def loss(inputs):
        def step(hidden, x):
            hidden = 2 * hidden + x
            return optaxclip.clip_cotangent(hidden, **{name: max_norm}), None

        hidden, _ = jax.lax.scan(wrap(step), jnp.zeros(2), inputs)
        return jnp.sum(hidden)

    return loss


@pytest.mark.parametrize("wrap", [lambda step: step, jax.checkpoint])
def test_each_time_step_of_a_scan(wrap):
    inputs = jnp.ones((5, 2))
    plain = jax.grad(recurrent(jnp.inf, wrap))(inputs)
    np.testing.assert_array_equal(plain[:, 0], [16, 8, 4, 2, 1])
    clipped = jax.jit(jax.grad(recurrent(1.0, wrap)))(inputs)
    np.testing.assert_allclose(clipped, np.full((5, 2), 0.5**0.5), rtol=1e-6)
    cut = jax.grad(recurrent(3.0, wrap, "max_value"))(inputs)
    np.testing.assert_array_equal(cut[:, 0], [3, 3, 3, 2, 1])


def test_under_vmap_every_example_has_its_own_norm():
    g = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    actual = jax.vmap(lambda g: pulled(g, 1.0))(g)
    np.testing.assert_allclose(actual, [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)


def test_shards_are_measured_together():
    on = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    g = array(16, 3)
    by_hand = jax.shard_map(
        lambda g: pulled(g, 1.0), mesh=on, in_specs=P("x"), out_specs=P("x")
    )
    np.testing.assert_allclose(jax.jit(by_hand)(g), pulled(g, 1.0), rtol=1e-6)
    explicit = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        cut = jax.jit(lambda g: pulled(g, max_value=1.0))(jax.reshard(g, P("x")))
    assert cut.sharding.spec == P("x", None)
    np.testing.assert_array_equal(cut, jnp.clip(g, -1, 1))


def on_shards(fun, **kwargs):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    return jax.jit(
        jax.shard_map(fun, mesh=mesh, in_specs=P("x"), out_specs=P("x"), **kwargs)
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_that_share_a_batch_clip_by_example(check_vma):
    g, on = array(16, 3), functools.partial(on_shards, check_vma=check_vma)
    expected = pulled(g, 1.0, axis=-1)
    assert np.mean(np.linalg.norm(g, axis=1) > 1) > 0.5
    by_axis = on(lambda g: pulled(g, 1.0, axis=-1, axis_name=()))
    np.testing.assert_allclose(by_axis(g), expected, rtol=1e-6)
    by_vmap = on(jax.vmap(lambda g: pulled(g, 1.0, axis_name=())))
    np.testing.assert_allclose(by_vmap(g), expected, rtol=1e-6)


def test_units_that_are_split_are_summed_over_the_axes_that_are_named():
    g = array(3, 16)
    split = on_shards(lambda g: pulled(g.T, 1.0, axis=-1, axis_name="x").T)
    np.testing.assert_allclose(split(g.T), pulled(g, 1.0, axis=-1).T, rtol=1e-6)


def test_units_of_what_varies_over_devices_may_be_split():
    with pytest.raises(ValueError, match=r"clip_cotangent\(axis_name=.*\['x'\].*None"):
        on_shards(lambda g: pulled(g, 1.0, axis=-1))(array(16, 3))


def test_the_second_derivative_is_that_of_the_clipped_gradient():
    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(optaxclip.clip_cotangent(x, 1.0) ** 3))(x)

    x, step = jnp.array([0.7, -1.1]), 1e-2
    slope = jax.grad(lambda x: gradient(x)[0])(x)
    for i in range(2):
        d = step * jnp.eye(2)[i]
        finite = (gradient(x + d)[0] - gradient(x - d)[0]) / (2 * step)
        np.testing.assert_allclose(slope[i], finite, rtol=1e-2, atol=1e-3)
    _, forward = jax.jvp(gradient, (x,), (jnp.array([1.0, 0.0]),))
    np.testing.assert_allclose(forward, jax.jacrev(gradient)(x)[:, 0], rtol=1e-5)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: optaxclip.clip_cotangent(x, 1.0), (x,), (x,))


def test_a_bound_may_be_traced_and_has_no_gradient():
    def loss(x, bound):
        return jnp.sum(50 * optaxclip.clip_cotangent(x, bound))

    dx, dbound = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones(4), 2.0)
    np.testing.assert_allclose(dx, np.ones(4), rtol=1e-6)
    assert dbound == 0
    for name in ("max_norm", "max_value"):
        many = pulled(jnp.full(4, 2.0), **{name: 2**40})  # which fits no int32
        np.testing.assert_array_equal(many, np.full(4, 2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": jnp.ones(3)}, r"max_norm=.*of the norms, \(\), got \(3,\)"),
        (
            {"max_norm": jnp.ones(4), "axis": -1},
            r"max_norm=.*norms, \(4, 1\), got \(4,\)",
        ),
        ({"max_value": jnp.ones(3)}, r"max_value=.*elements, \(4, 2\), got \(3,\)"),
        (
            {"max_norm": 1.0, "axis": 2},
            r"axis=.*of an array of shape \(4, 2\), got 2",
        ),
        ({"max_norm": 1.0, "axis": [0]}, r"axis=.*tuple of integers, got \[0\]"),
        ({"max_norm": 1.0, "axis": "x"}, r"axis=.*tuple of integers, got 'x'"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_called(arguments, message):
    with pytest.raises(ValueError, match=r"`clip_cotangent\(" + message):
        optaxclip.clip_cotangent(jnp.ones((4, 2)), **arguments)


@pytest.mark.parametrize("name", ["max_norm", "max_value"])
@pytest.mark.parametrize("bad", [-1.0, np.nan, "1", lambda step: 1.0])
def test_bad_bounds_are_refused(bad, name):
    with pytest.raises(
        ValueError, match=rf"clip_cotangent\({name}=.*(non-negative|number)"
    ):
        optaxclip.clip_cotangent(jnp.ones(2), **{name: bad})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "must be given one of `max_norm` and `max_value`, got neither"),
        ({"max_norm": 1.0, "max_value": 1.0}, "got max_norm and max_value"),
        ({"max_value": 1.0, "axis": -1}, "takes no `axis` and no `axis_name`"),
        ({"max_value": 1.0, "axis_name": "i"}, "takes no `axis` and no `axis_name`"),
    ],
)
def test_arguments_that_contradict_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optaxclip.clip_cotangent(jnp.ones(2), **arguments)
