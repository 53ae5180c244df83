"""The lines of a log that are no rows."""

import reprlib
from typing import Any

from optaxclip.audit._log.check import Damage

_DEPTH = 50  # far more than a log has, far less than Python can walk through


def refuse_no_marker(item: Any, place: int) -> None:
    """Raises `Damage` for a value that is no marker."""
    known = [name for name in MARKERS if isinstance(item, dict) and name in item]
    if not known or not all(MARKERS[name](item[name]) for name in known):
        raise Damage(place, f"neither a row nor a marker: {reprlib.repr(item)}")


def is_metadata(value: Any) -> bool:
    """Whether a value is an object that everybody can walk through."""
    return isinstance(value, dict) and _is_flat(value, _DEPTH)


def _is_flat(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_flat(item, depth - 1) for item in inner)


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_gap(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_step, value))


MARKERS = {
    "missed": _is_gap,
    "resumed": is_metadata,
    "rewound_to": _is_step,
    "torn": _is_step,
    "unsure_before": _is_step,
}
