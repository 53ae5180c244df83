"""What is done with an optimizer's state: read, record, migrate."""

from optaxclip._state.history import History as History
from optaxclip._state.history import HistoryState as HistoryState
from optaxclip._state.history import record_history as record_history
from optaxclip._state.metrics import metrics as metrics
from optaxclip._state.migrate import migrate_state as migrate_state
