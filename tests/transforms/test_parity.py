"""The three names that optax has too give optax's numbers wherever optax is right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip

SHAPES = [  # of every rank that optax has a convention for
    {"a": (), "b": (5,), "c": (1, 4)},
    {"a": (5, 3), "b": (3,), "c": (2, 3, 4)},
    {"a": (3, 3, 2, 5), "b": (2, 1, 3, 2, 4), "c": (1, 1, 6)},
]
TREES_OF_A_SHAPE = 100


def random_tree(shapes, rng):
    """Float32 leaves with norms over six decades."""
    return {
        name: jnp.asarray(
            rng.normal(size=shape) * 10 ** rng.uniform(-3, 3), jnp.float32
        )
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (optaxclip.clip_by_global_norm, optax.clip_by_global_norm),
        (optaxclip.clip_by_block_rms, optax.clip_by_block_rms),
        (optaxclip.adaptive_grad_clip, optax.adaptive_grad_clip),
        (optaxclip.clip_by_value, optax.clip),
    ],
)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.sample(2)
def test_same_numbers_as_optax(ours, theirs, shapes):
    @jax.jit
    def both(threshold, updates, params):
        results = []
        for make in (ours, theirs):
            tx = make(threshold)
            results.append(tx.update(updates, tx.init(params), params))
        (mine, state), (reference, _) = results
        return mine, reference, state.clip_count

    clipped = 0
    rng = np.random.default_rng(0)
    for _ in range(TREES_OF_A_SHAPE):
        updates, params = random_tree(shapes, rng), random_tree(shapes, rng)
        with jax.numpy_dtype_promotion("standard"):
            mine, reference, count = both(10 ** rng.uniform(-3, 3), updates, params)
        for name in updates:
            np.testing.assert_allclose(mine[name], reference[name], rtol=1e-6, atol=0)
        clipped += int(count)
    assert clipped > TREES_OF_A_SHAPE / 4
