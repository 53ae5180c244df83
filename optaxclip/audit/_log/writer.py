"""Writing a log: what is new in the recorder, appended to a file."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from optaxclip import _checks
from optaxclip.audit._log.check import is_cut_off, sealed
from optaxclip.audit._log.data import LogData
from optaxclip.audit._log.drain import LAST, Rows, drain, first_difference, to_json
from optaxclip.audit._log.head import START, about, head, line
from optaxclip.audit._log.reader import parse, read, read_bytes, refuse_special
from optaxclip.audit._text import shown

PyTree = Any


class Writer:
    """Appends what is new in a recorder to a file, see `ClipLog`."""

    path: Path
    missed: int
    unwritten: int

    def __init__(
        self,
        path: str | Path,
        *,
        params: PyTree = None,
        transform: str | None = None,
        hyperparameters: dict[str, Any] | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        if on_error not in ("warn", "raise"):
            _checks.refused("ClipLog", "on_error", '"warn" or "raise"', on_error)
        self.path = Path(path)
        self.missed = 0
        self.unwritten = 0
        self._on_error = on_error
        self._warned: set[str] = set()
        self._about = about(transform, hyperparameters, params)
        self._opened = False  # whether the file has been looked at
        self._end = 0  # bytes of whole lines
        self._size = 0  # of the file, with what a torn or failed write has left
        self._next = 0  # the step behind the last row
        self._written: LogData | Rows | None = None  # the last rows, or all of them
        self._leaf_names: tuple[str, ...] | None = None  # None: the file has no head
        self._lead = ""  # to be written before anything else
        if jax.process_index() == 0:
            try:
                self._open()
            except OSError as error:
                self._report(error)

    def update(self, opt_state: PyTree) -> int:
        """Appends the steps that are new in the recorder, which waits for the device.

        Call it outside ``jit``, at least every ``length`` steps of the recorder, after
        the last step, and after every restoring of a checkpoint: the log then knows
        exactly to which step the run went back. Without that last call it compares
        what the recorder remembers with what it has written.

        Args:
          opt_state: Any pytree that holds the state of one
            :func:`optaxclip.record_history`, as in :func:`optaxclip.metrics`. Of a
            state stacked by ``vmap`` or ``pmap`` the first replica is taken.

        Returns:
          How many rows were written.

        Raises:
          ValueError: the state holds no recorder, or several.
        """
        if jax.process_index() != 0:
            return 0
        rows = drain(opt_state).in_order(self._leaf_names)
        try:
            return self._write(rows)
        except (OSError, ValueError) as error:
            self.unwritten = max(0, rows.end - self._next)
            self._report(error)
            return 0

    def read(self) -> LogData:
        """The log so far, see :func:`read`."""
        return read(self.path)

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def _open(self) -> None:
        """Looks where the file ends and what it says; makes it if there is none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._opened = False
        self._end, self._next, self._written, self._leaf_names = 0, 0, None, None
        _size(self.path)  # which refuses what is no file
        self.path.open("ab").close()  # fails now rather than at the first drain
        content = read_bytes(self.path)
        self._size = len(content)
        self._lead = line({"torn": 1}) if content else ""
        if not content or is_cut_off(content.rstrip(b"\0"), (START,)):
            self._opened = True  # nothing, or a torn first line
            return
        data, self._end, torn = parse(content, self.path)
        self._written = data
        self._next = int(data.step[-1]) + 1 if len(data.step) else 0
        self._leaf_names = data.leaf_names
        self.missed = data.missing
        if not torn:
            self._lead = "" if content[: self._end].endswith(b"\n") else "\n"
        self._lead += line({"resumed": head(self._about, data.leaf_names)})
        self._opened = True

    def _write(self, rows: Rows) -> int:
        # Of another size if others wrote to it, or removed it.
        if not self._opened or _size(self.path) != self._size:
            self._open()
        start = self._first_new(rows)
        rewound, gap = start < self._next, max(0, rows.first - start)
        # Its oldest row is another: those before may have been, too.
        unsure = start == rows.first and self._holds(start - 1, start)
        markers = {
            "rewound_to": start if rewound else None,
            "unsure_before": start if unsure else None,
            "missed": [start, rows.first - 1] if gap else None,
        }
        said = [line({key: at}) for key, at in markers.items() if at is not None]
        new = to_json(rows, start)
        if said or new:
            text = "".join([*said, *map(sealed, new)])
            self._append(self._begin(rows.leaf_names) + text)
            self._leaf_names = rows.leaf_names
        self._next, self._written, self.unwritten = rows.end, rows, 0
        # The steps that the run repeats may include missed ones.
        self.missed = self.read().missing if rewound else self.missed + gap
        self._warn_of(rows, start, unsure)
        return len(new)

    def _first_new(self, rows: Rows) -> int:
        if rows.end < self._next:  # back behind what the last drain remembered
            self._written = self.read()
        if self._written is None:
            return self._next
        return min(self._next, rows.end, first_difference(self._written, rows))

    def _holds(self, *steps: int) -> bool:
        return self._written is not None and all(np.isin(steps, self._written.step))

    def _begin(self, leaf_names: tuple[str, ...]) -> str:
        """The first line of a file, or what is to be said of its going on."""
        if self._leaf_names is None:
            return line(head(self._about, leaf_names)) + self._lead
        if self._leaf_names != leaf_names:
            raise ValueError(
                f"it has the leaf norms of {_names(self._leaf_names)}, the recorder "
                f"those of {_names(leaf_names)}: start a new file"
            )
        return self._lead

    def _append(self, text: str) -> None:
        try:
            with self.path.open("ab") as file:
                if file.tell() > self._end:
                    file.truncate(self._end)
                file.write(text.encode())
        finally:
            self._size = _size(self.path)
        self._end += len(text)
        self._lead = ""

    def _warn_of(self, rows: Rows, start: int, unsure: bool) -> None:
        if start < rows.first:
            self._warn_once(
                "gap",
                f"`ClipLog.update`: steps {start} to {rows.first - 1} are missing in "
                f"{self.path}: the recorder remembers {len(rows.step)}. Update the log "
                "more often, or record a longer history. Further gaps are only "
                "counted.",
            )
        if rows.end == LAST:
            self._warn_once(
                "end",
                f"`ClipLog.update`: the recorder has counted {LAST} steps and counts "
                "no further: rows from here on are lost. Start a fresh recorder, with "
                "a log of its own.",
            )
        if unsure:
            self._warn_once(
                "unsure",
                "`ClipLog.update`: the run went back to an earlier step, and the "
                "recorder does not hold all steps since then. Rows before step "
                f"{start} in {self.path} may be older than the steps that the run "
                "repeated. Update the log right after restoring a checkpoint.",
            )

    def _report(self, error: Exception) -> None:
        if self._on_error == "raise":
            raise error
        self._warn_once(
            "error",
            f"`ClipLog(path=...)` cannot write {self.path}: {error}. Training goes on; "
            "every update tries again, and steps that it comes too late for are lost.",
            stacklevel=4,
        )

    def _warn_once(self, kind: str, message: str, stacklevel: int = 5) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            text = shown(message, 2000)
            warnings.warn(text, stacklevel=stacklevel)  # at the caller's line


def _names(names: tuple[str, ...]) -> str:
    return shown(list(names), 500)


def _size(path: Path) -> int:
    """The size of a file that is one; -1 if there is none."""
    try:
        refuse_special(path)
        return path.stat().st_size
    except FileNotFoundError:
        return -1
