"""How numbers read, and names."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np


def number(value: float) -> str:
    """A number of about four digits: 1234, 0.01235, infinite, NaN."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(value: float) -> str:
    """A share in percent; no event is never rounded to none, nor to all."""
    if math.isnan(value):
        return "-"
    if 0 < value < 0.0005:
        return "under 0.1%"
    if 0.9995 < value < 1:
        return "over 99.9%"
    return f"{100 * value:.0f}%" if value in (0, 1) else f"{100 * value:.1f}%"


def count(number: int, noun: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def steps(numbers: Sequence[int] | np.ndarray, most: int = 6) -> str:
    """`steps 3, 17, 18, …, 1700, 1701 (1,200 in all)`: the first and the last ones."""
    texts = [str(int(n)) for n in numbers]
    if len(texts) > most:
        texts = [*texts[:3], "…", *texts[-2:]]
    all_of_them = f" ({len(numbers):,} in all)" if len(numbers) > most else ""
    return f"step{'' if len(numbers) == 1 else 's'} {', '.join(texts)}{all_of_them}"


def gaps(missed: Sequence[tuple[int, int]], most: int = 3) -> str:
    """`7 to 9, 20 to 20 and more`: the first of some gaps."""
    first = ", ".join(f"{start} to {end}" for start, end in missed[:most])
    return f"{first} and more" if len(missed) > most else first


def indented(paragraph: str) -> str:
    """A paragraph in lines of at most 80 characters, a bit to the right."""
    return textwrap.fill(paragraph, 80, initial_indent="  ", subsequent_indent="  ")


def printable(text: str, keep: str = "") -> str:
    r"""A text for a person, in which no character does anything but show.

    Those that do not print, as ``str.isprintable`` has it, could move a terminal's
    cursor, turn the direction of what follows or break XML. They are escaped as in a
    Python string: ``\x1b``, ``\u202e``. Letters of any script stay.

    Args:
      text: What may hold names that are not ours: of leaves, of files.
      keep: Characters that stay, the line end for instance.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def shown(value: Any, most: int = 200) -> str:
    """A name or other text that is not ours, `printable` and of a bounded length.

    Of a long one the two ends are left; the last words tell names apart.
    """
    text = printable(str(value))
    if len(text) <= most:
        return text
    head = (most - 1) // 4
    return f"{text[:head]}…{text[-(most - 1 - head) :]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def finite_json(value: Any) -> Any:
    """A value that strict JSON can hold: NaN and infinities become strings."""
    if isinstance(value, dict):
        return {str(key): finite_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(float(value))
    return value.item() if isinstance(value, np.generic) else value
