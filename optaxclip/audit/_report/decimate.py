"""Few rows that stand for all of a long log, and stretches of steps."""

import numpy as np

from optaxclip.audit._log import LogData
from optaxclip.audit._what_if import streaks


def chosen_rows(data: LogData, groups: int) -> np.ndarray:
    """Rows to draw: all of a short log, else some of each of so many groups of steps.

    Of each group the rows with the smallest, middle and largest norm and loss, so that
    a line through them loses no extreme and a median is about that of all rows; besides
    the first and the last row, and the first of every stretch that was skipped or not
    finite.
    """
    count = len(data.step)
    if count <= 3 * groups:
        return np.arange(count)
    bad = np.diff(is_bad(data).astype(np.int8), prepend=0) > 0
    parts = [_extremes(data.norm, groups), _extremes(data.loss, groups)]
    parts += [np.array([0, count - 1]), np.flatnonzero(bad)[:groups]]
    return np.unique(np.concatenate(parts))


def _extremes(values: np.ndarray, groups: int) -> np.ndarray:
    """The rows with the smallest, lower median and largest finite value of a group."""
    rows = np.flatnonzero(np.isfinite(values))
    group = rows * groups // len(values)
    ascending = rows[np.lexsort((values[rows], group))]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    ends = np.append(starts[1:], len(rows))[: len(starts)] - 1
    return ascending[np.concatenate([starts, (starts + ends) // 2, ends])]


def is_bad(data: LogData) -> np.ndarray:
    """The steps that were skipped or whose norm is not finite."""
    return data.skipped | ~np.isfinite(data.norm)


def stretches(flags: np.ndarray, most: int = 500) -> np.ndarray:
    """First and last row of each run of true flags; the nearest are joined if many."""
    starts, ends = streaks(flags)
    if len(starts) > most:
        apart = np.sort(np.argsort(ends[:-1] - starts[1:])[: most - 1])  # widest first
        starts, ends = starts[np.append(0, apart + 1)], ends[np.append(apart, -1)]
    return np.stack([starts, ends], axis=1)
