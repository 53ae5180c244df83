"""A small model with sharded weights, trained in this process or together with others.

python train_sharded.py PORT PROCESSES INDEX RESULT.json
"""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

SPECS = {"hidden": P(None, "x"), "out": P("x", None), "bias": P()}
STEPS = 60


def train(devices):
    """Parameters, thresholds and counters after training on all of the devices."""
    mesh = Mesh(np.array(devices), ("x",))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    random = np.random.default_rng(0)
    shapes = {"hidden": (4, 16), "out": (16, 2), "bias": (1, 2)}
    params = {
        name: put(random.normal(size=shape).astype(np.float32), shardings[name])
        for name, shape in shapes.items()
    }
    tx = optaxclip.skip_nonfinite(
        optax.chain(optaxclip.clip_by_percentile(80, 20), optax.trace(0.9))
    )

    def loss_of(params, x):
        hidden = jnp.tanh(x @ params["hidden"])
        return jnp.mean(jnp.square(hidden @ params["out"] + params["bias"] - 1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x):
        grads = jax.grad(loss_of)(params, x)
        updates, state = tx.update(grads, state, params)
        updates = jax.tree.map(lambda u: -0.01 * u, updates)
        return optax.apply_updates(params, updates), state

    state, thresholds = jax.jit(tx.init)(params), []
    for i in range(STEPS):
        batch = random.normal(size=(8, 4)).astype(np.float32) * (
            10 if i % 9 == 8 else 1
        )
        batch[-1, -1] = np.nan if i == 30 else batch[-1, -1]  # on the last device alone
        params, state = step(params, state, put(batch, NamedSharding(mesh, P("x"))))
        thresholds.append(float(optaxclip.metrics(state)["clip_threshold"]))
    report = optaxclip.metrics(state)
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(params)
    return {
        "devices": len(devices),
        "params": {name: np.asarray(x).tolist() for name, x in whole.items()},
        "thresholds": thresholds[1:],  # the first is infinite
        "clip_count": int(report["clip_count"]),
        "nonfinite_count": int(report["skip_nonfinite_count"]),
    }


def put(value, sharding):
    """An array of which every process holds its part."""
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


if __name__ == "__main__":
    port, processes, index = map(int, sys.argv[1:4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    pathlib.Path(sys.argv[4]).write_text(json.dumps(train(jax.devices())))
