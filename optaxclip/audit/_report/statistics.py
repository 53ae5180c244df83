"""Numbers about a log, from which its summary, its plots and its tables are made."""

from typing import NamedTuple

import numpy as np

from optaxclip.audit._log import LogData

BLOCK = 100  # steps, of which the usual norm is a median
SPIKE = 5.0  # usual norms, from which on a norm is called a spike


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


class Event(NamedTuple):
    """A step that stands out."""

    step: int
    norm: float
    threshold: float
    scale: float
    times_usual: float  # norm over the usual norm; NaN if the norm is not finite
    action: str  # clipped, skipped or passed
    leaf: str  # the leaf with the largest norm; empty if not recorded


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


def clipped(data: LogData) -> np.ndarray:
    """The steps whose finite norm was clipped."""
    return data.clipped & np.isfinite(data.norm)


def usual_norm(data: LogData) -> np.ndarray:
    """For every step the norm that is usual around it, which no short burst moves.

    The median of the medians of its block of 100 steps and the two beside it.
    """
    norms = np.where(np.isfinite(data.norm), data.norm, np.nan)
    count = -(-len(norms) // BLOCK)
    medians = row_medians(_padded(norms, count))
    around = np.stack([np.roll(medians, 1), medians, np.roll(medians, -1)], axis=1)
    # Nothing lies before the first block and behind the last.
    around[0, 0] = around[-1, -1] = np.nan
    return np.repeat(row_medians(around), BLOCK)[: len(norms)]


def row_medians(rows: np.ndarray) -> np.ndarray:
    """The lower median of each row, NaN left out; NaN where there is nothing else."""
    ascending = np.sort(rows, axis=1)  # NaN last
    count = np.sum(~np.isnan(rows), axis=1)
    middle = np.maximum(count - 1, 0) // 2
    return np.take_along_axis(ascending, middle[:, None], axis=1)[:, 0]


def spikes(data: LogData) -> np.ndarray:
    """Rows whose norm is at least five times the usual one."""
    finite = np.isfinite(data.norm)
    usual = usual_norm(data)
    return np.flatnonzero(finite & (data.norm >= SPIKE * usual) & (usual > 0))


def largest_events(data: LogData, count: int) -> list[Event]:
    """The finite norms largest in comparison with the usual one, largest first."""
    usual = usual_norm(data)
    known = np.isfinite(data.norm) & (usual > 0)
    times = np.where(known, data.norm, 0) / np.where(known, usual, 1)
    rows = np.argsort(-times, kind="stable")[:count]
    return [event(data, row, float(times[row])) for row in rows if times[row] > 0]


def nonfinite_events(data: LogData, count: int) -> list[Event]:
    """The first steps with a norm of NaN or infinity."""
    rows = np.flatnonzero(~np.isfinite(data.norm))[:count]
    return [event(data, row, np.nan) for row in rows]


def event(data: LogData, row: int, times_usual: float) -> Event:
    """What happened in a row of the log."""
    action = "skipped" if data.skipped[row] else "passed"
    if clipped(data)[row] and not data.skipped[row]:
        action = "clipped"
    return Event(
        step=int(data.step[row]),
        norm=float(data.norm[row]),
        threshold=float(data.threshold[row]),
        scale=float(data.scale[row]),
        times_usual=times_usual,
        action=action,
        leaf=dominating_leaf(data, row),
    )


def dominating_leaf(data: LogData, row: int) -> str:
    """The leaf with the largest norm, one that is not finite before all others."""
    if data.leaf_norms is None or not data.leaf_norms.shape[1]:
        return ""
    norms = data.leaf_norms[row]
    if np.isfinite(data.norm[row]) and np.isnan(norms).all():
        return ""  # not recorded in this step
    return data.leaf_names[int(np.argmax(np.where(np.isnan(norms), np.inf, norms)))]


def leaf_shares(data: LogData) -> np.ndarray | None:
    """Each leaf's share of the squared norm; rows that are not finite are left out."""
    if data.leaf_norms is None or not data.leaf_norms.shape[1]:
        return None
    norms = data.leaf_norms[np.isfinite(data.leaf_norms).all(axis=1)]
    largest = norms.max(axis=1, keepdims=True, initial=0)
    norms = norms[largest[:, 0] > 0] / largest[largest[:, 0] > 0]
    return norms**2 / np.sum(norms**2, axis=1, keepdims=True)


def _padded(values: np.ndarray, count: int) -> np.ndarray:
    """Values in rows of a block each, the last filled up with NaN."""
    padding = np.full(count * BLOCK - len(values), np.nan)
    return np.concatenate([values, padding]).reshape(count, BLOCK)
