"""Numbers about a log, from which its summary, its plots and its tables are made."""

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from optaxclip.audit._log import LogData

AROUND = 50  # finite norms on either side of a step, of which the usual is a median
FEWEST = 10  # finite norms on a side, without which that side tells nothing
SPIKE = 5.0  # usual norms, from which on a norm is called a spike
HIGH, ABOVE = 0.75, 2.0  # and times what three in four norms on a side stay below
NAMED = 3  # parameters that are listed by name; more are counted
_AT_ONCE = 20_000  # windows sorted at a time, for memory


Result = TypeVar("Result")


def once(function: Callable[[LogData], Result]) -> Callable[[LogData], Result]:
    """A function that takes its time, and remembers its result while a log lives."""
    known: weakref.WeakKeyDictionary[LogData, Result] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def remembered(data: LogData) -> Result:
        if data not in known:
            known[data] = function(data)
        return known[data]

    return remembered


class Statistics(NamedTuple):
    """Counts and norms of a log; norms are NaN if none is finite."""

    steps: int
    first_step: int
    last_step: int
    clipped: int
    skipped: int
    nonfinite: int  # steps with a norm of NaN or infinity
    clipped_share: float  # of all steps, as `clip_fraction` in the metrics
    mean_scale: float  # over the steps with a finite norm
    median_norm: float
    p95_norm: float
    p99_norm: float
    largest_norm: float  # finite, before clipping
    largest_norm_step: int
    spikes: int
    median_threshold: float  # of the finite ones


@once
def statistics(data: LogData) -> Statistics:
    """Counts and norms of a log; ValueError if it has no steps."""
    if not len(data.step):
        raise ValueError("the log has no steps yet.")
    finite = np.isfinite(data.norm)
    norms = data.norm[finite]
    quantiles = np.quantile(norms, [0.5, 0.95, 0.99, 1.0]) if len(norms) else [np.nan]
    median, p95, p99, largest = np.broadcast_to(quantiles, 4).tolist()
    largest_at = int(np.argmax(np.where(finite, data.norm, -1)))
    bounds = data.threshold[np.isfinite(data.threshold)]
    return Statistics(
        steps=len(data.step),
        first_step=int(data.step[0]),
        last_step=int(data.step[-1]),
        clipped=int(clipped(data).sum()),
        skipped=int(data.skipped.sum()),
        nonfinite=int((~finite).sum()),
        clipped_share=float(clipped(data).mean()),
        mean_scale=float(data.scale[finite].mean()) if len(norms) else np.nan,
        median_norm=median,
        p95_norm=p95,
        p99_norm=p99,
        largest_norm=largest,
        largest_norm_step=int(data.step[largest_at]),
        spikes=len(spikes(data)),
        median_threshold=float(np.median(bounds)) if len(bounds) else np.inf,
    )


def moves(data: LogData) -> bool:
    """Whether the threshold adapts, or follows a schedule: it changes again and again.

    A fixed one changes when a run is resumed with another, or in a few steps of a
    schedule; that of an adaptive clip changes in one step of a hundred at the least.
    """
    bounds = data.threshold[np.isfinite(data.threshold)]
    return int(np.count_nonzero(np.diff(bounds))) >= max(3, 0.01 * len(bounds))


def clipped(data: LogData) -> np.ndarray:
    """The steps whose finite norm was clipped."""
    return data.clipped & np.isfinite(data.norm)


def acted(data: LogData) -> bool:
    """Whether the clip or a skip changed any step."""
    rescaled = np.isfinite(data.scale) & (data.scale != 1)
    return bool((data.clipped | data.skipped | rescaled).any())


class _Around(NamedTuple):
    usual: np.ndarray
    high: np.ndarray


@once
def _around(data: LogData) -> _Around:
    """Medians and high quantiles of the norms before and after each step.

    Usual is the larger of the two medians, and high the smaller of the two quantiles.
    """
    finite = np.flatnonzero(np.isfinite(data.norm))
    beyond = np.full(AROUND, np.nan)
    values = np.concatenate([beyond, data.norm[finite], beyond])
    windows = np.lib.stride_tricks.sliding_window_view(values, AROUND)
    starts = range(0, len(windows), _AT_ONCE)
    parts = [row_quantiles(windows[i : i + _AT_ONCE], (0.5, HIGH)) for i in starts]
    medians, highs = np.concatenate(parts, axis=1)
    joined = []
    # A part of a phase that comes again says little of its large norms.
    for of_side, join, few in [
        (medians, np.fmax, FEWEST),
        (highs, np.fmin, AROUND // 2),
    ]:
        before, after = of_side[: len(finite)], of_side[AROUND + 1 :]
        before[:few] = after[max(len(finite) - few, 0) :] = np.nan
        known = np.full(len(data.norm), np.nan)
        known[finite[FEWEST:]] = join(before, after)[FEWEST:]
        joined.append(known)
    return _Around(*joined)


def usual_norm(data: LogData) -> np.ndarray:
    """For every step the norm that is usual around it; NaN where that is unknown.

    The larger of two medians: of the 50 finite norms before the step, and of the 50
    after it. So neither a decay, as at the start of nearly every run, nor a rise that
    lasts stands out from what is usual, and up to 24 spikes in a row do. A side with
    fewer than ten norms does not count; the first ten have no past to compare with.
    """
    return _around(data).usual


def row_quantiles(rows: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """The lower quantiles of each row without its NaN; NaN where nothing is left."""
    ascending = np.sort(rows, axis=1)  # NaN last
    last = np.maximum(np.sum(~np.isnan(rows), axis=1) - 1, 0)
    places = [np.floor(share * last).astype(int)[:, None] for share in shares]
    return np.stack([np.take_along_axis(ascending, x, 1)[:, 0] for x in places])


def spikes(data: LogData) -> np.ndarray:
    """Rows whose norm is at least five times the usual one.

    And at least twice as large as three in four norms on one side. Where large norms
    come again and again, as in each phase of PPO, they are no spikes.
    """
    usual, high = _around(data)
    is_spike = (data.norm >= SPIKE * usual) & ~(data.norm < ABOVE * high)
    return np.flatnonzero(is_spike & (usual > 0))


def largest_leaf(data: LogData, row: int) -> str:
    """The leaf with the largest norm; empty if one is not finite or none recorded."""
    if data.leaf_norms is None or not data.leaf_norms.shape[1]:
        return ""
    norms = data.leaf_norms[row]
    if not np.isfinite(norms).all():
        return ""
    return data.leaf_names[int(np.argmax(norms))]


def nonfinite_leaves(data: LogData, row: int) -> tuple[str, ...]:
    """The leaves that are not finite in a bad step; none if not recorded."""
    if data.leaf_norms is None or np.isfinite(data.norm[row]):
        return ()
    return data.nonfinite_leaves(data.step[row])


def in_words(data: LogData, leaves: tuple[str, ...]) -> str:
    """Up to three leaves by name, more by number."""
    total = len(data.leaf_names)
    if len(leaves) == total > 1:
        return f"all {total:,} parameters"
    if len(leaves) > NAMED:
        return f"{len(leaves):,} of {total:,} parameters"
    return ", ".join(leaves)


def rows_of(data: LogData, rows: slice) -> LogData:
    """A log of some of its rows."""
    names = ("step", "norm", "threshold", "scale", "loss", "clipped", "skipped")
    columns = {name: getattr(data, name)[rows] for name in names}
    leaves = None if data.leaf_norms is None else data.leaf_norms[rows]
    return dataclasses.replace(data, **columns, leaf_norms=leaves)


def largest_leaves(data: LogData, most: int) -> np.ndarray:
    """The leaves with the largest norms, largest first: by the median of those above 0.

    A leaf that has no gradient in most steps may make the spikes in the others.
    """
    assert data.leaf_norms is not None
    known = np.isfinite(data.leaf_norms) & (data.leaf_norms > 0)
    known = np.where(known, data.leaf_norms, np.nan)
    medians = np.nan_to_num(row_quantiles(known.T, (0.5,))[0])
    return np.argsort(-medians, kind="stable")[:most]


def spans_decades(values: np.ndarray) -> bool:
    """Whether values are drawn better on a logarithmic axis."""
    known = values[np.isfinite(values)]
    return bool(len(known) and known.min() > 0 and known.max() > 30 * known.min())


def leaves_are_scaled(data: LogData) -> bool:
    """Whether the norms of leaves are those of a scaled loss: two, four, ... times."""
    if data.leaf_norms is None:
        return False
    rows = np.isfinite(data.leaf_norms).all(axis=1) & np.isfinite(data.norm)
    rows &= data.norm > 0
    if not rows.any():
        return False
    exponents = np.log2(np.linalg.norm(data.leaf_norms[rows], axis=1) / data.norm[rows])
    powers = (exponents > 0.5) & (np.abs(exponents - np.round(exponents)) < 0.01)
    return bool(powers.mean() > 0.9)


def leaf_shares(data: LogData) -> np.ndarray | None:
    """Each leaf's share of the squared norm; rows that are not finite are left out."""
    if data.leaf_norms is None or not data.leaf_norms.shape[1]:
        return None
    norms = data.leaf_norms[np.isfinite(data.leaf_norms).all(axis=1)]
    largest = norms.max(axis=1, keepdims=True, initial=0)
    norms = norms[largest[:, 0] > 0] / largest[largest[:, 0] > 0]
    return norms**2 / np.sum(norms**2, axis=1, keepdims=True)
