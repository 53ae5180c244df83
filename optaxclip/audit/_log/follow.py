"""Reading a log that grows: of each look, only what is new."""

import os
from pathlib import Path

from optaxclip.audit._log.check import Damage, verified
from optaxclip.audit._log.data import LogData
from optaxclip.audit._log.reader import metadata_of, refusal, refuse_special
from optaxclip.audit._log.reading import Reading


class Follower:
    """A log that is being written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._start_over()

    def _start_over(self) -> None:
        self._end = self._lines = 0  # bytes and lines that were read
        self._reading: Reading | None = None
        self._metadata = {}

    def look(self) -> LogData | None:
        """All rows so far; None if no row is new. Raises what `read` raises."""
        refuse_special(self.path)
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._end:  # another file of this name
                self._start_over()
            file.seek(self._end)
            *lines, _ = file.read().split(b"\n")  # the rest may be half a line
        if not lines:
            return None
        try:
            self._take(lines)
        except Damage as damage:
            raise refusal(self.path, damage) from None
        self._end += sum(len(line) + 1 for line in lines)
        self._lines += len(lines)
        assert self._reading is not None
        return self._reading.finish(self._metadata, torn=False)

    def _take(self, lines: list[bytes]) -> None:
        place = self._lines
        if self._reading is None:
            checked = verified(lines[:1], False)
            self._metadata = metadata_of(lines)
            leaves = len(self._metadata.get("leaf_names") or ())
            self._reading = Reading(leaves, checked)
            lines, place = lines[1:], place + 1
        if lines:
            self._reading.add(lines, place)
