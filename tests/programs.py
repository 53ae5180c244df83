"""Programs to compile and read: what they cost, and what they call."""

import functools

import jax
import optax

# XLA for CPU of jax 0.10.0 writes the squares to memory before it adds them up.
WRITES_SQUARES = jax.__version_info__ < (0, 10, 1)


def gpt_like(dtype, layers=6, width=512, vocabulary=4096):
    """The shapes of a decoder-only Transformer of 21 M parameters."""

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    layer = {
        "qkv": of(width, 3 * width),
        "out": of(width, width),
        "up": of(width, 4 * width),
        "down": of(4 * width, width),
        "up_bias": of(4 * width),
        "down_bias": of(width),
        "norm_1": of(width),
        "norm_2": of(width),
    }
    return {
        "embedding": of(vocabulary, width),
        "norm": of(width),
        "layers": [layer] * layers,
    }


def compiled_step(tx, params):
    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step.lower(params, params, jax.eval_shape(tx.init, params)).compile()
