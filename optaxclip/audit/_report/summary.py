"""The summary of a log in words: what stands out, with its steps."""

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import bad_steps, bounds, outliers
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.finding import Finding, capital
from optaxclip.audit._report.names import with_shown_names

CHECKS = (  # of the same level, the first comes first
    bad_steps.reached_the_optimizer,
    bad_steps.zero,
    bad_steps.skipping,
    bad_steps.wasted,
    outliers.spikes,
    bad_steps.skipped,
    bounds.over_clipping,
    bounds.under_clipping,
    bounds.rise,
    bounds.out_of_reach,
    outliers.dominating_leaf,
    bad_steps.loss,
)


def findings(data: LogData) -> list[Finding]:
    """What stands out in a log, problems first; ValueError if it has no steps."""
    stats.statistics(data)
    data = with_shown_names(data)
    found = [finding for check in CHECKS if (finding := check(data))]
    order = ["problem", "notice"]
    found.sort(key=lambda finding: order.index(finding.level))
    # A run whose record has gaps, or that was restarted, may be healthy.
    healthy = [] if found else [_healthy(data)]
    return found + _record(data) + healthy


def headline(data: LogData) -> str:
    """The run in numbers, a sentence or two."""
    s = stats.statistics(data)
    scope = f"{text.count(s.steps, 'step')} ({s.first_step} to {s.last_step})"
    counts = (
        f"{scope}: {text.share(s.clipped_share)} clipped, {s.skipped:,} skipped, "
        f"{s.nonfinite:,} with a norm of NaN or infinity."
    )
    if s.nonfinite == s.steps:
        return counts
    return (
        f"{counts} Median norm {text.number(s.median_norm)}, 95th percentile "
        f"{text.number(s.p95_norm)}, largest {text.number(s.largest_norm)} at step "
        f"{s.largest_norm_step}. Mean scale {text.number(s.mean_scale)}."
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


def _healthy(data: LogData) -> Finding:
    s = stats.statistics(data)
    detail = (
        "Every norm was finite and none was a spike. "
        f"Of {text.count(s.steps, 'step')}, {s.clipped:,} "
        f"{'was' if s.clipped == 1 else 'were'} clipped and {s.skipped:,} skipped."
    )
    if s.steps < 2 * stats.FEWEST:
        detail += " So few steps tell little."
        return Finding("fine", "Nothing stands out yet", detail)
    return Finding("fine", "The run looks healthy", detail)


def _record(data: LogData) -> list[Finding]:
    parts = []
    if data.missed:
        lost = sum(last - first + 1 for first, last in data.missed)
        gaps = ", ".join(f"{first} to {last}" for first, last in data.missed[:3])
        more = " and more" if len(data.missed) > 3 else ""
        parts.append(f"{text.count(lost, 'step')} missing: {gaps}{more}")
    if data.unsure_before:
        parts.append(
            f"steps before {data.unsure_before} may be of a run that was taken back"
        )
    title = "The record is not complete" if parts else _restarted(data)
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
    return [Finding("notice", title or "The log was repaired", detail)]


def _restarted(data: LogData) -> str:
    resumed = data.metadata.get("resumed")
    times = len(resumed) if isinstance(resumed, list) else 0
    if times:
        how = {1: "once", 2: "twice"}.get(times, f"{times:,} times")
        return f"The run was restarted {how}"
    return "The run went back to an earlier step" if data.rewritten else ""
