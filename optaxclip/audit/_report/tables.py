"""The tables of a report: events, parameters, run details, differences of runs."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.events import Event, largest_events, nonfinite_events

EVENTS = 20  # rows of a table of events, at most
PARAMETERS = 10  # rows of the table of parameters, at most


class Table(NamedTuple):
    """A table; its first column heads the rows, and may be steps to go to."""

    id: str
    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    texts: tuple[int, ...] = ()  # columns, besides the first, that hold no numbers
    goes_to_steps: bool = False


def events(suffix: str, data: LogData) -> Iterator[Table]:
    """The tables of steps that stand out, as far as there are such steps."""
    header = (
        "step",
        "norm",
        "threshold",
        "scale",
        "times usual",
        "loss",
        "what happened",
    )
    bad = nonfinite_events(data, EVENTS)
    total = int(np.sum(~np.isfinite(data.norm)))
    shown = f": the first {EVENTS} of {total:,}" if len(bad) < total else ""
    for name, caption, leaf, found in [
        (
            "largest",
            "The steps that stand out most, and the one with the largest norm. “Times "
            "usual” compares a norm with the median of the "
            f"{stats.AROUND} norms before it or after it, whichever is larger. The "
            f"first {stats.FEWEST} norms have no past to compare with.",
            "largest parameter",
            largest_events(data, EVENTS),
        ),
        (
            "nonfinite",
            f"Steps with a norm of NaN or infinity{shown}.",
            "NaN or infinity in",
            bad,
        ),
    ]:
        # Of steps that hardly stand out, five are enough.
        top = max((e.norm for e in found if np.isfinite(e.norm)), default=0)
        found = [
            e
            for i, e in enumerate(found)
            if i < 5 or not e.times_usual < 2 or e.norm == top
        ]
        if found:
            head = header if data.leaf_norms is None else (*header, leaf)
            rows = [_event(event)[: len(head)] for event in found]
            yield Table(name + suffix, caption, head, rows, (6, 7), True)


def _event(event: Event) -> tuple[str, ...]:
    numbers = map(text.number, (event.norm, event.threshold, event.scale))
    times = "-" if np.isnan(event.times_usual) else text.number(event.times_usual)
    loss = "-" if np.isnan(event.loss) else text.number(event.loss)
    return str(event.step), *numbers, times, loss, event.action, event.leaf or "-"


def parameters(data: LogData) -> list[Table]:
    """Which parameters the norm is made of; nothing if their norms are not known."""
    shares = stats.leaf_shares(data)
    if shares is None or not len(shares):
        return []
    medians = np.median(shares, axis=0)
    leads = np.bincount(np.argmax(shares, axis=1), minlength=shares.shape[1])
    leads = leads / len(shares)
    rows = [
        (data.leaf_names[i], text.share(float(medians[i])), text.share(float(leads[i])))
        for i in np.argsort(-medians, kind="stable")[:PARAMETERS]
    ]
    caption = (
        "What the norm is made of: the median share of each parameter in the squared "
        "norm, and in how many of the steps it was the largest."
    )
    header = ("parameter", "median share", "largest in")
    return [Table("parameters", caption, header, rows)]


def record(data: LogData) -> list[Table]:
    """The numbers of a run, its parameters, and what its log says about it."""
    numbers, settings = _numbers(data).items(), _settings(data.metadata).items()
    said = "What the log says about the run."
    if "resumed" in data.metadata:
        said += " Of each restart (resumed), only what was different."
    return [
        Table("numbers", "The run in numbers.", ("what", "value"), [*numbers], (1,)),
        *parameters(data),
        Table("settings", said, ("entry", "value"), [*settings], (1,)),
    ]


def _numbers(data: LogData) -> dict[str, str]:
    s = stats.statistics(data)
    losses = data.loss[np.isfinite(data.loss)]
    restarts = len(data.restarts)
    return {
        "steps": f"{s.steps:,} ({s.first_step} to {s.last_step})",
        "steps missed": f"{data.missing:,} ({text.gaps(data.missed, EVENTS)})"
        if data.missed
        else "0",
        "restarts": f"{restarts:,} ({text.steps(data.restarts)})" if restarts else "0",
        "steps run again": f"{data.rewritten:,}",
        "torn lines dropped": f"{data.torn:,}",
        "unsure before step": f"{data.unsure_before:,}",
        "clipped": f"{s.clipped:,} ({text.share(s.clipped_share)})",
        "skipped": f"{s.skipped:,} ({text.share(s.skipped / s.steps)})",
        "NaN or infinity": f"{s.nonfinite:,}",
        "spikes": f"{s.spikes:,}",
        "scale, mean": text.number(s.mean_scale),
        "norm, median": text.number(s.median_norm),
        "norm, 95th percentile": text.number(s.p95_norm),
        "norm, 99th percentile": text.number(s.p99_norm),
        "norm, largest": f"{text.number(s.largest_norm)} at step {s.largest_norm_step}",
        "threshold, median": text.number(s.median_threshold),
        "loss, median of the last tenth": text.number(
            float(np.median(losses[-max(len(losses) // 10, 1) :]))
            if len(losses)
            else np.nan
        ),
    }


def differences(runs: Mapping[str, LogData]) -> Table:
    """What differs between runs: numbers of all, and entries that are not the same."""
    columns = [_numbers(data) | _settings(data.metadata) for data in runs.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    # Names of parameters are long, restarts of one run have no counterpart, and no two
    # runs start at the same time.
    names = [
        n for n in names if not n.startswith(("leaf_names", "resumed ", "started"))
    ]
    rows = [(name, *(column.get(name, "-") for column in columns)) for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    same = len(names) - len(rows)
    caption = f"What differs between the runs; {same:,} other entries of the logs are "
    caption += "identical."
    texts = tuple(range(1, len(runs) + 1))
    return Table("differences", caption, ("what", *runs), rows, texts)


def _settings(metadata: dict[str, Any]) -> dict[str, str]:
    """Every entry of the first line; of those of a restart, the ones that differ."""
    first = {key: value for key, value in metadata.items() if key != "resumed"}
    settings, resumed = dict(_flat(first)), metadata.get("resumed", [])
    if not isinstance(resumed, list) or not all(isinstance(x, dict) for x in resumed):
        return dict(_flat(metadata))
    for number, later in enumerate(resumed, 1):
        settings |= {
            f"resumed {number}: {name}": value
            for name, value in _flat(later)
            if settings.get(name) != value
        }
    return settings


def _flat(metadata: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every entry with its text; a dict within counts as entries of its own."""
    for key, value in metadata.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}: ")
        elif isinstance(value, list) and all(isinstance(x, str) for x in value):
            yield name, ", ".join(value)
        else:
            is_text = isinstance(value, str)
            yield name, value if is_text else json.dumps(value, default=str)
