"""What stands on the page of a report, as its template takes it."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, NamedTuple

import jinja2
import numpy as np

import optaxclip
from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report import stills
from optaxclip.audit._report.payload import payload
from optaxclip.audit._report.summary import summary
from optaxclip.audit._what_if import HEADER, advice, cells, outcome

EVENTS = 20  # rows of a table of events, at most
ALTERNATIVES = {
    "twice the median of 100": "quantile:0.5,100*2",
    "z-score, as in ZClip": "zscore",
}
REPLAYED = (
    "What other rules would have done with the norms of this run. Steps with a norm of "
    "NaN or infinity are left out. The last column: if all norms doubled, after how "
    "many steps would the rule clip as it did before?"
)
FILES = resources.files("optaxclip.audit._report")
SCRIPTS = ("vendor/uPlot.iife.min.js", "page.js")


class Table(NamedTuple):
    """A table; its first column heads the rows, and may be steps to go to."""

    id: str
    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    texts: tuple[int, ...] = ()  # columns, besides the first, that hold no numbers
    goes_to_steps: bool = False


def page(runs: Mapping[str, LogData], title: str, refresh: float | None = None) -> str:
    """The page of one run, of which the name is empty, or of several by name."""
    # Everything that is put in is escaped; what does not print is shown as an escape.
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(_source),
        finalize=lambda x: text.printable(x, "\n") if type(x) is str else x,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    runs = {text.shown(name): data for name, data in runs.items()}
    alone = next(iter(runs.values())) if len(runs) == 1 else None
    scripts, style = [_source(name) for name in SCRIPTS], _source("page.css")
    return environment.get_template("page.html.jinja").render(
        title=text.shown(title, 500),
        version=optaxclip.__version__,
        scripts=scripts,
        script_hashes=[_hash(script) for script in scripts],
        style=_source("vendor/uPlot.min.css") + style,
        runs=[_run(i, name, data) for i, (name, data) in enumerate(runs.items())],
        lead=_lead(alone.metadata) if alone else [],
        still=stills.image(runs),
        payload={
            "runs": [payload(data, name) for name, data in runs.items()],
            "refresh": refresh,
        },
        scaled_leaves=any(map(stats.leaves_are_scaled, runs.values())),
        differences=None if alone else _differences(runs),
        alternatives=_alternatives(alone) if alone else None,
        record=_record(alone) if alone else [],
    )


def _source(name: str) -> str:
    return FILES.joinpath(name).read_text(encoding="utf-8").strip()


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _lead(metadata: dict[str, Any]) -> list[str]:
    count, device = metadata.get("parameter_count"), metadata.get("device")
    parts = {
        "started": metadata.get("started"),
        "transform": metadata.get("transform"),
        "model size": f"{count:,} parameters" if type(count) is int else count,
        "device": device.get("kind") if isinstance(device, dict) else device,
    }
    return [f"{name}: {value}" for name, value in parts.items() if value]


def _run(number: int, name: str, data: LogData) -> dict[str, Any]:
    said = summary(data)
    return {
        "name": name,
        "headline": said.headline,
        "findings": said.findings,
        "events": list(_events(f"-{number}" if number else "", data)),
    }


def _events(suffix: str, data: LogData) -> Iterator[Table]:
    header = (
        "step",
        "norm",
        "threshold",
        "scale",
        "times usual",
        "loss",
        "what happened",
    )
    bad = stats.nonfinite_events(data, EVENTS)
    total = int(np.sum(~np.isfinite(data.norm)))
    shown = f": the first {EVENTS} of {total:,}" if len(bad) < total else ""
    for name, caption, leaf, events in [
        (
            "largest",
            "The steps that stand out most, and the one with the largest norm. “Times "
            "usual” compares a norm with the median of the "
            f"{stats.AROUND} norms before it or after it, whichever is larger. The "
            f"first {stats.FEWEST} norms have no past to compare with.",
            "largest parameter",
            stats.largest_events(data, EVENTS),
        ),
        (
            "nonfinite",
            f"Steps with a norm of NaN or infinity{shown}.",
            "NaN or infinity in",
            bad,
        ),
    ]:
        # Of steps that hardly stand out, five are enough.
        top = max((e.norm for e in events if np.isfinite(e.norm)), default=0)
        events = [
            e
            for i, e in enumerate(events)
            if i < 5 or not e.times_usual < 2 or e.norm == top
        ]
        if events:
            head = header if data.leaf_norms is None else (*header, leaf)
            rows = [_event(event)[: len(head)] for event in events]
            yield Table(name + suffix, caption, head, rows, (6, 7), True)


def _event(event: stats.Event) -> tuple[str, ...]:
    numbers = map(text.number, (event.norm, event.threshold, event.scale))
    times = "-" if np.isnan(event.times_usual) else text.number(event.times_usual)
    loss = "-" if np.isnan(event.loss) else text.number(event.loss)
    return str(event.step), *numbers, times, loss, event.action, event.leaf or "-"


def _alternatives(data: LogData) -> dict[str, Any]:
    try:
        suggestions, outcomes = advice(data, ALTERNATIVES)
    except ValueError:  # of norms that cannot be replayed either
        return {"table": None, "suggestions": None}
    recorded = outcome("as recorded", data.norm, data.scale, data.clipped)
    rows = [cells(row) for row in (recorded, *outcomes)]
    table = Table("replays", REPLAYED, HEADER, rows)
    return {"table": table, "suggestions": suggestions}


def _record(data: LogData) -> list[Table]:
    numbers, settings = _numbers(data).items(), _settings(data.metadata).items()
    said = "What the log says about the run."
    if "resumed" in data.metadata:
        said += " Of each restart (resumed), only what was different."
    return [
        Table("numbers", "The run in numbers.", ("what", "value"), [*numbers], (1,)),
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


def _differences(runs: Mapping[str, LogData]) -> Table:
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
