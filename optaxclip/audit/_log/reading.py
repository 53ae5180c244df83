"""The lines of a log, some at a time, as rows."""

import json
from typing import Any, NoReturn

import numpy as np

from optaxclip.audit._log.check import Damage, bodies, verified
from optaxclip.audit._log.columns import columns
from optaxclip.audit._log.data import LogData
from optaxclip.audit._log.markers import refuse_no_marker

NO_JSON = (ValueError, RecursionError)  # the latter of thousands of brackets


class Reading:
    """What was read so far; raises `Damage` with the place in all of the lines."""

    def __init__(self, leaves: int, checked: bool) -> None:
        self.leaves = leaves
        self.checked = checked  # whether lines have checks, as far as it was read
        self.parts: list[dict[str, np.ndarray]] = []
        self.count = 0  # rows, with those that were replaced
        self.rewinds: list[tuple[int, int]] = []  # rows before it, and its step
        self.resumed: list[Any] = []
        self.restarts: list[int] = []  # rows before each of them
        self.torn = self.unsure_before = 0

    def add(self, lines: list[bytes], place: int) -> None:
        """Takes some lines, of which the first has this place in the file."""
        objects = self._objects(lines, place)
        try:
            rows = [item for item in objects if "step" in item]
            part = columns(rows, self.leaves)
        except (KeyError, OverflowError, TypeError, ValueError):
            self._find_fault(objects, place)
        if len(rows) < len(objects):
            self._markers(objects, place)
        self.parts.append(part)
        self.count += len(rows)

    def _objects(self, lines: list[bytes], first: int) -> list[Any]:
        parts = bodies(lines) if self.checked else None
        if parts is None:
            try:
                self.checked = verified(lines, self.checked)
            except Damage as damage:
                raise Damage(first + damage.place, str(damage)) from None
        text = b",".join(lines) if parts is None else b"},".join(parts) + b"}"
        try:
            objects = json.loads(f"[{text.decode('latin-1')}]")  # rows are ASCII
            if len(objects) == len(lines):  # or some line was no object of its own
                return objects
        except NO_JSON:
            pass
        return [_object(line, place) for place, line in enumerate(lines, first)]

    def _find_fault(self, objects: list[Any], first: int) -> NoReturn:
        for place, item in enumerate(objects, first):
            if not isinstance(item, dict):
                refuse_no_marker(item, place)
            try:
                columns([item] if "step" in item else [], self.leaves)
            except KeyError as error:
                raise Damage(place, f"a row without {error}") from None
            except (OverflowError, ValueError) as error:
                raise Damage(place, f"no row of a log: {error}") from None
        raise AssertionError("rows that are good one by one are good together")

    def _markers(self, objects: list[Any], first: int) -> None:
        rows = self.count
        for place, item in enumerate(objects, first):
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

    def finish(self, metadata: dict[str, Any], torn: bool) -> LogData:
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
            metadata | ({"resumed": self.resumed} if self.resumed else {}),
            leaf_names=tuple(metadata.get("leaf_names") or ()),
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
