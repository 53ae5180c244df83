"""The rows of a recorder: from the optimizer state to the host, then to JSON."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip._kernel import NamedNorms, find
from optaxclip._state import HistoryState
from optaxclip._thresholds import no_bound

PyTree = Any

LAST = 2**31 - 1  # steps: where the count of a recorder ends


class Rows(NamedTuple):
    """What a recorder remembers: one row a step, oldest first, as in ``LogData``."""

    step: np.ndarray
    norm: np.ndarray
    threshold: np.ndarray
    scale: np.ndarray
    loss: np.ndarray
    clipped: np.ndarray
    skipped: np.ndarray
    leaf_norms: np.ndarray | None  # (rows, leaves)
    leaf_names: tuple[str, ...]
    end: int  # steps since the start: the step behind the last row

    @property
    def first(self) -> int:
        """The oldest step that is remembered."""
        return self.end - len(self.step)

    def in_order(self, names: tuple[str, ...] | None) -> "Rows":
        """With the leaves in the order of a log that has the same ones."""
        if names is None or self.leaf_norms is None:
            return self
        if sorted(names) != sorted(self.leaf_names):
            return self
        columns = [self.leaf_names.index(name) for name in names]
        return self._replace(leaf_norms=self.leaf_norms[:, columns], leaf_names=names)


def drain(opt_state: PyTree) -> Rows:
    """Brings the rows of the recorder in a state to the host, in one transfer."""
    opt_state = getattr(opt_state, "opt_state", opt_state)
    found = list(find.named(opt_state, HistoryState).values())
    if len(found) != 1:
        raise ValueError(
            "`ClipLog.update(opt_state=...)` must hold the state of one "
            f"`record_history`, got {len(found)} in {find.kinds(opt_state)}."
        )
    recorded = (found[0].history_count, found[0].history)
    if np.ndim(found[0].history_count):  # stacked by vmap or pmap
        recorded = jax.tree.map(_first_shard, recorded)
    count, history = jax.device_get(recorded)
    while np.ndim(count):
        count, history = jax.tree.map(lambda x: x[0], (count, history))
    return _ordered(int(count), history)


def _first_shard(x: Any) -> Any:
    """What one device holds, which is at hand when other processes' parts are not."""
    return x.addressable_shards[0].data if isinstance(x, jax.Array) else x


def _ordered(count: int, history: Any) -> Rows:
    length = len(history.history_norm)
    step = np.arange(max(0, count - length), count)
    at = jax.tree.map(lambda column: np.asarray(column)[step % length], history)
    no_threshold = at.history_threshold >= no_bound(at.history_threshold.dtype)
    norms = _by_name(at.history_leaf_norms)
    names = tuple(sorted(norms, key=_natural))
    return Rows(
        step=step,
        norm=at.history_norm,
        threshold=np.where(no_threshold, np.inf, at.history_threshold),
        scale=at.history_scale,
        loss=np.where(at.history_has_loss, at.history_loss, np.nan),
        clipped=at.history_clipped.astype(bool),
        skipped=at.history_skipped.astype(bool),
        leaf_norms=np.stack([norms[x] for x in names], axis=1) if names else None,
        leaf_names=names,
        end=count,
    )


def _by_name(kept: Any) -> dict[str, np.ndarray]:
    """A column for each leaf."""
    if isinstance(kept, NamedNorms):
        return dict(zip(sorted(kept.norm_names), kept.norm_values.T, strict=True))
    return dict(kept or {})


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key to sort names by: numbers in them by size, so that 10 comes after 2."""
    parts = re.split(r"(\d+)", name)
    return [(x.isdecimal(), int(x) if x.isdecimal() else 0, x) for x in parts]


def first_difference(old: Any, new: Rows) -> int:
    """The first step of which the two tell different things, or the one behind all.

    A gap of the old log is a difference where the recorder can fill it.

    Args:
      old: ``Rows`` or ``LogData``; its numbers may have been through a file.
      new: What the recorder says now.
    """
    _, i, j = np.intersect1d(old.step, new.step, True, return_indices=True)
    same = np.ones(len(i), bool)
    for name in ("norm", "threshold", "scale", "loss", "clipped", "skipped"):
        x, y = getattr(old, name)[i], getattr(new, name)[j]
        x = x.astype(y.dtype)  # which undoes the widening by the file
        same &= (x == y) | ((x != x) & (y != y))
    differences = new.step[j][~same]
    if len(old.step) and not isinstance(old, Rows):  # which have no gaps
        filled = np.setdiff1d(new.step, old.step)
        differences = np.append(differences, filled[filled < old.step[-1]])
    return int(min(differences, default=new.end))


def to_json(rows: Rows, start: int) -> list[str]:
    """The lines of all rows from a step on."""
    new = rows.step >= start
    columns = [_json(column[new]) for column in rows[:7]]
    lines = [
        f'{{"step":{step},"norm":{norm},"threshold":{threshold},"scale":{scale},'
        f'"clipped":{clipped},"skipped":{skipped}'
        + (f',"loss":{loss}' if loss != '"nan"' else "")
        for step, norm, threshold, scale, loss, clipped, skipped in zip(
            *columns, strict=True
        )
    ]
    if rows.leaf_norms is None:
        return [f"{line}}}" for line in lines]
    norms = [",".join(_json(row)) for row in rows.leaf_norms[new]]
    pairs = zip(lines, norms, strict=True)
    return [f'{line},"leaf_norms":[{norms}]}}' for line, norms in pairs]


def _json(column: np.ndarray) -> list[str]:
    """Numbers as JSON: the fewest digits that give the same number back."""
    text = column.astype(str).tolist()
    if column.dtype == bool:
        return [x.lower() for x in text]
    finite = np.isfinite(column).tolist()
    return [x if ok else f'"{x}"' for x, ok in zip(text, finite, strict=True)]
