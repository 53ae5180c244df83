"""States of earlier versions in the form that states have today."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from optaxclip._thresholds import no_bound

# What was measured may be infinite, in today's states, too.
MEASURED = {"grad_norm", "skip_norm", "history_norm", "history_leaf_norms"}


def upgraded(parts: dict[tuple[Any, ...], Any]) -> dict[tuple[Any, ...], Any]:
    """A recorder of version 0.1.0, with NaN for no loss, in the form of today's."""
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
