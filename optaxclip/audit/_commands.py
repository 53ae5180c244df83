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


Said = tuple[dict[str, Any], str]  # for --json, and for a person


def _each(args: argparse.Namespace, say: Callable[[str, LogData], Said]) -> str:
    """What is to be said of each log, under its name if there are several."""
    said = {name: say(path, _read(path)) for name, path in run_names(args.logs).items()}
    if len(said) == 1:
        ((json_, text),) = said.values()
        return _json(json_) if args.json else text
    if args.json:
        pairs = zip(args.logs, said.values(), strict=True)
        return _json([{"log": path, **json_} for path, (json_, _) in pairs])
    return "\n\n".join(f"{shown(name)}\n{text}" for name, (_, text) in said.items())


def replay_command(args: argparse.Namespace) -> str:
    """What other rules would have done."""

    def say(path: str, data: LogData) -> Said:
        outcomes = [outcome("recorded", data.norm, data.scale, data.clipped)]
        for text, rule in args.rules:
            try:
                outcomes += compare({text: rule}, data)
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
        found = [outcome._asdict() for outcome in outcomes]
        text = "\n".join([outcome_table(outcomes), *_gaps(data)])
        return {"steps": len(data.step), "outcomes": found}, text

    return _each(args, say)


def suggest_command(args: argparse.Namespace) -> str:
    """Thresholds to try."""

    def say(path: str, data: LogData) -> Said:
        try:
            fixed, percentile, remarks = suggest(data)
        except ValueError as error:
            raise Failure(f"{path}: {error}") from None
        lines = []
        for suggestion in (fixed, percentile):
            lines += [suggestion.setting, _indented(suggestion.reason)]
        if cautions := [*remarks, *_gaps(data)]:
            lines += ["Caution:", *map(_indented, cautions)]
        log, rules = printable(shlex.quote(path)), (fixed.rule, percentile.rule)
        options = " ".join(f"--rule {rule}" for rule in rules)
        lines.append(f"Try: optaxclip replay {log} {options}")
        parts = {"fixed": fixed._asdict(), "percentile": percentile._asdict()}
        return {**parts, "remarks": remarks}, "\n".join(lines)

    return _each(args, say)


def summary_command(args: argparse.Namespace) -> str:
    """What stands out."""

    def say(path: str, data: LogData) -> Said:
        said = summary(data)
        assert said.statistics is not None  # `_read` refuses a log without steps
        record = ("missed", "rewritten", "torn", "metadata")
        return {
            "statistics": said.statistics._asdict(),
            "findings": [finding._asdict() for finding in said.findings],
            **{name: getattr(data, name) for name in record},
        }, str(said)

    return _each(args, say)


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
