"""The rows of a log as the script of a page takes them: exact to four digits."""

import base64
import zlib
from typing import Any

import numpy as np

from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.decimate import chosen_rows, stretches

GROUPS = 8000  # of steps; a log of up to three times as many rows is taken whole
LEAVES = 24  # parameters, at most
_DROPPED_BITS = 8  # of the 23 of a float32's fraction: 4 digits are left


def payload(data: LogData, name: str) -> dict[str, Any]:
    """A run for the script of a page, as JSON knows it.

    Columns are 4 bytes a row: ``"f"`` float32, ``"u"`` uint32. Their first bytes come
    first, then their second ones, and so on, which packs better; then zlib and base64.
    Counts are of all rows before a row, so that shares are exact though rows are left
    out.
    """
    rows = chosen_rows(data, GROUPS)
    flags = {"clipped": stats.clipped(data), "skipped": data.skipped}
    steps = np.minimum(data.step - data.step[0], 2**32 - 1)
    columns = {"at": steps[rows], "row": rows}
    columns |= {f"{key}Before": _before(flag)[rows] for key, flag in flags.items()}
    columns["action"] = flags["clipped"][rows] + 2 * flags["skipped"][rows]
    columns = {key: ("u", column) for key, column in columns.items()}
    for quantity in ("norm", "threshold", "scale", "loss"):
        columns[quantity] = ("f", getattr(data, quantity)[rows])
    leaves = () if data.leaf_norms is None else stats.largest_leaves(data, LEAVES)
    for i, leaf in enumerate(leaves):
        assert data.leaf_norms is not None
        columns[f"leaf{i}"] = ("f", data.leaf_norms[rows, leaf])
    leaders, led = _leaders(data, rows)
    columns |= led
    bad = {
        i: stats.in_words(data, stats.nonfinite_leaves(data, row))
        for i, row in enumerate(rows)
        if not np.isfinite(data.norm[row])
    }
    reached = ~np.isfinite(data.norm) & ~data.skipped
    return {
        "name": name,
        "first": str(data.step[0]),  # may be too large for a number of JavaScript
        "steps": len(data.step),
        "rows": len(rows),
        "columns": [(key, kind) for key, (kind, _) in columns.items()],
        "bytes": _packed(list(columns.values())),
        "leaders": leaders,
        "bad": bad,  # which parameters are not finite, by row
        "moreLeaves": len(data.leaf_names) - len(leaves),
        "leaves": [data.leaf_names[leaf] for leaf in leaves],
        "bands": {
            key: [[int(steps[a]), int(steps[b])] for a, b in stretches(flag)]
            for key, flag in [("skipped", data.skipped), ("reached", reached)]
        },
        "logLoss": stats.spans_decades(data.loss),
        "acted": stats.acted(data),
    }


def _leaders(
    data: LogData, rows: np.ndarray
) -> tuple[list[str], dict[str, tuple[str, np.ndarray]]]:
    """The largest of all parameters in each row: their names, and columns."""
    if data.leaf_norms is None or not data.leaf_names:
        return [], {}
    norms = np.nan_to_num(data.leaf_norms[rows], posinf=0)
    used, which = np.unique(norms.argmax(axis=1), return_inverse=True)
    columns = {"leader": ("u", which), "leaderNorm": ("f", norms.max(axis=1))}
    return [data.leaf_names[leaf] for leaf in used], columns


def _before(flags: np.ndarray) -> np.ndarray:
    return np.cumsum(flags) - flags


def _packed(columns: list[tuple[str, np.ndarray]]) -> str:
    parts = [_words(kind, column) for kind, column in columns]
    planes = [np.ascontiguousarray(p.view(np.uint8).reshape(-1, 4).T) for p in parts]
    content = b"".join(plane.tobytes() for plane in planes)
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _words(kind: str, column: np.ndarray) -> np.ndarray:
    """A column as little-endian words; float32 is rounded to what is shown of it."""
    if kind == "u":
        return column.astype("<u4")
    limit = np.finfo(np.float32).max / 2
    finite = np.isfinite(column)
    clipped = np.where(finite, np.clip(column, -limit, limit), column)
    words = clipped.astype("<f4").view("<u4")
    half, mask = 1 << (_DROPPED_BITS - 1), ~np.uint32((1 << _DROPPED_BITS) - 1)
    return np.where(finite, (words + np.uint32(half)) & mask, words)
