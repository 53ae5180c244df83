"""The rows of a log as columns, whose types are those that a log has."""

import operator
import reprlib
from collections.abc import Iterable
from typing import Any

import numpy as np

_NUMBERS = ("norm", "threshold", "scale")
_BOOLS = ("clipped", "skipped")
_WORDS = {"nan", "inf", "-inf"}  # which NumPy takes for numbers


def columns(rows: list[dict[str, Any]], leaves: int) -> dict[str, np.ndarray]:
    """Columns of rows.

    Raises:
      KeyError: a row lacks an entry.
      OverflowError: a number is too large.
      ValueError: an entry has another type.
    """
    nan = float("nan")
    result = {
        "step": _steps(_entries("step", rows)),
        "loss": _floats("loss", [row.get("loss", nan) for row in rows]),
    }
    for name in _NUMBERS:
        result[name] = _floats(name, _entries(name, rows))
    for name in _BOOLS:
        values = _entries(name, rows)
        _check(name, values, {bool}, "true or false")
        result[name] = np.array(values, bool)
    if leaves:
        result["leaf_norms"] = _leaf_norms(rows, leaves)
    return result


def _entries(name: str, rows: list[dict[str, Any]]) -> list[Any]:
    return list(map(operator.itemgetter(name), rows))


def _steps(values: list[Any]) -> np.ndarray:
    _check("step", values, {int}, "an integer")
    steps = np.array(values, np.int64)
    if np.any(steps < 0):
        raise ValueError(f"step must not be below 0, got {steps.min()}")
    return steps


def _floats(name: str, values: list[Any]) -> np.ndarray:
    types = _check(name, values, {float, int, str}, "a number")
    if str in types:
        words = {value for value in values if type(value) is str} - _WORDS
        _refuse_any(name, words, 'a number, "nan", "inf" or "-inf"')
    return np.array(values, np.float64)


def _leaf_norms(rows: list[dict[str, Any]], leaves: int) -> np.ndarray:
    none = [float("nan")] * leaves
    norms = [row.get("leaf_norms", none) for row in rows]
    _check("leaf_norms", norms, {list}, "a list")
    if wrong := {len(row) for row in norms} - {leaves}:
        raise ValueError(f"{wrong.pop()} leaf norms, but {leaves} leaf names")
    flat = [norm for row in norms for norm in row]
    return _floats("leaf_norms", flat).reshape(-1, leaves)


def _check(name: str, values: list[Any], types: set[type], what: str) -> set[type]:
    """The types of the values; a true is no 1, and a null no NaN."""
    found = set(map(type, values))
    if not found <= types:
        _refuse_any(name, (v for v in values if type(v) not in types), what)
    return found


def _refuse_any(name: str, wrong: Iterable[Any], what: str) -> None:
    for value in wrong:
        raise ValueError(f"{name} must be {what}, got {reprlib.repr(value)}")
