"""What a step did, read from the states before and after it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._kernel import ClipState, SkipState, find, unbounded_like, without_loss
from optaxclip._state.metrics import of_clip, of_skip
from optaxclip._transforms import LossScaleState

PyTree = Any


class Row(NamedTuple):
    """What one step did, as scalars."""

    is_step: jax.Array  # whether there is anything to record
    norm: jax.Array
    threshold: jax.Array
    scale: jax.Array
    clipped: jax.Array
    skipped: jax.Array


def row_between(before: PyTree, after: PyTree, clip: str | None) -> Row:
    """What was done between two states of the inner transformation."""
    row, skips = _clip_row(before, after, clip), list(_skip_rows(before, after))
    overflows = list(_overflow_rows(before, after))
    if row is None and not skips:
        raise ValueError(
            "`record_history(inner=...)` must hold a clip or a skip of optaxclip, got "
            f"{find.kinds(after)}."
        )
    if row is None:  # then the skip's norm is all there is
        is_step, no = jnp.ones((), bool), jnp.zeros((), bool)
        row = skips[0]._replace(is_step=is_step, scale=jnp.float32(1), skipped=no)
    for skip in skips + overflows:
        row = jax.tree.map(functools.partial(_select, skip.skipped), skip, row)
    return row


def _select(which: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    return jnp.where(which, yes.astype(no.dtype), no)


def _clip_row(before: PyTree, after: PyTree, clip: str | None) -> Row | None:
    states = find.named(after, ClipState)
    if len(states) < 2:
        if clip is not None:
            raise ValueError(
                "`record_history(clip=...)` must be None where `inner` holds "
                f"{'one clip' if states else 'no clip'}, got {clip!r}."
            )
        names = list(states)
    else:
        names = [name for name in states if name == f"{clip}/"]
        if not names:
            raise ValueError(
                "`record_history(clip=...)` chooses a clip and must be one of "
                f"{[name.removesuffix('/') for name in states]}, got {clip!r}."
            )
    if not names:
        return None
    old, new = find.named(before, ClipState)[names[0]], states[names[0]]
    worst = of_clip(new, per_leaf=False)
    return Row(
        is_step=new.step_count != old.step_count,
        norm=worst["grad_norm"],
        threshold=worst["clip_threshold"],
        scale=worst["clip_scale"],
        clipped=new.clip_count != old.clip_count,
        skipped=jnp.zeros((), bool),
    )


def _skip_rows(before: PyTree, after: PyTree) -> Iterator[Row]:
    earlier = find.named(before, SkipState)
    for name, new in find.named(after, SkipState).items():
        worst = of_skip(without_loss(new))
        skipped = new.skip_count != earlier[name].skip_count
        yield Row(
            is_step=skipped,
            norm=worst["skip_norm"],
            threshold=worst["skip_threshold"],
            scale=jnp.float32(0),
            clipped=jnp.zeros((), bool),
            skipped=skipped,
        )


def _overflow_rows(before: PyTree, after: PyTree) -> Iterator[Row]:
    earlier = find.named(before, LossScaleState)
    for name, new in find.named(after, LossScaleState).items():
        skipped = new.overflow_count != earlier[name].overflow_count
        yield Row(
            is_step=skipped,
            norm=jnp.float32(jnp.inf),
            threshold=unbounded_like(jnp.float32(0)),
            scale=jnp.float32(0),
            clipped=jnp.zeros((), bool),
            skipped=skipped,
        )
