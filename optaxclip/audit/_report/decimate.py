"""Long series in a few bins, without losing an extreme."""

from typing import NamedTuple

import numpy as np

from optaxclip.audit._report.statistics import row_medians


class Bins(NamedTuple):
    """Rows in groups of one size, the last of what is left."""

    starts: np.ndarray  # the first row of each
    rows: int  # in all

    @property
    def size(self) -> int:
        """Rows in a bin."""
        return int(self.starts[1]) if len(self.starts) > 1 else self.rows

    def x(self, step: np.ndarray) -> np.ndarray:
        """The step in the middle of each bin."""
        last = np.append(self.starts[1:], self.rows) - 1
        return (step[self.starts] + step[last]) / 2

    def low(self, values: np.ndarray) -> np.ndarray:
        """The smallest finite value of each bin; NaN where there is none."""
        return np.fmin.reduceat(_finite(values), self.starts)

    def high(self, values: np.ndarray) -> np.ndarray:
        """The largest finite value of each bin, along the first axis."""
        return np.fmax.reduceat(_finite(values), self.starts, axis=0)

    def median(self, values: np.ndarray) -> np.ndarray:
        """The lower median of the finite values of each bin."""
        padding = np.full(len(self.starts) * self.size - self.rows, np.nan)
        padded = np.concatenate([_finite(values), padding])
        return row_medians(padded.reshape(len(self.starts), self.size))

    def mean(self, flags: np.ndarray) -> np.ndarray:
        """The share of true flags in each bin."""
        sizes = np.diff(np.append(self.starts, self.rows))
        return np.add.reduceat(flags, self.starts, dtype=float) / sizes

    def highest_row(self, values: np.ndarray, flags: np.ndarray) -> np.ndarray:
        """Of each bin with a true flag, the flagged row with the largest value."""
        rows = np.flatnonzero(flags)
        if not len(rows):
            return rows
        of_bin = rows // self.size
        order = np.lexsort((values[rows], of_bin))
        last = np.append(np.diff(of_bin[order]) > 0, True)
        return rows[order][last]


def bins(rows: int, most: int, least_size: int = 1) -> Bins:
    """At most so many bins of at least so many rows."""
    size = max(-(-rows // most), least_size)
    return Bins(np.arange(0, rows, size), rows)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
