"""The gradient that flows back through one value, clipped there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optaxclip


def pulled(cotangent, max_norm, **kwargs):
    """What a cotangent is after the clip."""
    zeros = jax.tree.map(jnp.zeros_like, cotangent)
    _, pull = jax.vjp(lambda x: optaxclip.clip_cotangent(x, max_norm, **kwargs), zeros)
    return pull(cotangent)[0]


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


def recurrent(max_norm, wrap=lambda step: step):
    def loss(inputs):
        def step(hidden, x):
            return optaxclip.clip_cotangent(2 * hidden + x, max_norm), None

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


def test_the_second_derivative_is_that_of_the_clipped_gradient():
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(optaxclip.clip_cotangent(x, 1.0) ** 3))(x)

    x, step = jnp.array([0.7, -1.1]), 1e-2
    slope = jax.grad(lambda x: gradient(x)[0])(x)
    for i in range(2):
        d = step * jnp.eye(2)[i]
        finite = (gradient(x + d)[0] - gradient(x - d)[0]) / (2 * step)
        np.testing.assert_allclose(slope[i], finite, rtol=1e-2, atol=1e-3)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: optaxclip.clip_cotangent(x, 1.0), (x,), (x,))


def test_a_bound_may_be_traced_and_has_no_gradient():
    def loss(x, bound):
        return jnp.sum(50 * optaxclip.clip_cotangent(x, bound))

    dx, dbound = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones(4), 2.0)
    np.testing.assert_allclose(dx, np.ones(4), rtol=1e-6)
    assert dbound == 0


@pytest.mark.parametrize("bad", [-1.0, np.nan, "1", lambda step: 1.0])
def test_bad_bounds_are_refused(bad):
    with pytest.raises(
        ValueError, match=r"clip_cotangent\(max_norm=.*non-negative|number"
    ):
        optaxclip.clip_cotangent(jnp.ones(2), bad)
