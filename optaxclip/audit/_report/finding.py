"""A finding, and the words that several of them use."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from optaxclip.audit._log import LogData


class Finding(NamedTuple):
    """Something to know about a run."""

    level: str  # "problem", "notice" or "fine"
    title: str  # what is the matter, in plain words
    detail: str  # where, how much, and what to do
    steps: tuple[int, ...] = ()  # those it is about, if it is about some


def at(steps: Iterable[int]) -> tuple[int, ...]:
    """Numbers of steps, for a finding."""
    return tuple(map(int, steps))


def capital(sentence: str) -> str:
    """A sentence that begins with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def span(data: LogData, rows: np.ndarray) -> str:
    """`steps 20 to 39`: the first and the last of some rows."""
    return f"steps {data.step[rows[0]]} to {data.step[rows[-1]]}"
