"""The check at the end of a line, which tells whether it is as it was written."""

import json
import re
import zlib

_MARK = b',"crc":"'
_LENGTH = len(_MARK) + 8 + len('"}')

# What may be left of a value where a text was cut off.
_CUT_OFF = re.compile(
    r"(t(ru?)?|f(a(ls?)?)?|n(ul?)?|-|\.|(\.\d+)?[eE][+-]?|u[0-9a-f]{0,3})?"
)


class Damage(ValueError):
    """A line is not as it was written: which of those given, counted from 0."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(reason)
        self.place = place


def sealed(text: str) -> str:
    """The line of a JSON object, which is given as text in ASCII, with its check."""
    body = text[:-1]
    return f'{body},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'


def bodies(lines: list[bytes]) -> list[bytes] | None:
    """Lines without check and last brace, if every line has a check that fits."""
    parts = [line[:-_LENGTH] for line in lines]
    found = b"".join([line[-_LENGTH:] for line in lines])
    sums = tuple(map(zlib.crc32, parts))
    return parts if found == (_MARK + b'%08x"}') * len(lines) % sums else None


def verified(lines: list[bytes], checked: bool) -> bool:
    """Whether lines have checks from here on; raises `Damage` if one does not fit.

    Args:
      lines: Some lines of a log, in their order.
      checked: Whether a line before them has a check. Then all of them must: those of
        an old log have none, but whoever goes on with it begins with a marker that has.
    """
    if not checked and not any(_MARK in line for line in lines):
        return False
    for place, line in enumerate(lines):
        has_check = line[-_LENGTH:].startswith(_MARK)
        if has_check and not bodies([line]):
            raise Damage(place, f"damaged, its check does not fit: {_start(line)}")
        if checked and not has_check:
            raise Damage(place, f"damaged, it has no check: {_start(line)}")
        if has_check and not checked and line.startswith(b'{"step"'):
            # Checks begin with a head or a marker, never with a row.
            raise Damage(place - 1, "damaged, its check is missing or broken")
        checked = has_check
    return checked


def _start(line: bytes) -> str:
    return repr(line[:60].decode("latin-1"))


def is_cut_off(text: bytes, starts: tuple[str, ...]) -> bool:
    """Whether a text is the beginning of a JSON object, and not all of it.

    Args:
      text: What stands behind the last line end of a file.
      starts: How an object may begin. A shorter text must begin one of them.
    """
    line = text.decode("latin-1")
    begun = any(line[: len(start)] == start[: len(line)] for start in starts)
    if not line or not begun:
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            return line.isascii()
        rest = line[error.pos :]
        return error.msg != "Extra data" and bool(_CUT_OFF.fullmatch(rest))
    except RecursionError:
        pass
    return False
