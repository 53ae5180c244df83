"""What a run did, on the host: log, replay, report."""

from optaxclip.audit._compare import Outcome as Outcome
from optaxclip.audit._compare import compare as compare
from optaxclip.audit._compare import outcome_table as outcome_table
from optaxclip.audit._data import LogData as LogData
from optaxclip.audit._reader import read as read
from optaxclip.audit._replay import Replay as Replay
from optaxclip.audit._replay import replay as replay
from optaxclip.audit._report import report as report
from optaxclip.audit._rule_text import parse_rule as parse_rule
from optaxclip.audit._suggest import Suggestion as Suggestion
from optaxclip.audit._suggest import Suggestions as Suggestions
from optaxclip.audit._suggest import suggest as suggest
from optaxclip.audit._writer import ClipLog as ClipLog
