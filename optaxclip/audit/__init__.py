"""What a run did, on the host: log, replay, report."""

from optaxclip.audit._clip_log import ClipLog as ClipLog
from optaxclip.audit._log import LogData as LogData
from optaxclip.audit._log import read as read
from optaxclip.audit._report import Finding as Finding
from optaxclip.audit._report import Summary as Summary
from optaxclip.audit._report import report as report
from optaxclip.audit._report import summary as summary
from optaxclip.audit._what_if import Outcome as Outcome
from optaxclip.audit._what_if import Replay as Replay
from optaxclip.audit._what_if import Suggestion as Suggestion
from optaxclip.audit._what_if import Suggestions as Suggestions
from optaxclip.audit._what_if import compare as compare
from optaxclip.audit._what_if import outcome_table as outcome_table
from optaxclip.audit._what_if import parse_rule as parse_rule
from optaxclip.audit._what_if import replay as replay
from optaxclip.audit._what_if import suggest as suggest

__all__ = [
    "ClipLog",
    "Finding",
    "LogData",
    "Outcome",
    "Replay",
    "Suggestion",
    "Suggestions",
    "Summary",
    "compare",
    "outcome_table",
    "parse_rule",
    "read",
    "replay",
    "report",
    "suggest",
    "summary",
]
