"""Reading a log that grows: of each look, only what is new."""

import os
from pathlib import Path

from optaxclip.audit._log.data import LogData
from optaxclip.audit._log.lines import Lines
from optaxclip.audit._log.reader import naming, refuse_special


class Follower:
    """A log that is being written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._start_over(-1)

    def _start_over(self, file: int) -> None:
        self._file, self._end, self._lines = file, 0, Lines()

    def look(self) -> LogData | None:
        """All rows so far; None if no row is new. Raises what `read` raises."""
        refuse_special(self.path)
        with self.path.open("rb") as file:
            now = os.fstat(file.fileno())
            if now.st_ino != self._file or now.st_size < self._end:
                self._start_over(now.st_ino)  # another file of this name
            file.seek(self._end)
            *lines, _ = file.read().split(b"\n")  # the rest may be half a line
        if not lines:
            return None
        with naming(self.path):
            self._lines.add(lines)
        self._end += sum(len(line) + 1 for line in lines)
        return self._lines.data()
