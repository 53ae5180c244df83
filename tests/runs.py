"""Runs with one known fault each, trained for real and logged as a user would.

A network of three layers learns what a random one computes, on batches of 32, with
AdamW and a warm-up. What is done to a run is in its entry of `RUNS` and nowhere else.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip.audit import ClipLog, read

STEPS = 400
LAYERS = ("embed", "hidden_1", "hidden_2", "head")
WIDTHS = (16, 32, 32, 32, 4)


def parameters(dtype):
    """The head is too large, so that norms fall from the start, as in most runs."""
    rng = np.random.default_rng(0)
    gain = dict.fromkeys(LAYERS, 1.4) | {"head": 6.0}
    return {
        name: {
            "kernel": jnp.asarray(
                rng.normal(size=(m, n)) * gain[name] / np.sqrt(m), dtype
            ),
            "bias": jnp.zeros(n, dtype),
        }
        for name, m, n in zip(LAYERS, WIDTHS[:-1], WIDTHS[1:], strict=True)
    }


def logits(params, x):
    for name in LAYERS[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def batches(steps):
    """The same batches for every run; labels of a linear teacher, a tenth at random."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(steps, 32, WIDTHS[0]))
    labels = np.argmax(x @ rng.normal(size=(WIDTHS[0], 4)), axis=-1)
    noise = rng.random(labels.shape) < 0.1
    return x, np.where(noise, rng.integers(4, size=labels.shape), labels)


def loss_of(params, batch):
    """Cross entropy; a batch may be loud, empty, or have a pruned first layer."""
    x, labels, loudness, weight, kept = batch
    out = logits(params, x.astype(params["head"]["bias"].dtype)).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
    # The square root has no derivative where nothing is kept.
    kernel = params["hidden_1"]["kernel"].astype(jnp.float32)
    lasso = 1e-4 * jnp.sqrt(jnp.sum((kept * kernel) ** 2))
    return loudness * jnp.sum(weight * losses) / jnp.sum(weight * 32) + lasso


@functools.partial(jax.jit, static_argnums=0)
def train(tx, carry, rows):
    def step(carry, batch):
        params, state = carry
        scale = optaxclip.loss_scale(state) if scales(state) else jnp.float32(1)
        loss, grads = jax.value_and_grad(lambda p: scale * loss_of(p, batch))(params)
        updates, state = tx.update(grads, state, params, loss=loss / scale)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, rows)[0]


def scales(state):
    return isinstance(state.inner_state, optaxclip.LossScaleState)


def run(path, clip, *, wrap=lambda tx: tx, dtype=np.float32, restarts=(), **faults):
    """Trains, and returns the log: `faults` are steps that are loud, empty or pruned.

    A restart at a step goes back to the last checkpoint, made every hundred steps.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, STEPS, 3e-4)
    tx = optaxclip.record_history(
        wrap(optax.chain(clip, optax.adamw(rate))), length=50, leaf_norms=True
    )
    x, labels = batches(STEPS)
    loudness, weight, kept = np.ones((3, STEPS))
    loudness[list(faults.get("loud", ()))] = 1000
    weight[list(faults.get("empty", ()))] = 0
    kept[list(faults.get("pruned", ()))] = 0
    columns = (x, labels, loudness, weight, kept)
    rows = [np.asarray(c, np.float32 if c.dtype == float else c.dtype) for c in columns]
    params = parameters(dtype)
    carry = params, tx.init(params)
    log, checkpoints, step = ClipLog(path, params=params), {}, 0
    restarts = list(restarts)
    while step < STEPS:
        if step % 100 == 0:
            checkpoints[step] = carry
        with jax.numpy_dtype_promotion("standard"):  # as optax asks
            carry = train(tx, carry, [row[step : step + 50] for row in rows])
        step += 50
        log.update(carry[1])
        if restarts and step >= restarts[0]:
            restarts.pop(0)
            step = max(checkpoints)
            carry = checkpoints[step]
            log = ClipLog(path, params=params)
            log.update(carry[1])
    return read(path)


def percentile():
    return optaxclip.clip_by_percentile(95, window=100)


LOUD = (130, 217, 305)
RUNS = {
    "healthy": lambda path: run(path, percentile(), wrap=optaxclip.skip_nonfinite),
    "spikes held": lambda path: run(path, percentile(), loud=LOUD),
    "spikes passed": lambda path: run(
        path, optaxclip.clip_by_global_norm(50.0), loud=LOUD
    ),
    "NaN in one layer": lambda path: run(path, percentile(), pruned=[260]),
    "NaN in all": lambda path: run(path, percentile(), empty=[260]),
    "NaN skipped": lambda path: run(
        path, percentile(), wrap=optaxclip.skip_nonfinite, empty=[170, 260]
    ),
    "always clipped": lambda path: run(path, optaxclip.clip_by_global_norm(0.01)),
    "never clipped": lambda path: run(path, optaxclip.clip_by_global_norm(100.0)),
    "restarted twice": lambda path: run(path, percentile(), restarts=[150, 350]),
    "float16": lambda path: run(
        path,
        percentile(),
        dtype=np.float16,
        wrap=functools.partial(
            optaxclip.dynamic_loss_scale, init_scale=2.0**20, growth_interval=100
        ),
    ),
}
