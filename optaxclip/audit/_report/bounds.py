"""What a summary finds in the threshold and the norms that it bounds."""

import numpy as np

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.finding import Finding, at, span
from optaxclip.audit._what_if import longest_streak

OVER = 0.5  # share of steps clipped, from which on a clip sets the length of steps
BLOCK = 100  # steps, among which the clipped ones are counted
LITTLE = 0.1  # mean scale, below which a threshold that adapts leaves too little
STRETCH = 0.8  # share of the steps of a block, from which on it counts as clipped
HEADROOM = 10.0  # threshold over median norm, from which on it is out of reach
LEVEL = 1.25  # factor between the middle of a run and its end, below which it is level
DRIFT = 2.0  # factor between an earlier tenth of a run and the last


def over_clipping(data: LogData) -> Finding | None:
    """Most steps clipped, in all or for a while.

    A threshold that adapts may clip most steps, by a low percentile or at the start, as
    long as it leaves something of them.
    """
    s = stats.statistics(data)
    if stats.moves(data) and s.mean_scale >= LITTLE:
        return None
    if s.clipped_share >= OVER:
        every = s.clipped == s.steps
        detail = "" if every else f"{text.share(s.clipped_share)} of the steps were. "
        detail += (
            "The threshold is below the ordinary norms, so the clip sets the size of "
            "the updates instead of holding back the few that are too large. On "
            f"average, gradients were multiplied by {text.number(s.mean_scale)}. With "
            "SGD that lowers the learning rate by as much; with Adam it changes "
            "little. If this is not intended, raise the threshold (median "
            f"{text.number(s.median_threshold)}): 95% of the norms were below "
            f"{text.number(s.p95_norm)}."
        )
        title = f"{'Every step was' if every else 'Most steps were'} clipped"
        return Finding("notice", title, detail)
    shares = np.add.reduceat(
        stats.clipped(data), np.arange(0, s.steps, BLOCK), dtype=float
    )
    sizes = np.diff(np.append(np.arange(0, s.steps, BLOCK), s.steps))
    start, length = longest_streak((shares >= STRETCH * sizes) & (sizes == BLOCK))
    if not length:
        return None
    rows = slice(start * BLOCK, (start + length) * BLOCK)
    detail = (
        f"{text.share(float(stats.clipped(data)[rows].mean()))} of the steps from "
        f"{data.step[rows][0]} to {data.step[rows][-1]} were clipped, and "
        f"{text.share(s.clipped_share)} of all steps."
    )
    ends = at(data.step[rows][[0, -1]])
    return Finding("notice", "For a while most steps were clipped", detail, ends)


def under_clipping(data: LogData) -> Finding | None:
    """A threshold that nothing ever came near."""
    s = stats.statistics(data)
    if not np.isfinite(data.threshold).any():
        detail = "The threshold was infinite, so norms were recorded but not limited."
        return Finding("notice", "The clip was off", detail)
    if not s.largest_norm or s.clipped:
        return None
    if not s.median_threshold > HEADROOM * s.median_norm:
        return None
    above_median = s.median_threshold / s.median_norm if s.median_norm else np.inf
    detail = (
        f"{'The median threshold' if stats.moves(data) else 'The threshold'}, "
        f"{text.number(s.median_threshold)}, is "
        f"{text.number(above_median)} times the median norm and "
        f"{text.number(s.median_threshold / s.largest_norm)} times the largest. A "
        "spike up to the threshold would pass."
    )
    title = "The clip never acted: its threshold is out of reach"
    return Finding("notice", title, detail)


def rise(data: LogData) -> Finding | None:
    """Norms that have risen for good, whatever bounds them."""
    tenths = _tenths(data)
    if not tenths:
        return None
    medians = [float(np.median(data.norm[rows])) for rows in tenths]
    if medians[0] == min(medians) and medians[-1] < LEVEL * medians[4]:
        return None  # it rose at the start, as in reinforcement learning
    low, last = tenths[int(np.argmin(medians))], tenths[-1]
    # Not by chance: where norms scatter, the quartiles overlap.
    apart = np.quantile(data.norm[last], 0.25) > np.quantile(data.norm[low], 0.75)
    if not apart or medians[-1] < DRIFT * min(medians):
        return None
    bounds = [float(np.median(data.threshold[rows])) for rows in (low, last)]
    detail = (
        f"The median norm went from {text.number(min(medians))} ({span(data, low)}) "
        f"to {text.number(medians[-1])} ({span(data, last)})"
    )
    if stats.moves(data) and bounds[1] >= DRIFT * bounds[0]:
        detail += (
            f", and the threshold followed from {text.number(bounds[0])} to "
            f"{text.number(bounds[1])}. A threshold that adapts does not stop a slow "
            "rise; max_norm= sets an upper limit."
        )
        return Finding("notice", "The norms rise, and the threshold with them", detail)
    shares = [float(stats.clipped(data)[rows].mean()) for rows in (low, last)]
    first, then = map(text.number, bounds)
    went = f"went from {first} to {then}" if first != then else f"stayed at {then}"
    detail += (
        f". The threshold {went}: {text.share(shares[0])} of the earlier steps were "
        f"clipped, and {text.share(shares[1])} of the last ones."
    )
    return Finding("notice", "The norms rise", detail)


def out_of_reach(data: LogData) -> Finding | None:
    """A threshold that has moved away from the norms, or they from it."""
    tenths = _tenths(data)
    if not tenths or under_clipping(data):
        return None
    # The first tenth is the start, where norms are large in nearly every run.
    early, late = tenths[1], tenths[-1]
    bounds = [float(np.median(data.threshold[rows])) for rows in (early, late)]
    norms = [float(np.median(data.norm[rows])) for rows in (early, late)]
    if not 0 < DRIFT * bounds[0] * norms[1] <= bounds[1] * norms[0]:
        return None
    if bounds[1] < stats.SPIKE * norms[1]:
        return None
    detail = (
        f"Earlier ({span(data, early)}) it was {text.number(bounds[0])}, or "
        f"{text.number(bounds[0] / norms[0])} times the median norm. At the end "
        f"({span(data, late)}) it is {text.number(bounds[1])}, or "
        f"{text.number(bounds[1] / norms[1])} times. A spike would now pass."
    )
    return Finding("notice", "The threshold is no longer near the norms", detail)


def _tenths(data: LogData) -> list[np.ndarray]:
    """The rows of each tenth of a run; none if a tenth has fewer than ten."""
    known = np.isfinite(data.threshold) & np.isfinite(data.norm)
    tenths = np.array_split(np.flatnonzero(known), 10)
    return tenths if len(tenths[-1]) >= 10 else []
