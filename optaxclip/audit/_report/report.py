"""The report: one page about a run, or several, which needs nothing but itself."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from optaxclip.audit._log import LogData, read
from optaxclip.audit._report.names import run_names, with_shown_names

Log = LogData | str | os.PathLike[str]


def report(
    data: Log | Sequence[Log] | Mapping[str, Log],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    refresh: float | None = None,
) -> Path:
    """Writes a page about a run, or about several: words, then plots, then tables.

    The page is one HTML file that loads nothing from anywhere. Its plots share an axis
    of steps: point at one to read the row of a step, drag over one to zoom into all. Of
    several runs the lines lie over each other, and one table has their differences.
    Where scripts do not run, and on paper, the page has still pictures. It replaces
    what stood at ``path`` in one go, so that a reader never sees half of it.

    Args:
      data: A log, as a path or as :func:`optaxclip.audit.read` returns it; several of
        them in a list, or in a dict by name.
      path: The file; folders that are missing are made. By default it is beside the
        log: ``run.html`` for ``run.jsonl``, and ``report.html`` for several.
      title: The heading, "Gradient clipping report" if not given.
      refresh: For a page that is written again and again: the number of seconds after
        which a browser loads it again, unless its reader has zoomed in.

    Returns:
      The path.

    Raises:
      ValueError: a log has no steps; there is no log; or ``path`` is not given and
        neither is the path of a log, or it would be a log.
      OSError: the path cannot be written.
      ImportError: matplotlib or jinja2 is not installed.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from optaxclip.audit import LogData, report
      >>> norm = np.random.default_rng(0).lognormal(sigma=0.5, size=300)
      >>> scale = np.minimum(1, 2 / norm)
      >>> data = LogData(
      ...     metadata={},
      ...     step=np.arange(300),
      ...     norm=norm,
      ...     threshold=np.full(300, 2.0),
      ...     scale=scale,
      ...     loss=np.full(300, np.nan),
      ...     clipped=scale < 1,
      ...     skipped=np.zeros(300, bool),
      ... )
      >>> path = report(data, pathlib.Path(tempfile.mkdtemp(), "report.html"))
      >>> print(path.name, "<h2" in path.read_text())
      report.html True
    """
    logs = _by_name(data)
    paths = [Path(log) for log in logs.values() if not isinstance(log, LogData)]
    target = Path(path) if path is not None else beside(paths)
    if target.exists() and any(target.samefile(p) for p in paths if p.exists()):
        raise ValueError(
            f"`report(path=...)`: {target} is the log: name another file for the page."
        )
    runs = {name: with_shown_names(read(log)) for name, log in logs.items()}
    for log in runs.values():
        if not len(log.step):
            message = "`report(data=...)` must hold a step, the log has none yet."
            raise ValueError(message)
    try:
        from optaxclip.audit._report.page import page  # a log needs none of its tools
    except ImportError as error:
        missing = f"`report()` needs {error.name}: install optaxclip[audit]."
        raise ImportError(missing, name=error.name) from error
    return _written(target, page(runs, title or "Gradient clipping report", refresh))


def _by_name(data: Log | Sequence[Log] | Mapping[str, Log]) -> dict[str, Log]:
    if isinstance(data, LogData | str | os.PathLike):
        return {"": data}
    logs = dict(data) if isinstance(data, Mapping) else run_names(list(data))
    if not logs:
        raise ValueError("`report(data=...)` must hold a log, got none.")
    return logs if len(logs) > 1 else {"": next(iter(logs.values()))}


def beside(paths: list[Path]) -> Path:
    """Where the page of logs stands if no place is given."""
    if not paths:
        raise ValueError("`report(path=...)` must be given for a log without a path.")
    if len(paths) > 1:
        return paths[0].with_name("report.html")
    return paths[0].with_suffix(".html")


def _written(path: Path, html: str) -> Path:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(html, encoding="utf-8")
            draft.replace(path)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
    except OSError as error:
        reason = f"`report(path=...)` cannot be written: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from error
    return path
