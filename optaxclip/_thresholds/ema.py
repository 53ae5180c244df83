"""The rule `ema`: a multiple of the running mean of past norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._show import chosen, default, shown
from optaxclip._thresholds._memory import (
    Number,
    Outlying,
    PyTree,
    at_bound,
    like,
    per_norm,
    where_outlying,
)

Start = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class EmaState(NamedTuple):
    """State of :func:`ema`: trees like the norms, each norm with its own memory."""

    ema_count: PyTree  # int32: norms recorded in the warm-up, at most `warmup`
    ema_mean: PyTree  # running mean of what was recorded; 0 before the first

    __repr__ = shown


def smallest(mean: jax.Array, norm: jax.Array, count: jax.Array) -> jax.Array:
    """The smallest norm so far: how AdaGC starts.

    Args:
      mean: What it was before; the norm itself, the first time.
      norm: The norm of this step.
      count: How many norms were seen, this one included.

    Returns:
      What the mean is after this norm.
    """
    del count
    return jnp.minimum(mean, norm)


def average(mean: jax.Array, norm: jax.Array, count: jax.Array) -> jax.Array:
    """The plain mean of the norms so far; one spike in the warm-up spoils it.

    Args:
      mean: What it was before; the norm itself, the first time.
      norm: The norm of this step.
      count: How many norms were seen, this one included.

    Returns:
      What the mean is after this norm.
    """
    return mean + (norm - mean) / count.astype(norm.dtype)


def ema(
    ratio: Number = 1.05,
    decay: Number = 0.98,
    warmup: int = 100,
    *,
    start: Start = default(smallest),
    record: Outlying = default(at_bound),
    floor: Number = 1e-12,
) -> optax.GradientTransformation:
    r"""A multiple of the running mean of past norms: AdaGC's rule.

    .. math::

        T_t &= \max(\lambda \gamma_t, \epsilon), \qquad
        r_t = \min(n_t, T_t) \\
        \gamma_{t+1} &= \min(\gamma_t, n_t) \text{ in the warm-up}, \qquad
        \beta \gamma_t + (1 - \beta) r_t \text{ after it}

    What is recorded is at most :math:`T_t`, so a single norm of any size raises the
    threshold at most by the factor :math:`\beta + (1 - \beta) \lambda`. With the
    defaults, which are the paper's, this is 1.001 per step: if norms double and stay
    high, the threshold follows in about 700 steps. With ``ratio=2.0`` it is 1.02 and 35
    steps.

    The mean settles where :math:`E \min(n, \lambda \gamma) = \gamma`. With the defaults
    this is below the mean of the norms. Of lognormal norms with log-deviation 0.1, 0.3
    and 0.5 it clips 42, 71 and 79%, and shortens them by 3, 23 and 44% on average. It
    is more a normalizer than a guard against spikes. Because it starts from the
    smallest norm, the mean is even lower for the first few hundred steps. ``ratio=2.0,
    start=average`` clips only rare spikes.

    Args:
      ratio: :math:`\lambda > 1`.
      decay: :math:`\beta` in [0, 1) of the running mean.
      warmup: How many norms to start from. Until then the threshold is infinite;
        ``lowest(ema(...), max_norm)`` caps it, then and later.
      start: How the mean starts, a function ``(mean so far, norm, number of norms
        seen) -> mean``: :func:`optaxclip.rules.smallest` (the paper's) or
        :func:`optaxclip.rules.average`.
      record: What is remembered of a norm beyond its threshold: ``at_bound`` (the
        threshold, as in the paper), ``unchanged``, or any function
        ``(norm, mean, threshold) -> value``.
      floor: :math:`\epsilon \ge 0`, the least threshold, in the units of the norm.

    Returns:
      A rule with ``EmaState``, from finite norms to thresholds of their shapes and
      dtypes. It keeps two numbers for each norm.

      ===========================  =================================================
      norm                         threshold
      ===========================  =================================================
      in the warm-up               infinity
      0                            as for any norm; it is not recorded
      any other                    ``ratio`` times the mean of those before it
      ===========================  =================================================

    Raises:
      ValueError: ``ratio`` is not above 1, ``decay`` is outside [0, 1), ``warmup`` is
        not an integer of at least 1, or ``floor`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> rule = optaxclip.ema(ratio=2.0, decay=0.9, warmup=2)
      >>> state = rule.init(jnp.float32(0.0))
      >>> for norm in [1.2, 1.0, 0.0, 1000.0, 1.0]:
      ...     threshold, state = rule.update(jnp.float32(norm), state)
      ...     print(f"{norm:6.1f} {threshold:.2f}")
         1.2 inf
         1.0 inf
         0.0 2.00
      1000.0 2.00
         1.0 2.20

    References:
      Wang et al., `AdaGC: Improving Training Stability for Large Language Model
      Pretraining <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    call = "ema"
    warmup, start, record = chosen(warmup), chosen(start), chosen(record)
    _checks.check(call, "ratio", ratio, lambda x: x > 1, "above 1")
    _checks.check(call, "decay", decay, lambda x: (x >= 0) & (x < 1), "in [0, 1)")
    _checks.count(call, "warmup", warmup)
    _checks.function(call, "start", start, "such as `optaxclip.rules.smallest`")
    _checks.function(call, "record", record, "such as `optaxclip.rules.at_bound`")
    _checks.non_negative(call, "floor", floor)

    def init_one(norm: jax.Array) -> EmaState:
        return EmaState(
            ema_count=jnp.zeros_like(norm, jnp.int32),
            ema_mean=jnp.zeros_like(norm, norm.dtype),
        )

    def update_one(norm: jax.Array, state: EmaState) -> tuple[jax.Array, EmaState]:
        count, mean = state
        warm = count < warmup
        # A ratio near 1 loses digits in float32 that its excess over 1 keeps.
        bound = jnp.maximum(mean + like(ratio - 1, norm) * mean, like(floor, norm))
        threshold = jnp.where(warm, jnp.inf, bound)

        known = jax.lax.stop_gradient(norm)  # the memory is not differentiated
        added = warm & (known > 0)
        first = jnp.where(count == 0, known, mean)
        starting = start(first, known, count + 1)
        recorded = where_outlying(record, known, mean, bound, known)
        running = mean + like(1 - decay, norm) * (recorded - mean)
        new_mean = jnp.where(warm, starting, running)
        return threshold, EmaState(
            ema_count=jnp.where(added, count + 1, count),
            ema_mean=jnp.where(known > 0, new_mean, mean),
        )

    return per_norm(EmaState, init_one, update_one)
