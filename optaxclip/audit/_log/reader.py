"""Reading a log: JSON Lines, of which the last may be torn and none is damaged."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from optaxclip.audit._log.check import Damage, is_cut_off
from optaxclip.audit._log.data import LogData
from optaxclip.audit._log.lines import Lines
from optaxclip.audit._log.markers import MARKERS
from optaxclip.audit._text import shown

_STARTS = tuple(f'{{"{name}":' for name in ("step", *MARKERS))


class Parsed(NamedTuple):
    """A log and the bytes it was read from."""

    data: LogData
    end: int  # bytes of whole lines; behind them stands at most a torn one
    torn: bool  # whether one does


def read(path: str | os.PathLike[str] | LogData) -> LogData:
    r"""Reads a log that :class:`ClipLog` wrote, while it is being written too.

    If the run went back to an earlier step, the rows from that step on are dropped. If
    a step has several rows, the last one counts. Steps without a row are ``missed``.

    Args:
      path: The file, or the :class:`ClipLog` that writes it. What this function
        returned is returned as it is.

    Returns:
      :class:`LogData`, in the order of the steps. Its ``metadata`` are the first line,
      and under ``"resumed"`` a list of what later runs wrote of themselves.

    Raises:
      ValueError: the file is empty, no log, of a newer format, or damaged: a line is
        neither a row nor a marker, or not as it was written. Names the line.
      OSError: there is no such file, it cannot be read, or it is a folder, a pipe, a
        socket or a device.

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
    if isinstance(path, LogData):
        return path
    return parse(read_bytes(path), path).data


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file, if it is one: to open a pipe might take for ever."""
    refuse_special(path)
    return Path(path).read_bytes()


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Raises `OSError` for a folder, a pipe, a socket or a device."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def parse(content: bytes, path: str | os.PathLike[str]) -> Parsed:
    """The log in the content of a file; ``path`` is for errors."""
    whole = content.rstrip(b"\0")  # zeros are what a power cut leaves of a block
    *lines, rest = whole.split(b"\n")
    torn = is_cut_off(rest, _STARTS) if rest else len(whole) < len(content)
    torn = torn and bool(lines)
    if rest and not torn:
        lines.append(rest)
    end = len(whole) - (len(rest) if torn else 0)
    log = Lines()
    with naming(path):
        log.add(lines)
    return Parsed(log.data(torn), end, torn)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it, `Damage` is an error that says where a log is damaged."""
    try:
        yield
    except Damage as damage:
        where = f"{shown(os.fspath(path), 1000)}, line {damage.place + 1}"
        message = f"`read(path=...)`: {where}: {shown(damage, 400)}."
        raise ValueError(message) from None
