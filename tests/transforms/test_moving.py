"""The table of docs/moving.md: what is different from optax, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip


def clipped(module, grads, max_norm=1.0):
    tx = module.clip_by_global_norm(max_norm)
    with jax.numpy_dtype_promotion("standard"):
        return tx.update(grads, tx.init(grads))[0]


def test_many_bfloat16_leaves():
    leaves = [jnp.ones((), jnp.bfloat16)] * 400
    assert optax.tree.norm(leaves) == 16
    assert optaxclip.global_norm(leaves) == 20


def test_float16_whose_square_overflows():
    grads = jnp.array([300.0], jnp.float16)
    assert clipped(optax, grads)[0] == 0
    assert clipped(optaxclip, grads)[0] == 1


def test_float32_whose_square_overflows():
    grads = jnp.full(4, 1e20)
    np.testing.assert_array_equal(clipped(optax, grads), 0)
    np.testing.assert_allclose(clipped(optaxclip, grads), 0.5, rtol=1e-6)


def test_zero_gradients_and_max_norm_zero():
    assert np.all(np.isnan(clipped(optax, jnp.zeros(2), 0.0)))
    np.testing.assert_array_equal(clipped(optaxclip, jnp.zeros(2), 0.0), 0)


def test_negative_max_norm():
    assert clipped(optax, jnp.full(2, 3.0), -1.0)[0] < 0
    with pytest.raises(ValueError, match="must be non-negative"):
        clipped(optaxclip, jnp.full(2, 3.0), -1.0)


def test_bfloat16_and_a_float32_threshold():
    grads, threshold = jnp.full(4, 2.0, jnp.bfloat16), jnp.float32(1.0)
    with pytest.raises(TypeError):
        clipped(optax, grads, threshold)
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.clip_by_block_rms(threshold)
        assert tx.update(grads, tx.init(grads))[0].dtype == jnp.float32
    assert clipped(optaxclip, grads, threshold).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "leaf",
    [jnp.arange(3), np.zeros(2, jax.dtypes.float0), jax.random.key(0)],
    ids=["integer", "float0", "key"],
)
def test_leaves_that_are_no_gradients(leaf):
    grads = {"leaf": leaf, "w": jnp.full(4, 2.0)}
    with pytest.raises((TypeError, AttributeError, NotImplementedError)):
        clipped(optax, grads)
    assert clipped(optaxclip, grads)["leaf"] is leaf


def test_derivative_at_zero():
    def total(module):
        return jax.grad(lambda g: jnp.sum(clipped(module, g)))(jnp.zeros(2))

    assert np.all(np.isnan(total(optax)))
    np.testing.assert_array_equal(total(optaxclip), 1)
