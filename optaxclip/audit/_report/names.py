"""The texts of a log that others wrote, as a person may see them."""

import dataclasses
from typing import Any

from optaxclip.audit._log import LogData
from optaxclip.audit._text import shown

_ENTRY = 2000  # characters of an entry of the metadata, a transform for instance


def with_shown_names(data: LogData) -> LogData:
    """A log for display: names in it print and are of a bounded length."""
    names = tuple(map(shown, data.leaf_names))
    metadata = {shown(key): _shown(data.metadata[key]) for key in data.metadata}
    return dataclasses.replace(data, leaf_names=names, metadata=metadata)


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {shown(key): _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shown(x) if isinstance(x, str) else _shown(x) for x in value]
    return shown(value, _ENTRY) if isinstance(value, str) else value
