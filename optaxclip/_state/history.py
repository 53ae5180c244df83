"""The flight recorder: the last steps of a clip, on device, without a host sync."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel import (
    Norms,
    check_sizes,
    count_if,
    handing_over,
    initial,
    matching,
    measure,
    named,
    own,
    shapes_of,
    stacked,
)
from optaxclip._norms import (
    AxisName,
    along,
    leaf_norm,
    same_on_all_devices,
    split,
)
from optaxclip._show import chosen, default, shown
from optaxclip._state.row import Row, row_between

PyTree = Any


class History(NamedTuple):
    """Ring buffers of ``length`` steps. Step s is at index s % length."""

    history_norm: jax.Array  #: before clipping; NaN or infinite in a bad step
    history_threshold: jax.Array  #: the largest finite number if unbounded
    history_scale: jax.Array  #: what the step was multiplied by; 0 if skipped
    history_loss: jax.Array  #: as passed to ``update(..., loss=)``, else 0
    history_has_loss: jax.Array  #: 1 if a loss was passed; int8
    history_clipped: jax.Array  #: 1 if the step was clipped; int8
    history_skipped: jax.Array  #: 1 if the step was skipped; int8
    history_leaf_norms: Norms | tuple[()]  #: by the names of the leaves, if asked

    __repr__ = shown


class HistoryState(NamedTuple):
    """State of :func:`record_history`."""

    history_count: jax.Array  #: int32, steps recorded since the start
    history: History  #: the last steps
    inner_state: PyTree  #: state of the recorded optimizer

    __repr__ = shown


def record_history(
    inner: optax.GradientTransformation,
    length: int = default(1000),
    leaf_norms: bool = False,
    *,
    clip: str | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps what a clip did in its last steps, for the host to read now and then.

    It keeps one row for each step: norm, threshold, scale, whether the step was clipped
    or skipped, the loss if you pass ``update(..., loss=loss)``, and the norm of every
    leaf if asked. Rows are kept in buffers of a fixed size on the device; nothing is
    sent to the host, and nothing waits for it. Read them at least every ``length``
    steps, and none is lost: :class:`optaxclip.audit.ClipLog` reads them and writes them
    to a file. The count of steps ends at 2**31 - 1; later rows are lost.

    Args:
      inner: The transformation that holds the clip, its skips included: usually the
        whole optimizer. A step is one of the clip, made or skipped: with
        ``optax.MultiSteps``, inside or around it, micro-batches have no rows.
      length: The number of steps to keep, at least 1.
      leaf_norms: Also keeps the 2-norm of every leaf of the incoming updates, in a
        buffer of ``length`` floats for each leaf. If the clip measures the same leaves,
        by global norm or by leaf norm, the gradients are not read again. Around a
        :func:`dynamic_loss_scale` these are norms of the scaled gradients.
      clip: Which of several clips in ``inner``: the prefix that
        :func:`optaxclip.metrics` gives its keys. A clip with several norms is recorded
        by the one that exceeds its threshold most, as there.
      axis_name: As in :func:`optaxclip.clip_by`, for ``leaf_norms``.

    Returns:
      A transformation with :class:`HistoryState`. The updates are those of ``inner``.

      ====================  ========================================================
      step                  row
      ====================  ========================================================
      ordinary              norm, threshold and scale of the clip
      with a norm of NaN    the same; clipped is False
      skipped               norm and threshold of the skip, scale 0; clipped is False
      with an overflow      norm and threshold infinite, scale 0: skipped by
                            :func:`dynamic_loss_scale`
      with no clip inside   norm and threshold of the skip, scale 1
      of a micro-batch      none
      ====================  ========================================================

    Raises:
      ValueError: ``length`` is not an integer of at least 1; or, at ``init``, ``inner``
        holds no clip and no skip, or several clips and ``clip`` names none of them.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optaxclip.record_history(
      ...     optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1)), length=3
      ... )
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in [0.5, 2.0, 4.0, 0.1]:
      ...     updates, state = tx.update(jnp.array([grad]), state)
      >>> print(state.history_count, state.history.history_norm)
      4 [0.1 2.  4. ]
    """
    _checks.transformation("record_history", "inner", inner)
    length = chosen(length)
    _checks.count("record_history", "length", length)
    inner = optax.with_extra_args_support(inner)
    per_leaf = along(leaf_norm, axis_name)

    def init(params: PyTree) -> HistoryState:
        inner_state = inner.init(params)
        norms = stacked(initial(per_leaf, params)) if leaf_norms else ()
        entries = _entries(row_between(inner_state, inner_state, clip), None, norms)
        history = _buffers(entries, length)
        return HistoryState(jnp.zeros((), jnp.int32), history, inner_state)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, HistoryState]:
        state = own(HistoryState, state)
        gradients = split(updates).gradients
        norms = measure(per_leaf, gradients) if leaf_norms else ()
        known = handing_over(per_leaf, gradients, norms)
        with known if leaf_norms else contextlib.nullcontext():
            updates, inner_state = inner.update(
                updates, state.inner_state, params, **extra_args
            )
        row = row_between(state.inner_state, inner_state, clip)
        loss = extra_args.get("loss")
        loss = None if loss is None else same_on_all_devices("loss", loss)
        if leaf_norms:
            last = jax.tree.map(lambda x: x[0], state.history.history_leaf_norms)
            like = shapes_of(last)
            norms = stacked(matching(named(norms, like), like, "updates"))
        entries = _entries(row, loss, norms)
        check_sizes("history", state.history, lambda: _buffers(entries, length))
        write = functools.partial(_write, state.history_count % length, row.is_step)
        history = jax.tree.map(write, state.history, entries)
        count = count_if(row.is_step, state.history_count)
        return updates, HistoryState(count, history, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _entries(
    row: Row, loss: jax.Array | None, leaf_norms: Norms | tuple[()]
) -> History:
    dtype = row.norm.dtype
    return History(
        history_norm=row.norm,
        history_threshold=row.threshold.astype(dtype),
        history_scale=row.scale.astype(dtype),
        history_loss=jnp.asarray(0 if loss is None else loss).astype(dtype),
        history_has_loss=jnp.asarray(loss is not None, jnp.int8),
        history_clipped=row.clipped.astype(jnp.int8),
        history_skipped=row.skipped.astype(jnp.int8),
        history_leaf_norms=leaf_norms,
    )


def _buffers(entries: History, length: int) -> History:
    return jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), entries)


def _write(
    at: jax.Array, is_step: jax.Array, buffer: jax.Array, entry: jax.Array
) -> jax.Array:
    return buffer.at[at].set(jnp.where(is_step, entry, buffer[at]))
