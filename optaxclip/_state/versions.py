"""States of earlier versions in the form that states have today."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from optaxclip._thresholds import are_scalars_of_one_dtype, no_bound

# What was measured may be infinite, in today's states, too.
MEASURED = {"grad_norm", "skip_norm", "history_norm", "history_leaf_norms"}


Parts = dict[tuple[str, ...], Any]  # the leaves of a state by their paths, in words


def upgraded(parts: Parts) -> Parts:
    """The leaves of a state of version 0.1.0 in the form of today's."""
    if ("history", "history_loss") in parts:
        parts = _with_flags(parts)
    return _stacked(parts, _names(parts))


_OF_NORMS = (
    ("clip_metrics", "grad_norm"),
    ("skip_metrics", "skip_norm"),
    ("history", "history_leaf_norms"),
)


def _names(parts: Parts) -> list[tuple[str, ...]]:
    """The norms that version 0.1.0 kept in a tree, and that are one array today."""
    norms = {key[2:]: x for key, x in parts.items() if key[:2] in _OF_NORMS}
    of_history = ("history", "history_loss") in parts  # several steps of each
    scalars = [x[0] for x in norms.values()] if of_history else list(norms.values())
    return sorted(norms, key="/".join) if are_scalars_of_one_dtype(scalars) else []


def _stacked(parts: Parts, names: list[tuple[str, ...]]) -> Parts:
    if not names:
        return parts
    result = dict(parts)
    for key in parts:
        before = key[: len(key) - len(names[0])]
        keys = [before + name for name in names]
        if key != keys[0] or not all(k in parts for k in keys):
            continue
        is_rule = before[0] in ("rule_state", "skip_rule_state")
        stacked = jnp.stack([jnp.asarray(result.pop(k)) for k in keys], axis=-1)
        result[before if is_rule else (*before, "norm_values")] = stacked
    return result


def _with_flags(parts: Parts) -> Parts:
    """A recorder that had NaN for no loss."""
    known = ("history", "history_has_loss")
    if known in parts:
        return parts
    loss = jnp.asarray(parts["history", "history_loss"])
    flags = {known: ~jnp.isnan(loss)} | {
        ("history", name): jnp.asarray(parts["history", name])
        for name in ("history_clipped", "history_skipped")
    }
    flags = {path: flag.astype(jnp.int8) for path, flag in flags.items()}
    return parts | flags | {("history", "history_loss"): jnp.nan_to_num(loss, nan=0.0)}


def bounded(value: Any) -> Any:
    """With the largest finite number for infinity, by which 0.1.0 said "no bound"."""
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    return jnp.where(jnp.isposinf(value), no_bound(value.dtype), value)
