"""The rule `zscore`: so many standard deviations above the running mean."""

from __future__ import annotations

import math
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
    no_bound,
    per_norm,
    reciprocal,
    where_outlying,
)

Start = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class ZscoreState(NamedTuple):
    """State of :func:`zscore`: trees like the norms, each norm with its own memory."""

    zscore_count: PyTree  # int32: norms recorded in the warm-up, at most `warmup`
    zscore_window: PyTree  # (warmup, ...): these norms, ascending, then padding
    zscore_mean: PyTree  # running mean of what was recorded; 0 in the warm-up
    zscore_deviation: PyTree  # its running standard deviation; 0 in the warm-up

    __repr__ = shown


def quartiles(window: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The median, and the interquartile range divided by 1.349.

    For a normal distribution these are mean and standard deviation. Spikes in less than
    a quarter of the norms hardly change them, however large they are.

    Args:
      window: Norms, ascending along the first axis.

    Returns:
      Mean and deviation to start from, each of the shape of one norm.
    """

    def at(fraction: float) -> jax.Array:
        position = fraction * (len(window) - 1)
        low, high = math.floor(position), math.ceil(position)
        return window[low] + (position - low) * (window[high] - window[low])

    return at(0.5), (at(0.75) - at(0.25)) / 1.349


def moments(window: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and population standard deviation, with which the published ZClip starts.

    Args:
      window: Norms, ascending along the first axis.

    Returns:
      Mean and deviation to start from, each of the shape of one norm.
    """
    largest = window[-1:]  # divided out, so that no square overflows
    return window.mean(axis=0), (window / largest).std(axis=0) * largest[0]


def zscore(
    z_threshold: Number = 2.5,
    decay: Number = 0.97,
    warmup: int = 25,
    *,
    start: Start = default(quartiles),
    response: Outlying = default(reciprocal),
    record: Outlying = default(at_bound),
    min_deviation: Number = 0.01,
    floor: Number = 1e-12,
) -> optax.GradientTransformation:
    r"""ZClip's rule: norms many standard deviations above their mean are spikes.

    .. math::

        b_t &= \mu_t + z^* \sigma_t, &
        T_t &= \mu_t + (b_t - \mu_t)^2 / (n_t - \mu_t) \text{ if } n_t > b_t
               \text{, else } b_t \\
        r_t &= \min(n_t, b_t), &
        \mu_{t+1} &= \alpha \mu_t + (1 - \alpha) r_t, \quad
        \sigma_{t+1}^2 = \alpha \sigma_t^2 + (1 - \alpha) (r_t - \mu_{t+1})^2

    The larger a spike, the nearer its threshold is to the mean:
    :math:`\mu + z^{*2} \sigma / z` for the z-score :math:`z`.

    It differs from the published code in two ways. First, in what it remembers of a
    spike. The published code remembers :math:`T_t`, which is close to the mean, so each
    spike shrinks :math:`\sigma`. If norms rise and stay high, all of them are spikes:
    :math:`\sigma` decays as :math:`\alpha^{t/2}`, :math:`\mu` stops, and every step is
    clipped from then on. (Lognormal norms of log-deviation 0.1 that double at some
    step: no recovery in 20,000 steps.) This rule remembers the bound :math:`b_t`, which
    widens it: :math:`\sigma_{t+1}^2 = (\alpha + (1 - \alpha) \alpha^2 z^{*2})
    \sigma_t^2 \approx 1.15 \sigma_t^2`. The bound grows geometrically and reaches the
    new norms, while a single spike of any size moves the mean by only :math:`(1 -
    \alpha) z^* \sigma`. Second, it starts from the quartiles of the warm-up instead of
    its moments, and so ignores spikes in it.

    Args:
      z_threshold: :math:`z^* > 0`. Below about 1.03 the bound grows by
        ``min_deviation`` only.
      decay: :math:`\alpha` in [0, 1) of both averages.
      warmup: How many norms to start from. Until then the threshold is infinite;
        ``lowest(zscore(...), max_norm)`` caps it, then and later.
      start: A function from these norms, in ascending order along the first axis, to
        the first :math:`\mu` and :math:`\sigma`: :func:`optaxclip.rules.quartiles` (the
        default) or :func:`optaxclip.rules.moments`.
      response: What a spike is clipped to: ``reciprocal`` (the default), ``at_mean``,
        ``at_bound``, or any function ``(norm, mean, bound) -> threshold``.
      record: What is remembered of it, one of the same functions.
      min_deviation: The least :math:`\sigma / \mu` that the bound is computed with, so
        that norms which hardly vary are not clipped.
      floor: The least threshold, in the units of the norm, so that it is never 0.

    Returns:
      A rule with ``ZscoreState``, from finite norms to thresholds of their shapes
      and dtypes. It keeps ``warmup + 3`` numbers for each norm.

      ===========================  =================================================
      norm                         threshold
      ===========================  =================================================
      in the warm-up               infinity
      0                            as for any ordinary norm; it is not recorded
      at most the bound            the bound
      beyond the bound             between mean and bound
      always the same              ``1 + z_threshold * min_deviation`` times it
      ===========================  =================================================

    Raises:
      ValueError: ``z_threshold`` is not positive, ``decay`` is outside [0, 1),
        ``warmup`` is not an integer of at least 1, or ``min_deviation`` or
        ``floor`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> rule = optaxclip.zscore(warmup=4)
      >>> state = rule.init(jnp.float32(0.0))
      >>> for norm in [1.0, 1.1, 0.9, 1.0, 1.05, 1000.0, 1.05]:
      ...     threshold, state = rule.update(jnp.float32(norm), state)
      ...     print(f"{norm:7.2f} {threshold:.3f}")
         1.00 inf
         1.10 inf
         0.90 inf
         1.00 inf
         1.05 1.093
      1000.00 1.002
         1.05 1.105

      The published code, with its ``clip_factor`` as ``factor`` and its epsilon of
      1e-6 (in z, so 2.5e-6 in the norm); there ``mode="percentile"`` is ``at_bound``,
      without epsilon, and ``clip_option="mean"`` is ``at_mean`` with it:

      >>> from functools import partial
      >>> published = partial(optaxclip.rules.reciprocal, eps=2.5e-6, factor=1.0)
      >>> rule = optaxclip.zscore(
      ...     start=optaxclip.rules.moments,
      ...     response=published,
      ...     record=published,
      ...     min_deviation=0.0,
      ... )

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    call = "zscore"
    warmup, start = chosen(warmup), chosen(start)
    response, record = chosen(response), chosen(record)
    _checks.check(call, "z_threshold", z_threshold, lambda x: x > 0, "positive")
    _checks.check(call, "decay", decay, lambda x: (x >= 0) & (x < 1), "in [0, 1)")
    _checks.count(call, "warmup", warmup)
    _checks.function(call, "start", start, "such as `optaxclip.rules.moments`")
    for argument, value in (("response", response), ("record", record)):
        _checks.function(call, argument, value, "such as `optaxclip.rules.at_bound`")
    _checks.non_negative(call, "min_deviation", min_deviation)
    _checks.non_negative(call, "floor", floor)

    def bound_of(mean: jax.Array, deviation: jax.Array) -> jax.Array:
        deviation = jnp.maximum(deviation, like(min_deviation, mean) * mean)
        bound = mean + like(z_threshold, mean) * deviation
        return jnp.maximum(bound, like(floor, mean))

    def moved(norm: jax.Array, state: ZscoreState) -> tuple[jax.Array, jax.Array]:
        mean, deviation = state.zscore_mean, state.zscore_deviation
        bound = bound_of(mean, deviation)
        recorded = where_outlying(record, norm, mean, bound, norm)
        weight = like(1 - decay, norm)
        new_mean = mean + weight * (recorded - mean)
        return new_mean, _rms(deviation, recorded - new_mean, weight)

    def init_one(norm: jax.Array) -> ZscoreState:
        empty = jnp.full_like(norm, no_bound(norm.dtype), dtype=norm.dtype)
        return ZscoreState(
            zscore_count=jnp.zeros_like(norm, jnp.int32),
            zscore_window=jnp.broadcast_to(empty, (warmup, *norm.shape)),
            zscore_mean=jnp.zeros_like(norm, norm.dtype),
            zscore_deviation=jnp.zeros_like(norm, norm.dtype),
        )

    def update_one(
        norm: jax.Array, state: ZscoreState
    ) -> tuple[jax.Array, ZscoreState]:
        warm = state.zscore_count < warmup
        bound = bound_of(state.zscore_mean, state.zscore_deviation)
        threshold = where_outlying(response, norm, state.zscore_mean, bound, bound)
        threshold = jnp.where(warm, jnp.inf, jnp.maximum(threshold, like(floor, norm)))
        # A derivative has no business in the memory.
        return threshold, remember(jax.lax.stop_gradient(norm), state, warm)

    def remember(norm: jax.Array, state: ZscoreState, warm: jax.Array) -> ZscoreState:
        added = warm & (norm > 0)
        nothing = no_bound(norm.dtype)
        window = _inserted(state.zscore_window, jnp.where(added, norm, nothing))
        count = jnp.where(added, state.zscore_count + 1, state.zscore_count)
        full = count == warmup
        begins, moves = warm & full, ~warm & (norm > 0)
        started = start(jnp.where(full[None], window, 1))

        def choose(first: jax.Array, later: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(begins, first, jnp.where(moves, later, old))

        averages = map(choose, started, moved(norm, state), state[2:])
        return ZscoreState(count, window, *averages)

    return per_norm(ZscoreState, init_one, update_one)


def _inserted(window: jax.Array, norm: jax.Array) -> jax.Array:
    """An ascending window with one more norm, less its largest."""
    below = jnp.concatenate([jnp.zeros_like(window[:1]), window[:-1]])
    return jnp.minimum(window, jnp.maximum(below, norm[None]))


def _rms(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """Root of the weighted mean of two squares, neither of which overflows."""
    largest = jnp.maximum(old, jnp.abs(new))
    largest = jnp.where(largest > 0, largest, 1)
    old_square, new_square = (old / largest) ** 2, (new / largest) ** 2
    return largest * jnp.sqrt(old_square + weight * (new_square - old_square))
