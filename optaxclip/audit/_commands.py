"""What the commands of the command line say."""

import argparse
import json
import os
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optaxclip.audit._log import LogData, read
from optaxclip.audit._report import report, run_names, summary
from optaxclip.audit._text import count, finite_json, printable, shown
from optaxclip.audit._what_if import compare, outcome, outcome_table, suggest

_TOOLS = 'pip install "optaxclip[audit]"'


class Failure(Exception):
    """What stops a command, as a line for the terminal."""


def report_command(args: argparse.Namespace) -> str:
    """Writes the page, and says where."""
    logs = {name: _read(path) for name, path in run_names(args.logs).items()}
    first = Path(args.logs[0])
    several = len(args.logs) > 1
    beside = first.with_name("report.html") if several else first.with_suffix(".html")
    page = args.output or str(beside)
    for log in args.logs:
        if os.path.exists(page) and os.path.samefile(log, page):
            raise Failure(f"{page} is the log: name another file for the page")
    try:
        return f"Wrote {printable(str(report(logs, page, title=args.title)))}"
    except ImportError as error:
        raise Failure(f"the report needs {error.name}: {_TOOLS}") from None
    except OSError as error:
        raise Failure(reason(error, page)) from None


def watch_command(args: argparse.Namespace) -> str:
    """Follows a run, until it is told to stop."""
    try:
        from optaxclip.audit._watch import watch
    except ImportError as error:
        raise Failure(f"watch needs {error.name}: {_TOOLS}") from None
    try:
        watch(args.log, args.every)
    except OSError as error:
        raise Failure(reason(error, args.log)) from None
    except ValueError as error:
        raise Failure(_without_call(str(error))) from None
    return ""


def _each(
    args: argparse.Namespace,
    as_json: Callable[[str, LogData], dict[str, Any]],
    as_text: Callable[[str, LogData], str],
) -> str:
    """What is to be said of each log, under its name if there are several."""
    logs = {name: (path, _read(path)) for name, path in run_names(args.logs).items()}
    if args.json:
        said = [{"log": path, **as_json(path, data)} for path, data in logs.values()]
        if len(said) > 1:
            return _json(said)
        return _json({key: value for key, value in said[0].items() if key != "log"})
    texts = [as_text(path, data) for path, data in logs.values()]
    if len(texts) == 1:
        return texts[0]
    pairs = zip(logs, texts, strict=True)
    return "\n\n".join(f"{shown(name)}\n{text}" for name, text in pairs)


def replay_command(args: argparse.Namespace) -> str:
    """What other rules would have done."""

    def outcomes(data: LogData) -> list[Any]:
        result = [outcome("recorded", data.norm, data.scale, data.clipped)]
        for text, rule in args.rules:
            try:
                result += compare({text: rule}, data)
            # What becomes of numbers that are too large depends on where they stand.
            except (
                MemoryError,
                OverflowError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                message = f"the rule {text} cannot be replayed: {error}"
                raise Failure(message) from None
        return result

    def as_json(path: str, data: LogData) -> dict[str, Any]:
        found = [outcome._asdict() for outcome in outcomes(data)]
        return {"steps": len(data.step), "outcomes": found}

    def as_text(path: str, data: LogData) -> str:
        return "\n".join([outcome_table(outcomes(data)), *_gaps(data)])

    return _each(args, as_json, as_text)


def suggest_command(args: argparse.Namespace) -> str:
    """Thresholds to try."""

    def suggested(path: str, data: LogData) -> Any:
        try:
            return suggest(data)
        except ValueError as error:
            raise Failure(f"{path}: {error}") from None

    def as_json(path: str, data: LogData) -> dict[str, Any]:
        fixed, percentile, remarks = suggested(path, data)
        said = {"fixed": fixed._asdict(), "percentile": percentile._asdict()}
        return {**said, "remarks": remarks}

    def as_text(path: str, data: LogData) -> str:
        fixed, percentile, remarks = suggested(path, data)
        lines = []
        for suggestion in (fixed, percentile):
            lines += [suggestion.setting, _indented(suggestion.reason)]
        if cautions := [*remarks, *_gaps(data)]:
            lines += ["Caution:", *map(_indented, cautions)]
        log = printable(shlex.quote(path))
        rules = f"--rule {fixed.rule} --rule {percentile.rule}"
        return "\n".join([*lines, f"Try: optaxclip replay {log} {rules}"])

    return _each(args, as_json, as_text)


def summary_command(args: argparse.Namespace) -> str:
    """What stands out."""

    def as_json(path: str, data: LogData) -> dict[str, Any]:
        _, findings, statistics = summary(data)
        assert statistics is not None  # `_read` refuses a log without steps
        return {
            "statistics": statistics._asdict(),
            "findings": [finding._asdict() for finding in findings],
            "missed": data.missed,
            "rewritten": data.rewritten,
            "torn": data.torn,
            "metadata": data.metadata,
        }

    return _each(args, as_json, lambda path, data: str(summary(data)))


def _read(path: str) -> LogData:
    try:
        data = read(path)
    except OSError as error:
        raise Failure(reason(error, path)) from None
    except ValueError as error:
        raise Failure(_without_call(str(error))) from None
    if not len(data.step):
        raise Failure(f"{path}: the log has no steps yet.")
    return data


def reason(error: OSError, path: str | Path) -> str:
    """An error of the system as a line."""
    return f"{error.filename or path}: {_without_call(error.strerror or str(error))}"


def _without_call(message: str) -> str:
    """An error's text without the Python call that it begins with."""
    return re.sub(r"^`\w+\(path=\.\.\.\)`:? ", "", message)


def _gaps(data: LogData) -> list[str]:
    lost = sum(last - first + 1 for first, last in data.missed)
    return [f"{count(lost, 'step')} missing from the log."] if lost else []


def _indented(text: str) -> str:
    return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="  ")


def _json(value: Any) -> str:
    text = json.dumps(finite_json(value), allow_nan=False, indent=2)
    return text.replace("\x7f", "\\u007f")  # of control characters the only one left
