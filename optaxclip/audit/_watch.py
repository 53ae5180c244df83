"""A run that is still training, in a terminal: numbers, a chart and the last events."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from optaxclip.audit import _text as text
from optaxclip.audit._log import Follower, LogData
from optaxclip.audit._report import event
from optaxclip.audit._report import statistics as stats

RECENT = 2000  # steps, of which events are looked for
AROUND = 100  # steps, over which the present share of clipped steps is taken
EVENTS = 6
HEIGHT = 8  # lines of the chart


def watch(path: str, every: float, console: Console | None = None) -> None:
    """Follows a log until `q` or Ctrl-C; one look if the output is no terminal.

    Args:
      path: The log; it must exist.
      every: Seconds between two looks.
      console: Where to, the standard output by default.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no log, or damaged.
    """
    console = console or Console()
    follower = Follower(path)
    data = follower.look()
    if not console.is_terminal:
        console.print(view(path, data, console.width))
        return
    live = Live(console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), _keys() as pressed, live:
        while True:
            live.update(view(path, data, console.width), refresh=True)
            if pressed(every) in ("q", "Q", "\x03"):
                break
            data = follower.look() or data
    if data is not None and len(data.step):
        console.print(_numbers(data))  # left behind when the screen is gone


@contextlib.contextmanager
def _keys() -> Iterator:
    """A function that waits for a key, for so many seconds at most."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds)
        return
    import termios  # of Unix alone
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([keyboard], [], [], seconds)
        return os.read(keyboard, 1).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(keyboard)
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def view(path: str, data: LogData | None, width: int) -> RenderableType:
    """What the terminal shows."""
    title = Text(text.shown(path, max(width - 12, 20)))
    if data is None or not len(data.step):
        return Panel(Text("No steps yet."), title=title, subtitle="q quits")
    parts = [_numbers(data), chart(data, width - 14), _events(data)]
    return Panel(Group(*parts), title=title, subtitle="q quits")


def _numbers(data: LogData) -> Text:
    names = ["norm", "threshold", "scale"]
    names += [] if np.isnan(data.loss).all() else ["loss"]
    last = [f"{name} {text.number(float(getattr(data, name)[-1]))}" for name in names]
    clipped, bad = stats.clipped(data), ~np.isfinite(data.norm)
    recent = clipped[-AROUND:]
    lines = [
        "   ".join([f"step {data.step[-1]}", *last]),
        f"clipped: {text.share(float(recent.mean()))} of the last "
        f"{text.count(len(recent), 'step')}, {text.share(float(clipped.mean()))} of "
        f"all {len(clipped):,}",
        f"skipped: {data.skipped.sum():,}   NaN or infinite norm: {bad.sum():,}",
    ]
    return Text("\n".join(lines))


def chart(data: LogData, columns: int) -> Text:
    """The largest norm and threshold of each stretch of the run, in blocks."""
    columns = max(min(columns, len(data.step)), 1)
    starts = np.arange(columns) * len(data.step) // columns
    sizes = np.where(np.isfinite(data.norm) & (data.norm > 0), data.norm, np.nan)
    bounds = np.where(np.isfinite(data.threshold), data.threshold, np.nan)
    with np.errstate(all="ignore"):
        high = np.log10(np.fmax.reduceat(sizes, starts))
        bound = np.log10(np.fmax.reduceat(bounds, starts))
    known = high[np.isfinite(high)]
    if not len(known):
        return Text("No norm is finite and above 0 yet.")
    low, top = known.min() - 0.05, known.max() + 0.05
    level = np.nan_to_num((high - low) / (top - low) * HEIGHT * 8)
    line = np.nan_to_num((bound - low) / (top - low) * HEIGHT, nan=-1).astype(int)
    rows = []
    for row in range(HEIGHT - 1, -1, -1):
        cells = Text()
        eighths = np.clip(level - 8 * row, 0, 8).astype(int)
        for eighth, mark in zip(eighths, line == row, strict=True):
            block = " ▁▂▃▄▅▆▇█"[eighth]
            cells.append(
                "-" if mark and eighth == 0 else block, "red" if mark else "blue"
            )
        scale = 10 ** (low + (top - low) * (row + 0.5) / HEIGHT)
        rows.append(Text(f"{text.number(scale):>9} ").append_text(cells))
    caption = "largest norm of each stretch of steps; red: at the threshold"
    return Text("\n").join([*rows, Text(f"{'':>9} {caption}")])


def _events(data: LogData) -> RenderableType:
    first = max(len(data.step) - RECENT, 0)
    recent = stats.rows_of(data, slice(first, None))
    rows = np.union1d(stats.spikes(recent), np.flatnonzero(~np.isfinite(recent.norm)))
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    for name in ("last events", "norm", "threshold", "outcome", "parameter"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for row in rows[-EVENTS:]:
        e = event(recent, int(row), float("nan"))
        numbers = text.number(e.norm), text.number(e.threshold)
        cells = (f"step {e.step}", *numbers, e.action, text.shown(e.leaf, 26))
        table.add_row(*map(Text, cells))
    if not len(rows):
        last = text.count(len(recent.step), "step")
        return Text(f"No spike, NaN or infinity in the last {last}.")
    return table
