"""Skipping: the dual of clipping, with the same two slots.

Zeroed gradients are not a skip: momentum still moves the parameters, decay still
shrinks them, and NaN times zero is NaN. A skipped step leaves the inner state as it
was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optaxclip._kernel.guard import SkipState, not_made
from optaxclip._kernel.guard import guard as guard_of
from optaxclip._kernel.measure import Norm
from optaxclip._norms import AxisName, global_norm
from optaxclip._show import default
from optaxclip._thresholds import Rule, Threshold

PyTree = Any


class GuardedStep(NamedTuple):
    """What :func:`guarded_step` returns: two functions."""

    init: Callable[[PyTree], SkipState]  #: from parameters to a state
    step: Callable[..., tuple[PyTree, SkipState]]  #: to new parameters and a new state

    @property
    def update(self) -> Any:
        """There is none: it is no transformation."""
        raise AttributeError(
            "`guarded_step` does not return an `optax.GradientTransformation`: its "
            "`step` takes and returns parameters. In `optax.chain` or a Flax "
            "optimizer, use `skip_by`."
        )


def skip_by(
    inner: optax.GradientTransformation,
    norm: Norm = default(global_norm),
    threshold: Threshold | Rule = jnp.inf,
    *,
    watch_loss: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips whole steps whose norm exceeds a threshold or is not finite.

    .. math:: (u, s) \leftarrow \begin{cases} \mathrm{inner}(g, s) &
              \|g\| \le T \\ (0, s) & \text{else, NaN and infinity included}\end{cases}

    Args:
      inner: The transformation to guard: usually the whole optimizer, its clip
        included. Anything with ``init`` and ``update``, ``optax.MultiSteps`` too.
      norm: As in :func:`optaxclip.clip_by`. With several norms, a step is skipped if
        one of them exceeds its threshold.
      threshold: As in :func:`optaxclip.clip_by`. The rule also sees the norms of
        skipped steps, so a rule that adapts lets training continue at a new level. It
        never sees norms that are not finite.
      watch_loss: Applies the same rule, with a separate memory, to the loss, passed as
        ``update(updates, state, params, loss=loss)``. A loss that is not finite skips
        the step, too. For positive losses and rules that adapt.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`SkipState`. After a skip the updates are zeros of
      the dtypes that ``inner`` returns, and ``inner_state`` is bit for bit what it was:
      counts, moments, schedules. ``float0`` and PRNG-key leaves and the fp8 statistics
      of Flax, which are not added to parameters, pass through. The inner transformation
      does not run at all (``lax.cond``), except under ``vmap``.

      ==========================  ==================================================
      norm                        result
      ==========================  ==================================================
      at most the threshold       what ``inner`` returns
      above it, infinite or NaN   zeros, ``inner_state`` unchanged
      of an empty tree            0: never skipped
      ==========================  ==================================================

    Raises:
      ValueError: at the update, with ``watch_loss`` and without ``loss``, or with one
        that differs between devices.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optaxclip.skip_by(optax.sgd(1.0), threshold=10.0)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for grads in [jnp.ones(2), 100 * jnp.ones(2), jnp.nan * jnp.ones(2)]:
      ...     updates, state = tx.update(grads, state, params)
      ...     print(updates, state.skip_count)
      [-1. -1.] 0
      [0. 0.] 1
      [0. 0.] 2
    """
    guard = guard_of("skip_by", inner, norm, threshold, watch_loss, axis_name)
    inner = guard.inner

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SkipState]:
        def run(inner_state: PyTree) -> tuple[PyTree, PyTree]:
            return inner.update(updates, inner_state, params, **extra_args)

        stay = not_made(run, updates)
        return guard.choose(run, stay, updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(guard.init, update)


def guarded_step(
    inner: optax.GradientTransformation,
    norm: Norm = default(global_norm),
    threshold: Threshold | Rule = jnp.inf,
    *,
    watch_loss: bool = False,
    axis_name: AxisName = None,
) -> GuardedStep:
    r""":func:`skip_by` and ``optax.apply_updates`` in one step, which is cheaper.

    A transformation has to return updates: a skip has to write zeros, and the training
    loop adds them. This function takes parameters and returns parameters instead. A
    skipped step touches neither the parameters nor the state.

    Args:
      inner: As in :func:`skip_by`.
      norm: As in :func:`skip_by`.
      threshold: As in :func:`skip_by`.
      watch_loss: As in :func:`skip_by`.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A pair of functions. ``init(params)`` returns a :class:`SkipState`, like that of
      :func:`skip_by`, which :func:`optaxclip.metrics` reads.
      ``step(updates, params, state, **extra_args)`` returns new parameters and a new
      state. Donate both, and keep this order in your own functions: JAX pairs donated
      arguments with results of the same shape by position. In another order, moments
      are paired with parameters and have to be copied.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> guarded = optaxclip.guarded_step(optax.sgd(1.0))
      >>> params = jnp.zeros(2)
      >>> state = guarded.init(params)
      >>> for grads in [jnp.ones(2), jnp.nan * jnp.ones(2)]:
      ...     params, state = guarded.step(grads, params, state)
      ...     print(params, state.skip_count)
      [-1. -1.] 0
      [-1. -1.] 1
    """
    guard = guard_of("guarded_step", inner, norm, threshold, watch_loss, axis_name)
    inner = guard.inner

    def step(
        updates: PyTree, params: PyTree, state: Any, **extra_args: Any
    ) -> tuple[PyTree, SkipState]:
        def run(inner_state: PyTree) -> tuple[PyTree, PyTree]:
            changes, new = inner.update(updates, inner_state, params, **extra_args)
            return optax.apply_updates(params, changes), new

        def stay(inner_state: PyTree) -> tuple[PyTree, PyTree]:
            return params, inner_state

        return guard.choose(run, stay, updates, state, params, extra_args)

    return GuardedStep(guard.init, step)
