"""Trains a task under a clip, at all its rates and for all its seeds in one program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from study.task import Optimizer, Task

Results = dict[str, list[list[float]]]  # by name, of rates and seeds


def trainer(
    task: Task, wrap: Callable[[Optimizer, jax.Array], Optimizer]
) -> Callable[[float], Results]:
    """A compiled function from a threshold to the results of all rates and seeds.

    Args:
      task: What to train.
      wrap: From an optimizer and a threshold, which it may ignore, to an optimizer that
        clips.
    """

    def one(rate: jax.Array, seed: jax.Array, threshold: jax.Array) -> Any:
        optimizer = wrap(task.make_optimizer(rate), threshold)
        value, norms, state = task.train(optimizer, jax.random.key(seed))
        norms = jnp.where(jnp.isfinite(norms), norms, jnp.nan)
        return {
            # A run that ends not finite, or worse than one that knows nothing, counts
            # as one that knows nothing.
            "value": jnp.where(value < task.worst, value, task.worst),
            "median_norm": jnp.nanmedian(norms),
            "share_clipped": _share(optaxclip.metrics(state), len(norms)),
        }

    rates, seeds = map(
        np.ravel, np.meshgrid(task.rates, range(task.seeds), indexing="ij")
    )

    @jax.jit
    def train_all(threshold: jax.Array) -> Any:
        # One after another: a program per run, as its user would compile it.
        return jax.lax.map(lambda run: one(*run, threshold), (rates, seeds))

    def run(threshold: float = np.inf) -> Results:
        results = jax.device_get(train_all(jnp.float32(threshold)))
        shape = len(task.rates), task.seeds
        return {k: v.reshape(shape).tolist() for k, v in results.items()}

    return run


def switched(optimizers: Sequence[Optimizer], index: jax.Array) -> Optimizer:
    """One of the optimizers, by its index, which may be traced."""
    every = [optax.with_extra_args_support(optimizer) for optimizer in optimizers]

    def init(params: Any) -> Any:
        return tuple(optimizer.init(params) for optimizer in every)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def branch(i: int) -> Callable[..., Any]:
            def run(updates: Any, state: Any) -> Any:
                updates, new = every[i].update(updates, state[i], params, **extra)
                return updates, (*state[:i], new, *state[i + 1 :])

            return run

        branches = [branch(i) for i in range(len(every))]
        return jax.lax.switch(index, branches, updates, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _share(metrics: dict[str, jax.Array], steps: int) -> jax.Array:
    """The share of the steps that were clipped, or skipped where nothing clips."""
    clipped = [v for k, v in metrics.items() if k.endswith("clip_fraction")]
    # Of several that `switched` holds, all but one have counted nothing.
    return sum(clipped, jnp.zeros(())) if clipped else metrics["skip_count"] / steps
