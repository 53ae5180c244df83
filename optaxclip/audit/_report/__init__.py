"""A run in words, numbers and pictures."""

from typing import Any

from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as statistics
from optaxclip.audit._report.report import report as report
from optaxclip.audit._report.summary import findings as findings
from optaxclip.audit._report.summary import summary_text as summary_text


def plot(data: LogData) -> Any:
    """A Matplotlib figure of a log."""
    from optaxclip.audit._report import figures  # a log needs no Matplotlib

    return figures.plot(data)
