"""A run in words, numbers and pictures."""

import html
from typing import Any

from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as statistics
from optaxclip.audit._report.events import event as event
from optaxclip.audit._report.finding import Finding as Finding
from optaxclip.audit._report.names import run_names as run_names
from optaxclip.audit._report.report import beside as beside
from optaxclip.audit._report.report import report as report
from optaxclip.audit._report.summary import Summary as Summary
from optaxclip.audit._report.summary import summary as summary


def plot(data: LogData) -> Any:
    """A Matplotlib figure of a log."""
    from optaxclip.audit._report import figures  # a log needs no Matplotlib

    return figures.plot({"": data})


def cell(data: LogData, words: str | None = None) -> str:
    """A log as the value of a notebook's cell: words, by default its summary, and plot.

    The lines of the words are as long as the page is wide.
    """
    told = html.escape(str(summary(data)) if words is None else words)
    told = f'<pre style="white-space: pre-wrap">{told}</pre>'
    try:
        from optaxclip.audit._report.stills import image
    except ImportError:  # of Matplotlib
        return told
    # In a dark notebook, black text needs a background.
    style = "max-width: 100%; background: white"
    return told + image({"": data}, style) if len(data.step) else told
