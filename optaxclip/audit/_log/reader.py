"""Reading a log: JSON Lines, of which the last may be torn and none other broken."""

import json
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from optaxclip.audit._log.data import LogData
from optaxclip.audit._log.head import FORMAT, HEAD

MARKERS = ("missed", "resumed", "rewound_to", "torn", "unsure_before")

# Parsed as one JSON array, twice as fast as line by line; not all at once, for memory.
_LINES_AT_ONCE = 20_000
_NO_JSON = (ValueError, RecursionError)  # the latter of thousands of brackets
_NUMBERS = ("norm", "threshold", "scale")
_BOOLS = ("clipped", "skipped")


class Parsed(NamedTuple):
    """A log and the bytes it was read from."""

    data: LogData
    end: int  # bytes of whole lines; behind them stands at most a torn one


def read(path: str | Path) -> LogData:
    r"""Reads a log that :class:`ClipLog` wrote, while it is being written too.

    A rewind takes back every row from its step on; of the rows of one step the last
    counts. Steps that have no row are ``missed``, whatever the reason.

    Args:
      path: The file.

    Returns:
      :class:`LogData`, in the order of the steps. Its ``metadata`` are the first line,
      and under ``"resumed"`` a list of what later runs wrote of themselves.

    Raises:
      ValueError: the file is empty, no log, of a newer format, or damaged: a line that
        is neither a row nor a marker and not the last. Names the line.
      OSError: there is no such file, or it cannot be read.

    Example:
      >>> import pathlib, tempfile
      >>> import optaxclip.audit
      >>> path = pathlib.Path(tempfile.mkdtemp(), "clip.jsonl")
      >>> _ = path.write_text(
      ...     '{"optaxclip_log":1,"leaf_names":[]}\n'
      ...     '{"step":0,"norm":2.0,"threshold":1.0,"scale":0.5,'
      ...     '"clipped":true,"skipped":false}\n'
      ...     '{"step":1,"norm":"nan","threshold":1.0,"sc'
      ... )
      >>> data = optaxclip.audit.read(path)
      >>> data.norm, data.clipped, data.torn
      (array([2.]), array([ True]), 1)
    """
    return parse(Path(path).read_bytes(), path).data


def parse(content: bytes, path: str | Path) -> Parsed:
    """The log in the content of a file; ``path`` is for errors."""
    lines = content.decode("latin-1").split("\n")  # a byte a character; rows are ASCII
    if not lines[-1]:
        lines.pop()
    metadata = _metadata(lines, path)
    torn = 0
    if len(lines) > 1 and not _is_json(lines[-1]):
        torn = 1
        lines.pop()
    end = min(sum(map(len, lines)) + len(lines), len(content))
    reading = _Reading(path, len(metadata.get("leaf_names") or ()))
    for first in range(1, len(lines), _LINES_AT_ONCE):
        reading.add(lines[first : first + _LINES_AT_ONCE], first + 1)
    return Parsed(reading.finish(metadata, torn), end)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except _NO_JSON:
        return False
    return True


def _refuse(path: str | Path, line: int, reason: str) -> NoReturn:
    raise ValueError(f"`read(path=...)`: {path}, line {line}: {reason}.")


def _metadata(lines: list[str], path: str | Path) -> dict[str, Any]:
    if not lines:
        _refuse(path, 1, "the file is empty")
    head = json.loads(lines[0]) if _is_json(lines[0]) else None
    if not isinstance(head, dict) or "optaxclip_log" not in head:
        _refuse(path, 1, f"this is no optaxclip log, which begins with {HEAD}")
    if head["optaxclip_log"] != FORMAT:
        found = head["optaxclip_log"]
        _refuse(path, 1, f"the log has format {found!r}, this reader knows {FORMAT}")
    names = head.get("leaf_names") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        _refuse(path, 1, f"leaf_names must be a list of strings, got {names!r:.60}")
    return head


class _Reading:
    """What was read so far."""

    def __init__(self, path: str | Path, leaves: int) -> None:
        self.path, self.leaves = path, leaves
        self.parts: list[dict[str, np.ndarray]] = []
        self.count = 0  # rows, those taken back included
        self.rewinds: list[tuple[int, int]] = []  # rows before it, and its step
        self.resumed: list[Any] = []
        self.torn = self.unsure_before = 0

    def add(self, lines: list[str], number: int) -> None:
        """Takes some lines, of which the first has this number in the file."""
        objects = self._objects(lines, number)
        try:
            rows = [item for item in objects if "step" in item]
            columns = _columns(rows, self.leaves)
        except (KeyError, OverflowError, TypeError, ValueError):
            self._find_fault(objects, number)
        if len(rows) < len(objects):
            self._markers(objects, number)
        self.parts.append(columns)
        self.count += len(rows)

    def _objects(self, lines: list[str], number: int) -> list[Any]:
        try:
            objects = json.loads(f"[{','.join(lines)}]")
            if len(objects) == len(lines):  # or some line was no object of its own
                return objects
        except _NO_JSON:
            pass
        for line, text in enumerate(lines, number):
            try:
                json.loads(text)
            except _NO_JSON as error:
                _refuse(self.path, line, f"not JSON ({error}): {text[:60]!r}")
        raise AssertionError("lines of JSON make an array")

    def _find_fault(self, objects: list[Any], number: int) -> NoReturn:
        for line, item in enumerate(objects, number):
            try:
                _columns([item] if "step" in item else [], self.leaves)
            except KeyError as error:
                _refuse(self.path, line, f"a row without {error}")
            except (OverflowError, TypeError, ValueError) as error:
                _refuse(self.path, line, f"no row of a log ({error}): {item!r:.60}")
        raise AssertionError("rows that are good one by one are good together")

    def _markers(self, objects: list[Any], number: int) -> None:
        rows = self.count
        for line, item in enumerate(objects, number):
            if "step" in item:
                rows += 1
            elif not _is_marker(item):
                _refuse(self.path, line, f"neither a row nor a marker: {item!r:.60}")
            elif "rewound_to" in item:
                self.rewinds.append((rows, item["rewound_to"]))
            elif "resumed" in item:
                self.resumed.append(item["resumed"])
            self.torn += "torn" in item
            self.unsure_before = max(self.unsure_before, item.get("unsure_before", 0))

    def finish(self, metadata: dict[str, Any], torn: int) -> LogData:
        """All rows that still count, in the order of their steps."""
        parts = [*self.parts, _columns([], self.leaves)]
        rows = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        counts = np.ones(self.count, bool)
        for before, step in self.rewinds:
            counts[:before] &= rows["step"][:before] < step
        last_first = np.flatnonzero(counts)[::-1]
        _, place = np.unique(rows["step"][last_first], return_index=True)
        rows = {name: column[last_first[place]] for name, column in rows.items()}
        return LogData(
            metadata | ({"resumed": self.resumed} if self.resumed else {}),
            leaf_names=tuple(metadata.get("leaf_names") or ()),
            leaf_norms=rows.pop("leaf_norms") if self.leaves else None,
            missed=_gaps(rows["step"]),
            rewritten=self.count - len(place),
            torn=self.torn + torn,
            unsure_before=self.unsure_before,
            **rows,
        )


def _is_marker(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and any(marker in item for marker in MARKERS)
        and isinstance(item.get("rewound_to", 0), int)
    )


def _columns(rows: list[dict[str, Any]], leaves: int) -> dict[str, np.ndarray]:
    """Columns of rows. NumPy takes the strings "nan", "inf" and "-inf" for numbers."""
    nan = float("nan")
    columns = {
        "step": _column([row["step"] for row in rows], np.int64),
        "loss": _column([row.get("loss", nan) for row in rows], np.float64),
    }
    for name in _NUMBERS:
        columns[name] = _column([row[name] for row in rows], np.float64)
    for name in _BOOLS:
        columns[name] = _column([row[name] for row in rows], bool)
    if leaves:
        none = [nan] * leaves
        norms = [row.get("leaf_norms", none) for row in rows]
        if wrong := {len(row) for row in norms} - {leaves}:
            raise ValueError(f"{wrong.pop()} leaf norms, but {leaves} leaf names")
        flat = [norm for row in norms for norm in row]
        columns["leaf_norms"] = _column(flat, np.float64).reshape(-1, leaves)
    return columns


def _column(values: list[Any], dtype: Any) -> np.ndarray:
    column = np.array(values, dtype)
    if column.ndim != 1:
        raise ValueError("a list in place of a number")
    if dtype != np.float64 and values:
        # NumPy makes 1 of a step 1.5, and true of the string "false".
        found = np.array(values).dtype
        if found.kind != column.dtype.kind:
            raise ValueError(f"{found.name} in place of {column.dtype.name}")
    return column


def _gaps(step: np.ndarray) -> tuple[tuple[int, int], ...]:
    """First and last of the steps that are not there, of every gap."""
    before = np.concatenate([np.full(1, -1), step])[:-1]
    at = np.flatnonzero(step - before > 1)
    return tuple((int(before[i]) + 1, int(step[i]) - 1) for i in at)
