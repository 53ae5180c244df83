"""The rule `quantile`: a quantile of the last norms, exactly."""

from __future__ import annotations

import fractions
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._show import chosen, default, shown
from optaxclip._thresholds._memory import Number, PyTree, no_bound, per_norm


class QuantileState(NamedTuple):
    """State of :func:`quantile`: for each norm, or one array for several."""

    quantile_ring: PyTree  # (window, *norm.shape): the norms as they came, else inf
    quantile_sorted: PyTree  # the same in ascending order
    quantile_slot: PyTree  # int32: where in the ring the next norm goes
    quantile_count: PyTree  # int32: how many norms the ring holds

    __repr__ = shown


def quantile(
    q: Number,
    window: int,
    *,
    include_current: bool = False,
    min_count: int = 1,
    ramp: int = default(0),
) -> optax.GradientTransformation:
    r"""A quantile of the last norms, such as their median.

    .. math::

        T = \min(1, m / R) \, (x_{(j)} + (h - j) \, (x_{(j+1)} - x_{(j)})), \quad
        h = q \, (m - 1), \; j = \lfloor h \rfloor

    where :math:`x_{(0)} \le \dots \le x_{(m-1)}` are the last :math:`m \le N` norms in
    ascending order. It equals ``numpy.quantile`` with its default linear interpolation
    (type 7 of Hyndman and Fan), times a ramp while fewer than :math:`R` norms are
    recorded. If norms are independent and identically distributed, a share of about
    :math:`1 - q + (2q - 1) / (m + 1)` of them exceeds the quantile.

    Norms are recorded as they are, not clipped. The threshold therefore follows a
    lasting rise within :math:`(1 - q) N` steps and a fall within :math:`q N`. As long
    as a full window has at most :math:`\lfloor (1 - q)(N - 1) \rfloor` spikes, the
    threshold is at most the largest other norm. The window is kept sorted, so an update
    costs time in proportion to ``window``.

    Args:
      q: The quantile, a number in [0, 1]: 0.95 lets about 95% of the norms pass. A
        traced number is clamped to that range and has the precision of its dtype.
      window: How many norms are remembered, :math:`N`: an integer of at least 1. It is
        part of the state's shape, so ``optax.inject_hyperparams`` needs it, and
        ``min_count``, in its ``static_args``.
      include_current: Whether a norm is recorded before its own threshold is chosen, as
        in AutoClip, or after (the default), so that it cannot raise its own threshold.
      min_count: While fewer norms are recorded, from 1 to ``window``, the threshold is
        infinite; ``optaxclip.lowest(rule, cap)`` puts a cap on it. With the default, 1,
        the first norm is the threshold of the second. With few norms, a quantile clips
        a little too often. A larger number avoids that, but it gains little:
        :math:`(2q - 1) \sum_m 1 / (m + 1)` steps, which is 1.7 for ``min_count=10``
        and ``q=0.95``. In return, ``min_count`` steps are not clipped at all, just when
        training is least stable.
      ramp: An integer from 0 (the default: no ramp) to ``window``. The threshold grows
        with the number of recorded norms until there are this many. With 100 it is a
        hundredth of the quantile at the first norm, and half of it at the 50th. In most
        runs norms fall steeply at first, so a threshold from past norms does not clip
        those steps, and optimizers remember them for a long time (Adam's second moment:
        1,000 steps).

    Returns:
      A rule with ``QuantileState``: thresholds of the shapes and dtypes of the
      norms. Each norm has its own memory of two windows. Derivatives treat thresholds
      as constants.

      ==================================  ==============================================
      norm                                result
      ==================================  ==============================================
      the first                           infinity; itself with ``include_current``
      fewer than ``min_count`` recorded   infinity
      0                                   the same threshold, but it is not recorded: a
                                          step without gradient has no size
      NaN, infinite                       as for 0
      of an empty tree                    an empty tree
      ==================================  ==============================================

    Raises:
      ValueError: ``q`` is a concrete number outside [0, 1]; ``window`` is not an
        integer of at least 1, ``min_count`` not one from 1 to ``window``, or ``ramp``
        not one from 0 to ``window``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> rule = optaxclip.quantile(0.5, window=3)
      >>> state = rule.init(jnp.float32(0.0))
      >>> for norm in [4.0, 2.0, 1000.0, 3.0, 1.0]:
      ...     threshold, state = rule.update(jnp.float32(norm), state)
      ...     print(threshold)
      inf
      4.0
      3.0
      4.0
      3.0

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks <https://arxiv.org/abs/2007.14469>`_, 2020

      Merad and Gaïffas, `Robust Stochastic Optimization via Gradient Quantile Clipping
      <https://arxiv.org/abs/2309.17316>`_, 2024
    """
    in_range = "a number in [0, 1]"
    if isinstance(q, int | float) and 1 < q <= 100:
        hint = f"the {q}th percentile is q={q / 100}"
        _checks.refused("quantile", "q", in_range, q, hint)
    _checks.check("quantile", "q", q, lambda x: not x.ndim and 0 <= x <= 1, in_range)
    window, min_count = chosen(window), chosen(min_count)
    _checks.count("quantile", "window", window)
    _checks.count("quantile", "min_count", min_count, most=window)
    ramp = chosen(ramp)
    _checks.count("quantile", "ramp", ramp, least=0, most=window)

    def init_one(norm: jax.Array) -> QuantileState:
        def padding() -> jax.Array:
            largest = jnp.full_like(norm, no_bound(norm.dtype))
            return jnp.broadcast_to(largest, (window, *norm.shape))

        def zero() -> jax.Array:
            return jnp.zeros_like(norm, jnp.int32)

        return QuantileState(padding(), padding(), zero(), zero())

    def update_one(
        norm: jax.Array, state: QuantileState
    ) -> tuple[jax.Array, QuantileState]:
        new = _record(norm, state)
        known = new if include_current else state
        threshold = _interpolate(known.quantile_sorted, known.quantile_count, q)
        if ramp > 1:
            share = jnp.minimum(known.quantile_count, ramp).astype(norm.dtype) / ramp
            threshold = share * threshold
        ready = known.quantile_count >= min_count
        return jnp.where(ready, threshold, jnp.inf), new

    return per_norm(QuantileState, init_one, update_one)


def _record(norm: jax.Array, state: QuantileState) -> QuantileState:
    """The memory with the norm in place of the oldest one (at first, of padding)."""
    ring, ascending, slot, count = state
    window = ring.shape[0]
    norm = jax.lax.stop_gradient(norm)  # A derivative has no business in the memory.
    recorded = (norm > 0) & (norm < jnp.inf)
    oldest = _at(ring, slot)
    # To take the oldest out and put it back in changes nothing.
    newest = jnp.where(recorded, norm, oldest)[None]
    # Behind where the oldest was, all move up; behind where the newest goes, all move
    # back. Padding shifts: it compiles to vector instructions, concatenation does not.
    other_axes = [(0, 0, 0)] * norm.ndim
    least, most = (jnp.asarray(x, ring.dtype) for x in (0, no_bound(ring.dtype)))
    previous = jax.lax.pad(ascending, least, [(1, -1, 0), *other_axes])
    following = jax.lax.pad(ascending, most, [(-1, 1, 0), *other_axes])
    lower = jnp.where(previous < oldest[None], previous, ascending)
    upper = jnp.where(ascending < oldest[None], ascending, following)
    slots = jax.lax.broadcasted_iota(jnp.int32, ring.shape, 0)
    return QuantileState(
        quantile_ring=jnp.where(slots == slot[None], newest, ring),
        quantile_sorted=jnp.minimum(jnp.maximum(lower, newest), upper),
        quantile_slot=jnp.where(recorded, (slot + 1) % window, slot),
        quantile_count=jnp.where(recorded, jnp.minimum(count + 1, window), count),
    )


def _interpolate(ascending: jax.Array, count: jax.Array, q: Any) -> jax.Array:
    """The quantile of the first ``count`` numbers; 0 of none."""
    last = jnp.maximum(count - 1, 0)
    if isinstance(q, jax.Array):
        rank = jnp.clip(q, 0, 1).astype(ascending.dtype) * last.astype(ascending.dtype)
        index = jnp.floor(rank).astype(jnp.int32)
        fraction = rank - jnp.floor(rank)
    else:
        # Integers, since float32 is too coarse: a rank of 9500.05 has 9500.0498 for it.
        highest = (2**31 - 1) // ascending.shape[0]
        exact = fractions.Fraction(str(q)).limit_denominator(highest)
        index, remainder = jnp.divmod(last * exact.numerator, exact.denominator)
        fraction = remainder.astype(ascending.dtype) / exact.denominator
    low, high = _at(ascending, index), _at(ascending, jnp.minimum(index + 1, last))
    # Not the padding, whose multiples overflow, where nothing is recorded.
    low, high = (jnp.where(count > 0, end, 0) for end in (low, high))
    return jnp.minimum(low + fraction * (high - low), high)


def _at(array: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, index[None], axis=0, mode="clip")[0]
