"""What a run did, on the host: log, replay, report."""

from optaxclip.audit._data import LogData as LogData
from optaxclip.audit._reader import read as read
from optaxclip.audit._writer import ClipLog as ClipLog
