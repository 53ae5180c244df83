"""The summary of a log in words: what stands out, with its steps."""

import collections
from typing import NamedTuple

import numpy as np

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.names import with_shown_names
from optaxclip.audit._what_if import longest_streak

OVER = 0.5  # share of steps clipped, from which on a clip is a normaliser
STRETCH = 0.8  # share of the steps of a block, from which on it counts as clipped
HEADROOM = 10.0  # threshold over median norm, from which on it is out of reach
DRIFT = 2.0  # factor between the first and the last tenth of a run
DOMINANT = 0.5  # share of the squared norm


class Finding(NamedTuple):
    """Something to know about a run."""

    level: str  # "problem", "notice" or "fine"
    title: str
    detail: str


def findings(data: LogData) -> list[Finding]:
    """What stands out in a log, problems first; ValueError if it has no steps."""
    stats.statistics(data)
    data = with_shown_names(data)
    checks = [
        _nonfinite,
        _zero,
        _skipping,
        _over_clipping,
        _under_clipping,
        _spikes,
        _drift,
        _dominating_leaf,
        _loss,
        _record,
    ]
    found = [finding for check in checks if (finding := check(data))]
    order = ["problem", "notice", "fine"]
    found.sort(key=lambda finding: order.index(finding.level))
    return found or [Finding("fine", "Nothing stands out", "No check found anything.")]


def headline(data: LogData) -> str:
    """The run in a sentence or two."""
    s = stats.statistics(data)
    scope = f"{text.count(s.steps, 'step')} ({s.first_step} to {s.last_step})"
    counts = (
        f"{scope}: {text.share(s.clipped_share)} clipped, "
        f"{s.skipped:,} skipped, {s.nonfinite:,} not finite."
    )
    if s.nonfinite == s.steps:
        return counts
    return (
        f"{counts} Norm: median {text.number(s.median_norm)}, 95 % below "
        f"{text.number(s.p95_norm)}, largest {text.number(s.largest_norm)} at step "
        f"{s.largest_norm_step}. Mean scale {s.mean_scale:.3f}."
    )


def summary_text(data: LogData) -> str:
    """The summary of a log as plain text: a headline, then a line a finding.

    Args:
      data: A log, as :func:`optaxclip.audit.read` returns it. With no steps yet, the
        summary says so.

    Returns:
      Lines of text, problems before notices.
    """
    if not len(data.step):
        return "No steps yet."
    lines = [f"[{f.level}] {f.title}. {f.detail}" for f in findings(data)]
    return "\n".join([headline(data), *lines])


def _nonfinite(data: LogData) -> Finding | None:
    bad = ~np.isfinite(data.norm)
    if not bad.any():
        return None
    passed = bad & ~data.skipped
    title = f"{text.count(int(bad.sum()), 'step')} with a norm of NaN or infinity"
    where = text.steps(data.step[bad]).capitalize()
    if not passed.any():
        all_of_them = "It was" if bad.sum() == 1 else "All were"
        return Finding("notice", title, f"{where}. {all_of_them} skipped.")
    detail = (
        f"{where}. {int(passed.sum()):,} of them went on to the optimizer, first step "
        f"{data.step[passed][0]}: wrap it in skip_nonfinite."
    )
    return Finding("problem", title, detail)


def _zero(data: LogData) -> Finding | None:
    if stats.statistics(data).largest_norm != 0:
        return None
    detail = "Nothing was learnt: no gradient reached the clip."
    return Finding("problem", "Every norm was 0", detail)


def _skipping(data: LogData) -> Finding | None:
    start, length = longest_streak(data.skipped)
    if length < 10:
        return None
    detail = (
        f"From step {data.step[start]} to {data.step[start + length - 1]} nothing was "
        "learnt. A run that skips this long rarely comes back by itself."
    )
    return Finding("problem", f"{length:,} steps skipped in a row", detail)


def _over_clipping(data: LogData) -> Finding | None:
    s = stats.statistics(data)
    if s.clipped_share >= OVER:
        detail = (
            f"{text.share(s.clipped_share)} of the steps, with a mean scale of "
            f"{s.mean_scale:.3f}: a normaliser more than a guard against spikes. With "
            "SGD it lowers the learning rate by that factor."
        )
        return Finding("problem", "Over-clipping: most steps are clipped", detail)
    shares = np.add.reduceat(
        stats.clipped(data), np.arange(0, s.steps, stats.BLOCK), dtype=float
    )
    sizes = np.diff(np.append(np.arange(0, s.steps, stats.BLOCK), s.steps))
    start, length = longest_streak((shares >= STRETCH * sizes) & (sizes == stats.BLOCK))
    if not length:
        return None
    rows = slice(start * stats.BLOCK, (start + length) * stats.BLOCK)
    detail = (
        f"{text.share(float(stats.clipped(data)[rows].mean()))} of the steps from "
        f"{data.step[rows][0]} to {data.step[rows][-1]} were clipped, against "
        f"{text.share(s.clipped_share)} of the run."
    )
    return Finding("notice", "A stretch of over-clipping", detail)


def _under_clipping(data: LogData) -> Finding | None:
    s = stats.statistics(data)
    if not np.isfinite(data.threshold).any():
        detail = "The threshold was infinite throughout: the run was only measured."
        return Finding("notice", "Nothing was bounded", detail)
    if not s.largest_norm or s.clipped:
        return None
    if not s.median_threshold > HEADROOM * s.median_norm:
        return None
    above_median = s.median_threshold / s.median_norm if s.median_norm else np.inf
    detail = (
        f"No step was clipped: the threshold, {text.number(s.median_threshold)} in the "
        f"median, is {text.number(above_median)} times the median norm and "
        f"{text.number(s.median_threshold / s.largest_norm)} times the largest. A "
        "spike would pass."
    )
    return Finding("notice", "Under-clipping: the threshold is out of reach", detail)


def _spikes(data: LogData) -> Finding | None:
    rows = stats.spikes(data)
    if not len(rows):
        return None
    usual = stats.usual_norm(data)[rows]
    times = data.norm[rows] / usual
    after = data.norm[rows] * data.scale[rows] / usual
    passed = (after >= stats.SPIKE) & ~data.skipped[rows]
    worst = int(np.argmax(times))
    detail = (
        f"Norms at least {stats.SPIKE:g} times the usual of their time: "
        f"{text.steps(data.step[rows])}. The largest, {text.number(times[worst])} "
        f"times the usual, is at step {data.step[rows[worst]]}. "
    )
    title = text.count(len(rows), "spike")
    if not passed.any():
        return Finding("notice", title, detail + "All were clipped or skipped.")
    detail += (
        f"{text.count(int(passed.sum()), 'spike')} still exceeded "
        f"{stats.SPIKE:g} times the usual after the clip: "
        f"{text.steps(data.step[rows][passed])}."
    )
    return Finding("problem", f"{title}, not all held", detail)


def _drift(data: LogData) -> Finding | None:
    known = np.isfinite(data.threshold) & np.isfinite(data.norm)
    tenth = int(known.sum()) // 10
    if tenth < 10:
        return None
    early, late = np.flatnonzero(known)[:tenth], np.flatnonzero(known)[-tenth:]
    bounds = [float(np.median(data.threshold[rows])) for rows in (early, late)]
    norms = [float(np.median(data.norm[rows])) for rows in (early, late)]
    moved = (
        f"from {text.number(bounds[0])} (median of steps {data.step[early[0]]} to "
        f"{data.step[early[-1]]}) to {text.number(bounds[1])} (steps "
        f"{data.step[late[0]]} to {data.step[late[-1]]})"
    )
    norm_moved = f"from {text.number(norms[0])} to {text.number(norms[1])}"
    if _factor(*bounds) >= DRIFT:
        detail = f"It went {moved}; the median norm went {norm_moved}."
        return Finding("notice", "The threshold drifts", detail)
    if _factor(*norms) >= DRIFT:
        detail = f"They went {norm_moved} while the threshold went {moved}."
        return Finding("notice", "The norms drift away from the threshold", detail)
    return None


def _factor(a: float, b: float) -> float:
    low, high = sorted([a, b])
    return high / low if low > 0 else np.inf if high > 0 else 1.0


def _dominating_leaf(data: LogData) -> Finding | None:
    shares = stats.leaf_shares(data)
    if shares is None or shares.shape[1] < 3 or not len(shares):
        return None
    often = np.mean(shares > DOMINANT, axis=0)
    leaf = int(np.argmax(often))
    if often[leaf] >= 0.5:
        detail = (
            f"{data.leaf_names[leaf]} holds more than half of the squared norm in "
            f"{text.share(float(often[leaf]))} of the steps: the clip of the global "
            "norm follows this leaf. Clip it by itself, or every leaf."
        )
        return Finding("notice", "One leaf dominates", detail)
    leaders = [stats.dominating_leaf(data, row) for row in stats.spikes(data)]
    if len(leaders) < 3:
        return None
    leader, times = collections.Counter(leaders).most_common(1)[0]
    if not leader or times < len(leaders) / 2:
        return None
    detail = f"{leader} has the largest norm in {times:,} of them."
    return Finding("notice", f"One leaf leads in {len(leaders):,} spikes", detail)


def _loss(data: LogData) -> Finding | None:
    infinite = np.isinf(data.loss)
    if not infinite.any():
        return None
    where = text.steps(data.step[infinite]).capitalize()
    return Finding("notice", "The loss was infinite", f"{where}.")


def _record(data: LogData) -> Finding | None:
    parts = []
    if data.missed:
        lost = sum(last - first + 1 for first, last in data.missed)
        gaps = ", ".join(f"{first} to {last}" for first, last in data.missed[:3])
        more = " and more" if len(data.missed) > 3 else ""
        parts.append(f"{text.count(lost, 'step')} missing: {gaps}{more}")
    if data.rewritten:
        parts.append(
            f"{text.count(data.rewritten, 'row')} written again after a resume"
        )
    if data.torn:
        parts.append(f"{text.count(data.torn, 'torn line')} dropped")
    if data.unsure_before:
        parts.append(
            f"steps before {data.unsure_before} may be of a run that was taken back"
        )
    if not parts:
        return None
    return Finding("notice", "The record is not complete", f"{'; '.join(parts)}.")
