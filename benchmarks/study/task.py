"""What a task is, and how a Flax model trains on one: a pure function of a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optaxclip

Key = jax.Array
Params = Any
# (optimizer, key) -> (value at the end: lower is better, norms before the clip, state)
Train = Callable[
    [optax.GradientTransformation, Key], tuple[jax.Array, jax.Array, optax.OptState]
]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data and its trouble; everything but the clip and the rate."""

    name: str
    model: str  # a few words for the table
    trouble: str
    optimizer: str
    make_optimizer: Callable[[Any], optax.GradientTransformation]  # from the rate
    rates: tuple[float, float, float]
    unit: str  # of the value
    worst: float  # the value of a run that diverged: that of knowing nothing
    train: Train
    seeds: int = 4


Model = Any
Optimizer = optax.GradientTransformation


def optimize(
    model: Model,
    loss: Callable[[Model, Any], jax.Array],
    batch: Callable[[Key, jax.Array], Any],
    steps: int,
    optimizer: Optimizer,
    key: Key,
    wrt: Any = nnx.Param,
) -> tuple[Model, jax.Array, optax.OptState]:
    """Trains a Flax NNX model in one `scan`.

    Args:
      model: The model as it starts.
      loss: Of a model and a batch.
      batch: Of a key and the index of the step.
      steps: How many.
      optimizer: The clip and what stands behind it.
      key: For the batches.
      wrt: Which variables are trained; all others stay as they are.

    Returns:
      The trained model, the norms of its gradients before the clip, and the state.
    """
    graphdef, params, rest = nnx.split(model, wrt, ...)

    def objective(params: Any, data: Any) -> jax.Array:
        return loss(nnx.merge(graphdef, params, rest), data)

    def step(carry: Any, index: jax.Array) -> Any:
        params, opt_state = carry
        data = batch(jax.random.fold_in(key, index), index)
        grads = jax.grad(objective)(params, data)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), optaxclip.global_norm(grads)

    start = params, optimizer.init(params)
    (params, opt_state), norms_S = jax.lax.scan(step, start, jnp.arange(steps))
    return nnx.merge(graphdef, params, rest), norms_S, opt_state


def fit(
    make_model: Callable[[nnx.Rngs], Model],
    loss: Callable[[Model, Any], jax.Array],
    batch: Callable[[Key, jax.Array], Any],
    validate: Callable[[Model], jax.Array],
    steps: int,
    wrt: Any = nnx.Param,
) -> Train:
    """A task's `train`: makes a model, optimizes and validates it."""

    def train(optimizer: Optimizer, key: Key) -> Any:
        model_key, data_key = jax.random.split(key)
        model = make_model(nnx.Rngs(model_key))
        model, *rest = optimize(model, loss, batch, steps, optimizer, data_key, wrt)
        return validate(model), *rest

    return train


def warmup_cosine(rate: Any, steps: int, warmup: int = 20) -> optax.Schedule:
    """The customary schedule: up in a line, down in a cosine to a tenth."""

    def schedule(count: jax.Array) -> jax.Array:
        rise = jnp.minimum(1.0, (count + 1) / warmup)
        progress = jnp.clip((count - warmup) / (steps - warmup), 0, 1)
        return rate * rise * (0.55 + 0.45 * jnp.cos(jnp.pi * progress))

    return schedule
