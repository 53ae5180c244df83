"""The rule `tracked_quantile`: a quantile of the norms, followed with one number."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._show import shown
from optaxclip._thresholds._memory import Number, PyTree, like, no_bound, per_norm


class TrackedQuantileState(NamedTuple):
    """State of :func:`tracked_quantile`: for each norm, or one array for several."""

    tracked_log_threshold: PyTree  # the threshold's logarithm; infinity before a start
    tracked_log_remainder: PyTree  # what rounding has kept out of it so far

    __repr__ = shown


def tracked_quantile(
    q: Number,
    rate: Number,
    *,
    start: Number | None = None,
    floor: Number = 1e-8,
) -> optax.GradientTransformation:
    r"""A quantile of the norms, followed in small steps, with two floats of memory.

    .. math::

        T = e^\theta, \quad
        \theta \leftarrow \theta + \eta \, (q - \mathbf{1}[\|g\| \le T])

    A norm above the threshold raises it by the factor :math:`e^{\eta q}`, any other
    lowers it by :math:`e^{-\eta (1 - q)}`. How far the norm is above or below does not
    matter, so a spike of any size moves it no further. Of any :math:`n` norms, the
    share that passes is :math:`q - (\theta_n - \theta_0) / (\eta n)`.

    If norms are independent and identically distributed, :math:`\theta` has the
    standard deviation :math:`\sqrt{\eta q (1 - q) / (2 f)}`, where :math:`f` is the
    density of the log-norm at the quantile. The quantile of a window of
    :math:`2 / (\eta f)` norms varies as much. Such a window
    (:func:`optaxclip.quantile`) costs far more, so this rule suits the many norms of
    leaves and units. But it moves at its own pace: with ``q=0.95`` and ``rate=0.05`` it
    needs 15 steps to double and 278 to halve.

    Args:
      q: The share of the norms that should pass, above 0 and below 1.
      rate: The step :math:`\eta`, a positive number. With ``q=0.95``, and norms whose
        logarithms have standard deviation 0.5, 0.05 is like a window of some 200
        norms and 0.01 like one of 1,000. ``optax.inject_hyperparams`` can schedule it,
        for example to start faster.
      start: The first threshold, a positive number. If ``None`` (the default), it is
        the first recorded norm, which shows the scale better than any constant. A start
        that is :math:`k` times too low is corrected in :math:`\ln k / (\eta q)` steps,
        one that is too high in :math:`\ln k / (\eta (1 - q))`.
      floor: The least threshold, a positive number. It keeps the threshold above 0, so
        that norms which vanish for a while are not clipped for long when they return.
        The default is Adam's epsilon: gradients below it hardly move a parameter.

    Returns:
      A rule with ``TrackedQuantileState``: thresholds of the shapes and dtypes of
      the norms, one for each norm. Derivatives treat thresholds as constants.

      ==========================  ==================================================
      norm                        result
      ==========================  ==================================================
      the first                   infinity, or ``start``
      at most ``floor``           recorded as any other, never above the threshold
      0                           the same threshold, but it is not recorded: a step
                                  without gradient has no size
      NaN, infinite               as for 0
      of an empty tree            an empty tree
      ==========================  ==================================================

    Raises:
      ValueError: a concrete ``q`` is not between 0 and 1, or a concrete ``rate``,
        ``start`` or ``floor`` not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> rule = optaxclip.tracked_quantile(0.5, rate=0.2)
      >>> state = rule.init(jnp.float32(0.0))
      >>> for norm in [4.0, 1000.0, 1000.0, 4.0, 4.0]:
      ...     threshold, state = rule.update(jnp.float32(norm), state)
      ...     print(f"{threshold:.2f}")
      inf
      4.00
      4.42
      4.89
      4.42

    References:
      Andrew et al., `Differentially Private Learning with Adaptive Clipping
      <https://arxiv.org/abs/1905.03871>`_, 2021

      Yazidi and Hammer, `Multiplicative Update Methods for Incremental Quantile
      Estimation <https://doi.org/10.1109/TCYB.2017.2779140>`_, 2019
    """
    _checks.check(
        "tracked_quantile", "q", q, lambda x: (x > 0) & (x < 1), "between 0 and 1"
    )
    _check_positive("rate", rate)
    _check_positive("floor", floor)
    if start is not None:
        _check_positive("start", start)

    def init_one(norm: jax.Array) -> TrackedQuantileState:
        first = no_bound(norm.dtype) if start is None else jnp.log(start)
        return TrackedQuantileState(jnp.full_like(norm, first), jnp.zeros_like(norm))

    def update_one(
        norm: jax.Array, state: TrackedQuantileState
    ) -> tuple[jax.Array, TrackedQuantileState]:
        share, pace, least = (like(number, norm) for number in (q, rate, floor))
        started = state.tracked_log_threshold < no_bound(norm.dtype)
        known = jnp.exp(jnp.where(started, state.tracked_log_threshold, 0))
        threshold = jnp.where(started, jnp.maximum(known, least), jnp.inf)
        recorded = (norm > 0) & (norm < jnp.inf)
        # A derivative has no business in the memory.
        size = jax.lax.stop_gradient(jnp.where(recorded, norm, 1))
        old = jnp.where(started, state.tracked_log_threshold, jnp.log(size))
        move = jnp.where(started, pace * (share - like(norm <= threshold, norm)), 0)
        new, remainder = _add(old, move + state.tracked_log_remainder)
        new = TrackedQuantileState(jnp.maximum(new, jnp.log(least)), remainder)
        return threshold, jax.tree.map(
            lambda after, before: jnp.where(recorded, after, before), new, state
        )

    return per_norm(TrackedQuantileState, init_one, update_one)


def _check_positive(argument: str, value: Number) -> None:
    rule = "positive and finite"
    _checks.check(
        "tracked_quantile", argument, value, lambda x: (x > 0) & (x < jnp.inf), rule
    )


def _add(total: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum, and what rounding left out of it, to be added next time (Kahan)."""
    # Without it, steps of 0.0005 on a logarithm of 10 are off by up to 0.1%, and as
    # equal steps are rounded equally, that adds up.
    new = total + term
    return new, term - (new - total)
