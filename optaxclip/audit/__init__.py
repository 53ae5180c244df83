"""What a run did, on the host: log, replay, report."""

from optaxclip.audit._data import LogData as LogData
