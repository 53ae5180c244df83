"""Writes the states of version 0.1.0 that `test_migrate` takes over.

Run once, with that version on the path; what it wrote is `states_of_0_1_0.msgpack`.
"""

import pathlib
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from cases import TRANSFORMS

import optaxclip

PARAMS = {
    "dense": {"kernel": jnp.linspace(-1, 1, 6).reshape(3, 2), "bias": jnp.ones(2)},
    "layers": [jnp.full(3, 0.5), jnp.full(2, 0.25)],
}


def optimizer(make):
    """A clip with everything around it."""
    clip = make(0.5)
    skips = optaxclip.skip_spikes(optax.chain(clip, optax.sgd(0.1)), 6.0, 4, 2)
    return optaxclip.record_history(
        optaxclip.dynamic_loss_scale(skips, init_scale=1.0), 3, leaf_norms=True
    )


def run(tx, state, first, last):
    """Updates of some steps, one of them NaN, some with a loss."""
    taken = []
    for step in range(first, last):
        size = jnp.nan if step == 2 else 1.0 + step % 3
        grads = jax.tree.map(lambda x, size=size: x * size, PARAMS)
        extra = {"loss": jnp.float32(step)} if step % 2 else {}
        updates, state = tx.update(grads, state, PARAMS, **extra)
        taken.append(updates)
    return taken, state


if __name__ == "__main__":
    assert optaxclip.__version__ == "0.1.0"
    saved = {}
    for name, make in TRANSFORMS.items():
        tx = optimizer(make)
        _, state = run(tx, tx.init(PARAMS), 0, 5)
        later, _ = run(tx, state, 5, 8)
        saved[name] = {"state": state, "later": later}
    saved = flax.serialization.to_state_dict(jax.tree.map(np.asarray, saved))
    path = pathlib.Path(__file__).with_suffix(".msgpack")
    path.write_bytes(flax.serialization.msgpack_serialize(saved))
