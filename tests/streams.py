"""Norms that come one after the other, and what a rule makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=0)
def scan(rule, norms):
    """Thresholds of a stream of (trees of) norms, and the state after it."""

    def step(state, norm):
        thresholds, state = rule.update(norm, state)
        return state, thresholds

    first = jax.tree.map(lambda n: n[0], norms)
    state, thresholds = jax.lax.scan(step, rule.init(first), norms)
    return thresholds, state


def infinite(thresholds):
    """Thresholds of a state, infinite again where they stand for no bound."""
    most = np.finfo(np.float32).max
    return jax.tree.map(lambda x: jnp.where(x < most, x, jnp.inf), thresholds)


def lognormal(sigma, steps, streams=(), seed=0, median=0.01):
    noise = np.random.default_rng(seed).standard_normal((steps, *streams))
    return (median * np.exp(sigma * noise)).astype(np.float32)


def with_spikes(sigma, steps=5000, seed=0):
    norms = lognormal(sigma, steps, seed=seed)
    norms[np.random.default_rng(seed + 1).random(steps) < 0.01] *= 100
    return norms
