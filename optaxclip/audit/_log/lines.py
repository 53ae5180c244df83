"""The lines of a log, taken some at a time, and the rows that they say."""

import json
from typing import Any, NoReturn

import numpy as np

from optaxclip.audit._log.check import Damage, bodies, verified
from optaxclip.audit._log.columns import columns
from optaxclip.audit._log.data import LogData
from optaxclip.audit._log.head import NO_JSON, metadata_of
from optaxclip.audit._log.markers import refuse_no_marker

# Parsed as one JSON array, twice as fast as line by line; not all at once, for memory.
_AT_ONCE = 20_000


class Lines:
    """What was read so far of a log."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.leaves = 0
        self.checked = False  # whether lines have checks, as far as it was read
        self.read = 0  # lines
        self.parts: list[dict[str, np.ndarray]] = []
        self.count = 0  # rows, with those that were replaced
        self.rewinds: list[tuple[int, int]] = []  # rows before it, and its step
        self.resumed: list[Any] = []
        self.restarts: list[int] = []  # rows before each of them
        self.torn = self.unsure_before = 0

    def add(self, lines: list[bytes]) -> None:
        """Takes further lines; raises `Damage` with the place in all of them."""
        if not self.read:
            self.checked = verified(lines[:1], False)
            self.metadata = metadata_of(lines)
            self.leaves = len(self.metadata.get("leaf_names") or ())
            self.read, lines = 1, lines[1:]
        for first in range(0, len(lines), _AT_ONCE):
            part = lines[first : first + _AT_ONCE]
            self._add(part)
            self.read += len(part)

    def _add(self, lines: list[bytes]) -> None:
        objects = self._objects(lines)
        try:
            rows = [item for item in objects if "step" in item]
            part = columns(rows, self.leaves)
        except (KeyError, OverflowError, TypeError, ValueError):
            self._find_fault(objects)
        if len(rows) < len(objects):
            self._markers(objects)
        self.parts.append(part)
        self.count += len(rows)

    def _objects(self, lines: list[bytes]) -> list[Any]:
        parts = bodies(lines) if self.checked else None
        if parts is None:
            try:
                self.checked = verified(lines, self.checked)
            except Damage as damage:
                raise Damage(self.read + damage.place, str(damage)) from None
        text = b",".join(lines) if parts is None else b"},".join(parts) + b"}"
        try:
            objects = json.loads(f"[{text.decode('latin-1')}]")  # rows are ASCII
            if len(objects) == len(lines):  # or some line was no object of its own
                return objects
        except NO_JSON:
            pass
        return [_object(line, place) for place, line in enumerate(lines, self.read)]

    def _find_fault(self, objects: list[Any]) -> NoReturn:
        for place, item in enumerate(objects, self.read):
            if not isinstance(item, dict):
                refuse_no_marker(item, place)
            try:
                columns([item] if "step" in item else [], self.leaves)
            except KeyError as error:
                raise Damage(place, f"a row without {error}") from None
            except (OverflowError, ValueError) as error:
                raise Damage(place, f"no row of a log: {error}") from None
        raise AssertionError("rows that are good one by one are good together")

    def _markers(self, objects: list[Any]) -> None:
        rows = self.count
        for place, item in enumerate(objects, self.read):
            if "step" in item:
                rows += 1
                continue
            refuse_no_marker(item, place)
            if "rewound_to" in item:
                self.rewinds.append((rows, item["rewound_to"]))
            elif "resumed" in item:
                self.resumed.append(item["resumed"])
                self.restarts.append(rows)
            self.torn += "torn" in item
            self.unsure_before = max(self.unsure_before, item.get("unsure_before", 0))

    def data(self, torn: bool = False) -> LogData:
        """All rows that still count, in the order of their steps."""
        parts = [*self.parts, columns([], self.leaves)]
        rows = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        restarts = [int(rows["step"][n]) for n in self.restarts if n < self.count]
        counts = np.ones(self.count, bool)
        for before, step in self.rewinds:
            counts[:before] &= rows["step"][:before] < step
        last_first = np.flatnonzero(counts)[::-1]
        _, place = np.unique(rows["step"][last_first], return_index=True)
        rows = {name: column[last_first[place]] for name, column in rows.items()}
        return LogData(
            self.metadata | ({"resumed": self.resumed} if self.resumed else {}),
            leaf_names=tuple(self.metadata.get("leaf_names") or ()),
            leaf_norms=rows.pop("leaf_norms") if self.leaves else None,
            missed=_gaps(rows["step"]),
            rewritten=self.count - len(place),
            torn=self.torn + torn,
            unsure_before=self.unsure_before,
            restarts=tuple(restarts),
            **rows,
        )


def _object(line: bytes, place: int) -> Any:
    text = line.decode("latin-1")
    try:
        return json.loads(text)
    except NO_JSON as error:
        raise Damage(place, f"not JSON ({error}): {text[:60]!r}") from None


def _gaps(step: np.ndarray) -> tuple[tuple[int, int], ...]:
    """First and last of the steps that are not there, of every gap."""
    before = np.concatenate([np.full(1, -1), step])[:-1]
    at = np.flatnonzero(step - before > 1)
    return tuple((int(before[i]) + 1, int(step[i]) - 1) for i in at)
