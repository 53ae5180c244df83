"""Steps of a log that stand out."""

from typing import NamedTuple

import numpy as np

from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats


class Event(NamedTuple):
    """A step that stands out."""

    step: int
    norm: float
    threshold: float
    scale: float
    times_usual: float  # norm over the usual norm; NaN if either is unknown
    loss: float  # NaN if none was recorded
    action: str  # clipped, skipped or passed
    leaf: str  # the largest one, or those that are not finite; empty if not recorded


def largest_events(data: LogData, count: int) -> list[Event]:
    """The steps with norms far above the usual one, and the one with the largest."""
    usual = stats.usual_norm(data)
    known = usual > 0
    times = np.where(known, data.norm, np.nan) / np.where(known, usual, 1)
    size = np.where(np.isfinite(data.norm), data.norm, 0)
    by = np.where(times > 1, times, 0) if known.any() else size
    rows = [row for row in np.argsort(-by, kind="stable")[:count] if by[row] > 0]
    largest = int(np.argmax(size))
    rows += [largest] if size[largest] > 0 and largest not in rows else []
    return [event(data, row, float(times[row])) for row in rows]


def nonfinite_events(data: LogData, count: int) -> list[Event]:
    """The first steps with a norm of NaN or infinity."""
    rows = np.flatnonzero(~np.isfinite(data.norm))[:count]
    return [event(data, row, np.nan) for row in rows]


def event(data: LogData, row: int, times_usual: float) -> Event:
    """What happened in a row of the log."""
    action = "skipped" if data.skipped[row] else "passed"
    if stats.clipped(data)[row] and not data.skipped[row]:
        action = "clipped"
    return Event(
        step=int(data.step[row]),
        norm=float(data.norm[row]),
        threshold=float(data.threshold[row]),
        scale=float(data.scale[row]),
        times_usual=times_usual,
        loss=float(data.loss[row]),
        action=action,
        leaf=stats.largest_leaf(data, row)
        or stats.in_words(data, stats.nonfinite_leaves(data, row)),
    )
