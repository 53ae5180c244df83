"""The log of a run: from the recorder to a file, and back."""

from optaxclip.audit._log.data import LogData as LogData
from optaxclip.audit._log.follow import Follower as Follower
from optaxclip.audit._log.reader import read as read
from optaxclip.audit._log.writer import Writer as Writer
