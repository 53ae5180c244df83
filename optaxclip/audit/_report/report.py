"""The report: one page about a run, which needs nothing but itself."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

import optaxclip
from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import page, summary
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.names import with_shown_names
from optaxclip.audit._report.page import escape
from optaxclip.audit._what_if import (
    HEADER,
    Suggestions,
    cells,
    compare,
    optimizer_of,
    outcome,
    parse_rule,
    suggest,
)

EVENTS = 20  # rows of a table of events, at most
NOTHING = (
    "No norm was finite and above 0, or one was below 0: there is nothing to go by."
)
ALTERNATIVES = {
    "twice the median of 100": "quantile:0.5,100*2",
    "z-score, as in ZClip": "zscore",
}


def report(data: LogData, path: str | Path, *, title: str | None = None) -> Path:
    """Writes a page about a run: a summary in words, then plots, then tables.

    The page is one HTML file that loads nothing from anywhere and runs no script. It
    reads well on a phone and on paper. It replaces what stood at ``path`` in one go, so
    that a reader never sees half of it.

    Args:
      data: A log, as :func:`optaxclip.audit.read` returns it.
      path: The file. Folders that are missing are made.
      title: The heading, "Gradient clipping report" if not given.

    Returns:
      The path.

    Raises:
      ValueError: the log has no steps.
      OSError: the path cannot be written.
      ImportError: matplotlib is not installed.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from optaxclip.audit import LogData, report
      >>> norm = np.random.default_rng(0).lognormal(sigma=0.5, size=300)
      >>> scale = np.minimum(1, 2 / norm)
      >>> data = LogData(
      ...     metadata={},
      ...     step=np.arange(300),
      ...     norm=norm,
      ...     threshold=np.full(300, 2.0),
      ...     scale=scale,
      ...     loss=np.full(300, np.nan),
      ...     clipped=scale < 1,
      ...     skipped=np.zeros(300, bool),
      ... )
      >>> path = report(data, pathlib.Path(tempfile.mkdtemp(), "report.html"))
      >>> print(path.name, path.read_text().count("<figure>"), "figures")
      report.html 3 figures
    """
    if not len(data.step):
        raise ValueError("`report(data=...)` must hold a step, the log has none yet.")
    try:
        from optaxclip.audit._report.pictures import (
            pictures,  # the log needs no matplotlib
        )
    except ImportError as error:
        raise ImportError(
            "`report()` needs matplotlib: install optaxclip[audit]."
        ) from error
    data = with_shown_names(data)
    suggestions = _suggestions(data)
    sections = [
        page.Section("summary", "Summary", _summary(data)),
        page.Section("plots", "Plots", pictures(data)),
        page.Section("events", "Events", _events(data)),
        page.Section("alternatives", "Alternatives", _replays(data, suggestions)),
        page.Section("suggestions", "Suggestions", _advice(suggestions)),
        page.Section("record", "For the record", _record(data)),
    ]
    html = page.document(
        text.shown(title or "Gradient clipping report", 500),
        _lead(data.metadata),
        sections,
        f"Written by optaxclip {optaxclip.__version__}.",
    )
    return _written(Path(path), html)


def _written(path: Path, html: str) -> Path:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(html, encoding="utf-8")
            draft.replace(path)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
    except OSError as error:
        reason = f"`report(path=...)` cannot be written: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from error
    return path


def _lead(metadata: dict[str, Any]) -> str:
    count, device = metadata.get("parameter_count"), metadata.get("device")
    parts = {
        "started": metadata.get("started"),
        "transform": metadata.get("transform"),
        "model size": f"{count:,} parameters" if type(count) is int else count,
        "device": device.get("kind") if isinstance(device, dict) else device,
    }
    known = [f"{name}: {value}" for name, value in parts.items() if value]
    return page.items(known) if known else ""


def _summary(data: LogData) -> str:
    found = "\n".join(page.finding(*finding) for finding in summary.findings(data))
    return (
        f'<p class="headline">{escape(summary.headline(data))}</p>\n'
        f'<ul class="findings">\n{found}\n</ul>'
    )


def _events(data: LogData) -> str:
    header = ["step", "norm", "threshold", "scale", "times usual", "what happened"]
    bad = stats.nonfinite_events(data, EVENTS)
    total = int(np.sum(~np.isfinite(data.norm)))
    parts = []
    for name, caption, leaf, events in [
        (
            "largest",
            "The steps that stand out most: norms compared with the usual norm, the "
            f"larger of the medians of the {stats.AROUND} norms before and after. The "
            f"first {stats.FEWEST} norms have no past to compare with.",
            "largest parameter",
            stats.largest_events(data, EVENTS),
        ),
        (
            "nonfinite",
            f"Steps with a norm of NaN or infinity: {_first(len(bad), total)}.",
            "NaN or infinity in",
            bad,
        ),
    ]:
        if events:
            head = header if data.leaf_norms is None else [*header, leaf]
            rows = [_event(event, len(head)) for event in events]
            parts.append(page.table(name, caption, head, rows, texts=(5, 6)))
    return "\n".join(parts) or page.paragraph("Every norm was 0.")


def _first(shown: int, total: int) -> str:
    return f"all {total:,}" if shown == total else f"the first {shown} of {total:,}"


def _event(event: stats.Event, columns: int) -> list[str]:
    times = "-" if np.isnan(event.times_usual) else text.number(event.times_usual)
    row = [
        str(event.step),
        *map(text.number, (event.norm, event.threshold, event.scale)),
        times,
        event.action,
        event.leaf or "-",
    ]
    return row[:columns]


def _suggestions(data: LogData) -> Suggestions | None:
    try:
        return suggest(data.norm, optimizer_of(data))
    except ValueError:  # of norms that cannot be replayed either
        return None


def _replays(data: LogData, suggestions: Suggestions | None) -> str:
    if suggestions is None:
        return page.paragraph(NOTHING)
    fixed, percentile, _ = suggestions
    rules = {s.setting: s.rule for s in (fixed, percentile)} | ALTERNATIVES
    outcomes = compare({name: parse_rule(rules[name]) for name in rules}, data.norm)
    recorded = outcome("as recorded", data.norm, data.scale, data.clipped)
    caption = (
        "What other rules would have done with the norms of this run. Steps with a "
        "norm of NaN or infinity are left out. The last column: if all norms doubled, "
        "after how many steps would the rule clip as it did before?"
    )
    note = (
        "A replay uses the norms as they were recorded. Under another rule the "
        "parameters, and so the norms, would have been different. It shows how a rule "
        "handles spikes and how fast it adapts."
    )
    rows = [cells(row) for row in (recorded, *outcomes)]
    return page.table("replays", caption, HEADER, rows) + "\n" + page.paragraph(note)


def _advice(suggestions: Suggestions | None) -> str:
    if suggestions is None:
        return page.paragraph(NOTHING)
    kinds = {"A fixed threshold": suggestions.fixed, "A percentile": suggestions[1]}
    parts = [
        f"<h3>{name}</h3>\n<p><code>{escape(s.setting)}</code></p>\n"
        f"{page.paragraph(s.reason)}"
        for name, s in kinds.items()
    ]
    if suggestions.remarks:
        parts += ["<h3>Caution</h3>", page.items(suggestions.remarks)]
    return "\n".join(parts)


def _record(data: LogData) -> str:
    s = stats.statistics(data)
    lost = sum(last - first + 1 for first, last in data.missed)
    gaps = ", ".join(f"{first} to {last}" for first, last in data.missed[:EVENTS])
    more = " and more" if len(data.missed) > EVENTS else ""
    rows = {
        "steps": f"{s.steps:,} ({s.first_step} to {s.last_step})",
        "steps missed": f"{lost:,} ({gaps}{more})" if lost else "0",
        "steps run again": f"{data.rewritten:,}",
        "torn lines dropped": f"{data.torn:,}",
        "unsure before step": f"{data.unsure_before:,}",
        "clipped": f"{s.clipped:,} ({text.share(s.clipped_share)})",
        "skipped": f"{s.skipped:,} ({text.share(s.skipped / s.steps)})",
        "NaN or infinity": f"{s.nonfinite:,}",
        "spikes": f"{s.spikes:,}",
        "mean scale": text.number(s.mean_scale),
        "norm, median": text.number(s.median_norm),
        "norm, 95th percentile": text.number(s.p95_norm),
        "norm, 99th percentile": text.number(s.p99_norm),
        "norm, largest": f"{text.number(s.largest_norm)} at step {s.largest_norm_step}",
        "threshold, median": text.number(s.median_threshold),
    }
    numbers = page.table(
        "numbers", "The run in numbers.", ("what", "value"), rows.items(), texts=(1,)
    )
    settings = page.table(
        "settings",
        "What the log says about the run.",
        ("entry", "value"),
        _flat(data.metadata),
        texts=(1,),
    )
    return f'<div class="record">\n{numbers}\n{settings}\n</div>'


def _flat(metadata: dict[str, Any], prefix: str = "") -> Any:
    """Every entry with its text; a dict within counts as entries of its own."""
    for key, value in metadata.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}: ")
        elif isinstance(value, list) and all(isinstance(x, dict) for x in value):
            for number, inner in enumerate(value, 1):
                yield from _flat(inner, f"{name} {number}: ")
        elif isinstance(value, list) and all(isinstance(x, str) for x in value):
            yield name, ", ".join(value)
        else:
            is_text = isinstance(value, str)
            yield name, value if is_text else json.dumps(value, default=str)
