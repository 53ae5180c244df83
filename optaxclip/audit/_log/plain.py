"""What a user tells of a run, as JSON can hold it."""

import enum
import math
from typing import Any

import jax
import numpy as np

from optaxclip.audit._text import shown

_DEPTH = 20  # containers in each other, at most
_ENTRIES = 20_000  # in all containers together
_LENGTH = 1000  # characters of a text that stands for something else
_BITS = 1000  # of an integer; other programs take them for floats anyway


def plain(value: Any) -> Any:
    """A value as JSON knows it; what JSON does not know is a text, never an error."""
    return _Plain().of(value, ())


def as_text(value: Any) -> str:
    """A short text for anything, also for what has none."""
    try:
        if isinstance(value, int) and value.bit_length() > _BITS:
            value = f"{value:#x}"
        return shown(value, _LENGTH)
    except Exception:  # `__str__` is anybody's code
        return f"<{type(value).__name__}>"


class _Plain:
    """A walk through nested containers."""

    def __init__(self) -> None:
        self.left = _ENTRIES

    def of(self, value: Any, within: tuple[int, ...]) -> Any:
        try:
            return self._of(value, within)
        except Exception:  # an array that was donated, or is being traced
            return as_text(value)

    def _of(self, value: Any, within: tuple[int, ...]) -> Any:
        if isinstance(value, dict | list | tuple):
            self.left -= len(value)
            if id(value) in within or len(within) >= _DEPTH or self.left < 0:
                return f"<{type(value).__name__} of {len(value)}>"
            within = (*within, id(value))
            if isinstance(value, dict):
                pairs = list(value.items())
                return {_key(key): self.of(item, within) for key, item in pairs}
            return [self.of(item, within) for item in value]
        if isinstance(value, np.generic | np.ndarray | jax.Array) and not value.ndim:
            value = value.item()
        return value if _is_known(value) else as_text(value)


def _key(key: Any) -> str:
    return key if type(key) is str else as_text(key)


def _is_known(value: Any) -> bool:
    if isinstance(value, enum.Enum):
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value.bit_length() <= _BITS
    return value is None or isinstance(value, str)
