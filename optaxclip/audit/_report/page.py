"""What stands on the page of a report, as its template takes it."""

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2

import optaxclip
from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report import stills
from optaxclip.audit._report.payload import payload
from optaxclip.audit._report.summary import summary
from optaxclip.audit._report.tables import Table, differences, events, record
from optaxclip.audit._what_if import HEADER, advice, cells, outcome

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
        differences=None if alone else differences(runs),
        alternatives=_alternatives(alone) if alone else None,
        record=record(alone) if alone else [],
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
        "events": list(events(f"-{number}" if number else "", data)),
    }


def _alternatives(data: LogData) -> dict[str, Any]:
    try:
        suggestions, outcomes = advice(data, ALTERNATIVES)
    except ValueError:  # of norms that cannot be replayed either
        return {"table": None, "suggestions": None}
    recorded = outcome("as recorded", data.norm, data.scale, data.clipped)
    rows = [cells(row) for row in (recorded, *outcomes)]
    table = Table("replays", REPLAYED, HEADER, rows)
    return {"table": table, "suggestions": suggestions}
