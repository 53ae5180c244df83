"""What the commands of the command line say."""

import argparse
import contextlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from optaxclip.audit._log import Follower, LogData, read
from optaxclip.audit._report import beside, report, run_names, summary
from optaxclip.audit._text import count, finite_json, printable, shown
from optaxclip.audit._what_if import compare, outcome, outcome_table, suggest


class Failure(Exception):
    """What stops a command, as a line for the terminal."""


def report_command(args: argparse.Namespace) -> str:
    """Writes the page, and says where."""
    page = args.output or str(beside(list(map(Path, args.logs))))
    for log in args.logs:
        if os.path.exists(log) and os.path.exists(page) and os.path.samefile(log, page):
            raise Failure(f"{page} is the log: name another file for the page")
    names = run_names(args.logs)
    if args.follow:
        _follow(names, page, args)
    else:
        _write({name: _read(path) for name, path in names.items()}, page, args)
    return f"Wrote {printable(page)}"


def _write(
    logs: dict[str, LogData], page: str, args: argparse.Namespace, **more: Any
) -> None:
    with _needing("the report"):
        try:
            report(logs, page, title=args.title, **more)
        except OSError as error:
            raise Failure(reason(error, page)) from None


def _follow(names: dict[str, str], page: str, args: argparse.Namespace) -> None:
    """Writes the page again and again; the last one does not load itself again."""
    followers = {name: Follower(path) for name, path in names.items()}
    logs: dict[str, LogData] = {}
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            grown = False
            for name, follower in followers.items():
                with _failing(names[name]):
                    data = follower.look()
                if data is not None and len(data.step):
                    logs[name], grown = data, True
            if grown:
                _write(logs, page, args, refresh=args.every)
                jax.clear_caches()  # of replays of a log of this length
            time.sleep(args.every)
    if not logs:
        raise Failure(f"{next(iter(names.values()))}: the log has no steps yet.")
    _write(logs, page, args)


def watch_command(args: argparse.Namespace) -> str:
    """Follows a run, until it is told to stop."""
    with _needing("watch"), _failing(args.log):
        from optaxclip.audit._watch import watch

        watch(args.log, args.every)
    return ""


# What becomes of numbers that are too large depends on where they stand.
_TOO_LARGE = (MemoryError, OverflowError, RuntimeError, TypeError, ValueError)
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
            except _TOO_LARGE as error:
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
            suggested = suggest(data)
        except ValueError as error:
            raise Failure(f"{path}: {error}") from None
        fixed, percentile, remarks = suggested
        log, rules = printable(shlex.quote(path)), (fixed.rule, percentile.rule)
        options = " ".join(f"--rule {rule}" for rule in rules)
        text = suggested._replace(remarks=(*remarks, *_gaps(data)))
        parts = {"fixed": fixed._asdict(), "percentile": percentile._asdict()}
        said = f"{text}\nTry: optaxclip replay {log} {options}"
        return {**parts, "remarks": remarks}, said

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
    with _failing(path):
        data = read(path)
    if not len(data.step):
        raise Failure(f"{path}: the log has no steps yet.")
    return data


@contextlib.contextmanager
def _failing(path: str) -> Iterator[None]:
    """Within it, what `read` raises is a `Failure`."""
    try:
        yield
    except OSError as error:
        raise Failure(reason(error, path)) from None
    except ValueError as error:
        raise Failure(_without_call(str(error))) from None


@contextlib.contextmanager
def _needing(who: str) -> Iterator[None]:
    """Within it, a library that is not installed is a `Failure`."""
    try:
        yield
    except ImportError as error:
        tools = 'pip install "optaxclip[audit]"'
        raise Failure(f"{who} needs {error.name}: {tools}") from None


def reason(error: OSError, path: str | Path) -> str:
    """An error of the system as a line."""
    return f"{error.filename or path}: {_without_call(error.strerror or str(error))}"


def _without_call(message: str) -> str:
    """An error's text without the Python call that it begins with."""
    return re.sub(r"^`\w+\(path=\.\.\.\)`:? ", "", message)


def _gaps(data: LogData) -> list[str]:
    lost = count(data.missing, "step")
    return [f"{lost} missing from the log."] if data.missing else []


def _json(value: Any) -> str:
    text = json.dumps(finite_json(value), allow_nan=False, indent=2)
    return text.replace("\x7f", "\\u007f")  # of control characters the only one left
