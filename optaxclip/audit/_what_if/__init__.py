"""What another rule would have done to a run, and which one to use."""

from optaxclip.audit._what_if.compare import HEADER as HEADER
from optaxclip.audit._what_if.compare import Outcome as Outcome
from optaxclip.audit._what_if.compare import cells as cells
from optaxclip.audit._what_if.compare import compare as compare
from optaxclip.audit._what_if.compare import longest_streak as longest_streak
from optaxclip.audit._what_if.compare import outcome as outcome
from optaxclip.audit._what_if.compare import outcome_table as outcome_table
from optaxclip.audit._what_if.compare import streaks as streaks
from optaxclip.audit._what_if.replay import Replay as Replay
from optaxclip.audit._what_if.replay import replay as replay
from optaxclip.audit._what_if.rule_text import SYNTAX as SYNTAX
from optaxclip.audit._what_if.rule_text import parse_rule as parse_rule
from optaxclip.audit._what_if.suggest import Suggestion as Suggestion
from optaxclip.audit._what_if.suggest import Suggestions as Suggestions
from optaxclip.audit._what_if.suggest import advice as advice
from optaxclip.audit._what_if.suggest import suggest as suggest
