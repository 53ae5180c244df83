"""A small model with sharded weights, trained in this process or together with others.

python train_sharded.py PORT PROCESSES INDEX RESULT.pickle
"""

import functools
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

SPECS = {"hidden": P(None, "x"), "out": P("x", None), "bias": P()}
SHAPES = {"hidden": (4, 16), "out": (16, 2), "bias": (1, 2)}
STEPS = 60


def real_loss(params, batch):
    """A network; rounding in its gradients grows from step to step."""
    hidden = jnp.tanh(batch[:, :4] @ params["hidden"])
    return jnp.mean(jnp.square(hidden @ params["out"] + params["bias"] - 1))


def exact_loss(params, batch):
    """Linear: where a batch holds small integers, gradients are eighths of integers.

    No sum of them or of their squares is rounded, so its order does not matter.
    """
    x, y = batch[:, :4], batch[:, 4:]
    first = jnp.sum((x @ params["hidden"]) * y, axis=1)
    second = jnp.sum((y @ params["out"] + params["bias"]) * x[:, :2], axis=1)
    return jnp.mean(first + second)


def real_batch(random):
    return random.normal(size=(8, 20))


def exact_batch(random):
    return random.integers(-2, 3, size=(8, 20)) * random.choice([0.5, 1.0])


RUNS = {"real": (real_loss, real_batch), "exact": (exact_loss, exact_batch)}


def train(devices, run):
    """Parameters and states after every step, as this process sees them."""
    loss_of, batch_of = RUNS[run]
    mesh = Mesh(np.array(devices), ("x",))
    random = np.random.default_rng(0)
    params = {
        name: put(random.normal(size=shape), NamedSharding(mesh, SPECS[name]))
        for name, shape in SHAPES.items()
    }
    tx = optaxclip.skip_nonfinite(
        optax.chain(optaxclip.clip_by_percentile(80, 20), optax.trace(0.9))
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        grads = jax.grad(loss_of)(params, batch)
        updates, state = tx.update(grads, state, params)
        updates = jax.tree.map(lambda u: -0.01 * u, updates)
        return optax.apply_updates(params, updates), state

    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    state, seen = jax.jit(tx.init)(params), []
    for i in range(STEPS):
        batch = batch_of(random) * (8 if i % 9 == 8 else 1)
        batch[-1, [3, -1]] = np.nan if i == 30 else 1  # on the last device alone
        params, state = step(params, state, put(batch, NamedSharding(mesh, P("x"))))
        seen.append(jax.tree.map(np.asarray, (whole(params), whole(state))))
    return seen


def put(value, sharding):
    """An array of which every process holds its part."""
    value = value.astype(np.float32)
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


if __name__ == "__main__":
    port, processes, index = map(int, sys.argv[1:4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    assert len(jax.local_devices()) < len(jax.devices())
    runs = {run: train(jax.devices(), run) for run in RUNS}
    pathlib.Path(sys.argv[4]).write_bytes(pickle.dumps(runs))
