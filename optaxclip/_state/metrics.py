"""Reading what the clips, skips and loss scales in an optimizer state did."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from optaxclip._kernel import (
    ClipMetrics,
    ClipState,
    NamedNorms,
    SkipState,
    clip_scale,
    find,
    is_unbounded,
    unbounded_like,
)
from optaxclip._norms import largest
from optaxclip._thresholds import no_bound
from optaxclip._transforms import LossScaleState

PyTree = Any


def metrics(opt_state: PyTree, *, per_leaf: bool = False) -> dict[str, jax.Array]:
    r"""What the clips and skips of an optimizer did, as flat scalars for any logger.

    Args:
      opt_state: Any pytree that holds clips, skips or a loss scale: the state of
        ``optax.chain``, ``named_chain``, ``masked``, ``partition``, ``MultiSteps`` or
        ``inject_hyperparams``, a Flax ``TrainState``, or an ``nnx.Optimizer``.
      per_leaf: Adds the first four keys below for every leaf of a clip that has several
        norms, as ``grad_norm/<path>`` and so on. A leaf with several units is reported
        by the unit that exceeds its threshold most.

    Returns:
      A dict of float32 and int32 scalars (float64 where a clip works in it), on
      device, with these keys:

      =========================  ====================================================
      ``grad_norm``              the norm before clipping
      ``clipped_grad_norm``      the norm after clipping: min(norm, threshold), or norm
                                 times scale with an ``apply`` that has its own scale;
                                 meaningless if the norm is not finite
      ``clip_threshold``         the threshold of this step
      ``clip_scale``             what the update was multiplied by, in [0, 1]; above 1
                                 where ``apply=normalize`` scaled a norm up
      ``clipped_norm_fraction``  the share of norms above their threshold, in [0, 1]
      ``step_count``             updates since the start
      ``clip_count``             updates in which a finite norm was clipped, that is,
                                 made smaller
      ``nonfinite_count``        updates with a norm that was NaN or infinite
      ``clip_fraction``          ``clip_count / step_count``, 0 before the first step
      =========================  ====================================================

      A skip adds five more:

      =========================  ====================================================
      ``skip_norm``              the norm that decided
      ``skip_threshold``         the threshold of this step
      ``skip_count``             steps skipped since the start
      ``skipped_in_a_row``       steps skipped since the last step that was made
      ``skip_nonfinite_count``   steps skipped because a norm was not finite
      =========================  ====================================================

      And :func:`optaxclip.dynamic_loss_scale` two:

      =========================  ====================================================
      ``loss_scale``             what to multiply the next loss by
      ``overflow_count``         steps skipped because a gradient overflowed
      =========================  ====================================================

      A clip inside a skip or a loss scale does not run in a skipped step, so its values
      are those of the last step that was made.

      Counters cover all updates, other values only the last one. A clip with several
      norms (of leaves, of units) reports the one that exceeds its threshold most, so
      ``clip_scale`` is the smallest scale. Before the first update the norm is 0, the
      threshold infinite and the scale 1.

      *Names.* A single clip has no prefix. With several, a prefix says where the clip
      is: the keys of ``named_chain`` and ``partition`` and the positions in ``chain``,
      from the outside in, joined by ``/``, as in ``before/grad_norm``, ``0/grad_norm``
      or ``1/0/grad_norm``. Clips, skips and loss scales are counted
      separately. Wrappers add nothing to a prefix, unless two clips would have the same
      one; then it names every attribute on the path.

      *Stacked states.* In a state stacked by ``vmap`` or ``pmap`` every value has the
      leading axes of the stack.

    Raises:
      ValueError: the state holds no clip, skip or loss scale.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-3))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> for name, value in optaxclip.metrics(state).items():
      ...     print(f"{name:21} {value:g}")
      grad_norm             5
      clipped_grad_norm     1
      clip_threshold        1
      clip_scale            0.2
      clipped_norm_fraction 1
      step_count            1
      clip_count            1
      nonfinite_count       0
      clip_fraction         1
    """
    opt_state = getattr(opt_state, "opt_state", opt_state)
    kinds = (ClipState, SkipState, LossScaleState)
    states = [find.named(opt_state, kind) for kind in kinds]
    if not any(states):
        raise ValueError(
            "`metrics(opt_state=...)` must hold the state of an optaxclip "
            f"transformation, got {find.kinds(opt_state)}."
        )
    report = {}
    for prefix, state in itertools.chain(*(found.items() for found in states)):
        values = _unstacked(state, per_leaf)
        report |= {f"{prefix}{name}": _shown(name, x) for name, x in values.items()}
    return report


def _shown(name: str, value: jax.Array) -> jax.Array:
    """A metric as users read it: infinity for "no bound", unless JAX debugs it."""
    is_threshold = name.startswith(("clip_threshold", "skip_threshold"))
    debugging = jax.config.jax_debug_infs  # type: ignore[attr-defined]  # made late
    if not is_threshold or debugging:
        return value
    return jnp.where(is_unbounded(value), jnp.inf, value)


def _unstacked(state: Any, per_leaf: bool) -> dict[str, jax.Array]:
    names: list[str] = []

    def values(state: Any) -> list[jax.Array]:
        if isinstance(state, LossScaleState):
            report = _of_loss_scale(state)
        elif isinstance(state, SkipState):
            report = of_skip(state)
        else:
            report = of_clip(state, per_leaf)
        names[:] = report  # which vmap would return sorted
        return list(report.values())

    for _ in range(jnp.ndim(state[0])):  # stacked by vmap or pmap
        values = jax.vmap(values)
    return dict(zip(names, values(state), strict=True))


def of_skip(state: SkipState) -> dict[str, jax.Array]:
    """What a skip looked at, and how often it skipped."""
    metrics = (jax.tree.leaves(kept) for kept in state.skip_metrics)
    rows = [_Row(n, t, jnp.ones_like(n)) for n, t in zip(*metrics, strict=True)]
    worst = _worst(_stacked([_worst(row) for row in rows]))
    return {
        "skip_norm": worst.norm,
        "skip_threshold": worst.threshold,
        "skip_count": state.skip_count,
        "skipped_in_a_row": state.skipped_in_a_row,
        "skip_nonfinite_count": state.skip_nonfinite_count,
    }


def _of_loss_scale(state: LossScaleState) -> dict[str, jax.Array]:
    return {"loss_scale": state.loss_scale, "overflow_count": state.overflow_count}


def of_clip(state: ClipState, per_leaf: bool) -> dict[str, jax.Array]:
    """What a clip did, by its worst norm and, if asked, by leaf."""
    kept = (jax.tree.leaves(kept) for kept in state.clip_metrics)
    rows = list(itertools.starmap(_Row, zip(*kept, strict=True)))
    worst = [_worst(row) for row in rows]
    exceeding = sum((jnp.sum(_exceeds(row)) for row in rows), jnp.int32(0))
    report = {
        **_values(_worst(_stacked(worst))),
        "clipped_norm_fraction": exceeding / max(sum(row.norm.size for row in rows), 1),
        "step_count": state.step_count,
        "clip_count": state.clip_count,
        "nonfinite_count": state.nonfinite_count,
        "clip_fraction": state.clip_count / jnp.maximum(state.step_count, 1),
    }
    return report | (_by_name(state.clip_metrics) if per_leaf else {})


def _by_name(metrics: ClipMetrics) -> dict[str, jax.Array]:
    """The same of every norm that has a name: a norm without one is the only one."""
    norms = metrics.grad_norm
    if isinstance(norms, NamedNorms):
        row = _Row(*(cast(NamedNorms, kept).norm_values for kept in metrics))
        values = _values(row)
        columns = {key: jnp.unstack(column) for key, column in values.items()}
        return {
            f"{key}/{name}": column[i]
            for i, name in enumerate(sorted(norms.norm_names))
            for key, column in columns.items()
        }
    if not isinstance(norms, Mapping):
        return {}
    report = {}
    for name in sorted(norms):
        row = _Row(*(cast(Mapping, kept)[name] for kept in metrics))
        report |= _values(_worst(row), f"/{name}")
    return report


class _Row(NamedTuple):
    """Norms, their thresholds and scales, of one shape."""

    norm: jax.Array
    threshold: jax.Array
    scale: jax.Array


def _worst(row: _Row) -> _Row:
    """The norm that exceeds its threshold most, or the largest if nothing bounds.

    It is found by maxima alone: they work on sharded norms, which indexing does not.
    The maxima are those that keep a NaN on its way between devices.
    """
    norm, threshold, _ = row
    if not norm.size:
        zero = jnp.zeros((), norm.dtype)
        return _Row(zero, unbounded_like(zero), jnp.ones_like(zero))
    # 0 is least, and no bound is none.
    most = no_bound(norm.dtype)
    ratio = norm / jnp.where(threshold == 0, 1, threshold)
    ratio = jnp.where((threshold == 0) & (norm > 0), most, ratio)
    ratio = jnp.where(jnp.all(is_unbounded(threshold)), norm, ratio)
    ratio = jnp.where(norm <= most, jnp.minimum(ratio, most), most)  # NaN: the worst
    here = ratio == jnp.max(ratio)
    return _Row(*(largest(jnp.where(here, x, 0), None, ()) for x in row))


def _exceeds(row: _Row) -> jax.Array:
    return (row.norm > row.threshold) & ~is_unbounded(row.threshold)


def _stacked(rows: list[_Row]) -> _Row:
    if not rows:
        return _Row(*(jnp.zeros((0,), jnp.float32) for _ in _Row._fields))
    dtype = jnp.result_type(*(row.norm.dtype for row in rows))
    return _Row(
        *(
            jnp.stack([x.astype(dtype) for x in column])
            for column in zip(*rows, strict=True)
        )
    )


def _values(row: _Row, suffix: str = "") -> dict[str, jax.Array]:
    norm, threshold, scale = row
    free = is_unbounded(threshold) & (norm > 0)  # with an infinite norm, too
    # Exactly the threshold for a clip that scales to it, else what its scale makes.
    usual = (scale == clip_scale(norm, threshold)) | ~jnp.isfinite(norm)
    after = jnp.where(usual, jnp.minimum(norm, threshold), norm * scale)
    return {
        f"grad_norm{suffix}": norm,
        f"clipped_grad_norm{suffix}": jnp.where(free, norm, after),
        f"clip_threshold{suffix}": threshold,
        f"clip_scale{suffix}": jnp.where(free, 1, scale),
    }
