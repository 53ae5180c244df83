"""The summary of a log in words: what stands out, with its steps."""

import os
from typing import NamedTuple

import numpy as np

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData, read
from optaxclip.audit._report import bad_steps, bounds, outliers
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.finding import Finding, at, capital
from optaxclip.audit._report.names import with_shown_names

CHECKS = (  # of the same level, the first comes first
    bad_steps.reached_the_optimizer,
    bad_steps.zero,
    bad_steps.skipping,
    bad_steps.wasted,
    outliers.spikes,
    bad_steps.skipped,
    outliers.dominating_leaf,
    bounds.over_clipping,
    bounds.under_clipping,
    bounds.rise,
    bounds.out_of_reach,
    bad_steps.loss,
)


RAMP = 100  # steps, over which the default rises to its threshold


class Summary(NamedTuple):
    """What :func:`summary` says of a run; as a text it reads line by line."""

    headline: str  # the run in numbers, two or three sentences
    findings: tuple[Finding, ...]  # what stands out, problems first
    statistics: stats.Statistics | None  # None of a log without steps

    def __str__(self) -> str:
        lines = [f"[{f.level}] {f.title}. {f.detail}" for f in self.findings]
        return "\n".join([self.headline, *lines])

    def __repr__(self) -> str:
        return str(self)


def summary(log: LogData | str | os.PathLike[str]) -> Summary:
    """Says what stands out in a run: spikes, NaN, a threshold out of reach, and so on.

    Args:
      log: A log, as a path or as :func:`optaxclip.audit.read` returns it.

    Returns:
      :class:`Summary`: print it, or go through its ``findings``. Of a log without
      steps it says so, and has no findings.

    Raises:
      ValueError: the file is no log, see :func:`optaxclip.audit.read`.
      OSError: it cannot be read.

    Example:
      >>> import numpy as np
      >>> from optaxclip.audit import LogData, summary
      >>> norm, flags = np.where(np.arange(60) == 40, 90.0, 1.0), np.zeros(60, bool)
      >>> bound, scale = np.full(60, 2.0), np.minimum(1, 2 / norm)
      >>> data = LogData({}, np.arange(60), norm, bound, scale, norm, scale < 1, flags)
      >>> for finding in summary(data).findings:
      ...     print(finding.level, "-", finding.title, finding.steps)
      notice - 1 spike, clipped (40,)
    """
    data = read(log)
    if not len(data.step):
        return Summary("No steps yet.", (), None)
    data = with_shown_names(data)
    found = [finding for check in CHECKS if (finding := check(data))]
    order = ["problem", "notice"]
    found.sort(key=lambda finding: order.index(finding.level))
    # A run whose record has gaps, or that was restarted, may be healthy.
    healthy = [] if found else [_healthy(data)]
    every = tuple(found + _record(data) + healthy)
    return Summary(_headline(data), every, stats.statistics(data))


def _headline(data: LogData) -> str:
    s = stats.statistics(data)
    scope = f"{text.count(s.steps, 'step')} ({s.first_step} to {s.last_step})"
    counts = (
        f"{scope}: {text.share(s.clipped_share)} clipped{_after_the_ramp(data)}, "
        f"{s.skipped:,} skipped, {s.nonfinite:,} with a NaN or infinite norm."
    )
    if s.nonfinite == s.steps:
        return counts
    rest = "Of the other steps, the" if s.nonfinite else "The"
    early = data.step[np.isfinite(data.norm)][: stats.FEWEST]
    unjudged = ""
    if s.largest_norm_step in early and s.largest_norm >= stats.SPIKE * s.median_norm:
        unjudged = f" (the first {stats.FEWEST} norms never count as spikes)"
    return (
        f"{counts} {rest} median norm was {text.number(s.median_norm)}, the 95th "
        f"percentile {text.number(s.p95_norm)}, and the largest "
        f"{text.number(s.largest_norm)}, at step {s.largest_norm_step}{unjudged}."
        f"{_mean_scale(data)}"
    )


def _after_the_ramp(data: LogData) -> str:
    """The share of clipped steps after the start, where an adaptive clip has many."""
    start, rest = np.split(stats.clipped(data), [RAMP])
    if not stats.moves(data) or len(rest) < RAMP or start.mean() < 2 * rest.mean():
        return ""
    return f" ({text.share(float(rest.mean()))} after step {data.step[RAMP - 1]})"


def _mean_scale(data: LogData) -> str:
    if not np.isfinite(data.threshold).any():
        return ""
    scale = text.number(stats.statistics(data).mean_scale)
    return f" On average the clip multiplied the norm by {scale} (the scale)."


def _healthy(data: LogData) -> Finding:
    s = stats.statistics(data)
    detail = (
        f"Every norm was finite, and none after the first {stats.FEWEST} was a spike. "
        f"Of {text.count(s.steps, 'step')}, {s.clipped:,} "
        f"{'was' if s.clipped == 1 else 'were'} clipped and {s.skipped:,} skipped."
    )
    if s.steps < 2 * stats.FEWEST:
        detail += " That is too few steps to say more."
        return Finding("fine", "Nothing stands out yet", detail)
    if not s.clipped and np.isfinite(s.median_threshold):
        detail += (
            f" The clip never acted: the largest norm was {text.number(s.largest_norm)}"
            f", the median threshold {text.number(s.median_threshold)}."
        )
    return Finding("fine", "Nothing stands out in the norms", detail)


def _record(data: LogData) -> list[Finding]:
    parts = []
    if data.missed:
        lost = text.count(data.missing, "step")
        parts.append(f"{lost} missing: {text.gaps(data.missed)}")
    if data.unsure_before:
        parts.append(
            f"rows of steps before {data.unsure_before} may belong to a part of the "
            "run that was repeated from a checkpoint"
        )
    title = "The record is not complete" if parts else _restarted(data)
    if data.restarts:
        parts.append(f"restarted at {text.steps(data.restarts)}")
    if data.rewritten:
        parts.append(
            f"{text.count(data.rewritten, 'step')} run again from a checkpoint; the "
            "log keeps the later version"
        )
    if data.torn:
        parts.append(f"{text.count(data.torn, 'torn line')} dropped")
    if not title and not parts:
        return []
    detail = f"{capital('; '.join(parts) or 'no step is missing')}."
    steps = at([first for first, _ in data.missed] or data.restarts)
    return [Finding("notice", title or "The log was repaired", detail, steps)]


def _restarted(data: LogData) -> str:
    resumed = data.metadata.get("resumed")
    times = len(resumed) if isinstance(resumed, list) else 0
    if times:
        how = {1: "once", 2: "twice"}.get(times, f"{times:,} times")
        return f"The run was restarted {how}"
    return "The run went back to an earlier step" if data.rewritten else ""
