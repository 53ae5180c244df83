"""The texts of a log that others wrote, as a person may see them; names of runs."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from optaxclip.audit._log import LogData
from optaxclip.audit._text import shown

_ENTRY = 2000  # characters of an entry of the metadata, a transform for instance


def with_shown_names(data: LogData) -> LogData:
    """A log for display: names in it print and are of a bounded length."""
    names = tuple(map(shown, data.leaf_names))
    metadata = {shown(key): _shown(data.metadata[key]) for key in data.metadata}
    if names == data.leaf_names and metadata == data.metadata:
        return data  # of which statistics may be known
    return dataclasses.replace(data, leaf_names=names, metadata=metadata)


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {shown(key): _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shown(x) if isinstance(x, str) else _shown(x) for x in value]
    return shown(value, _ENTRY) if isinstance(value, str) else value


def run_names(logs: list[Any]) -> dict[str, Any]:
    """Logs by the shortest end of their paths that tells them apart."""
    paths = [None if isinstance(log, LogData) else Path(os.fspath(log)) for log in logs]
    parts = [(f"run {i}",) if p is None else p.parts for i, p in enumerate(paths, 1)]
    parts = [(*names[:-1], Path(names[-1]).stem) for names in parts]
    for count in range(1, max(map(len, parts), default=0) + 1):
        ends = ["/".join(names[-count:]) for names in parts]
        if len(set(ends)) == len(logs):
            return dict(zip(ends, logs, strict=True))
    return {f"run {i}": log for i, log in enumerate(logs, 1)}
