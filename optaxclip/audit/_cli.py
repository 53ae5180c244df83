"""The command line: `optaxclip report`, `replay`, `suggest` and `summary` of a log."""

import argparse
import io
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax

import optaxclip
from optaxclip.audit._log import LogData, read
from optaxclip.audit._report import (
    findings,
    summary_text,
)
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._text import count, finite_json, printable, shown
from optaxclip.audit._what_if import (
    SYNTAX,
    compare,
    optimizer_of,
    outcome,
    outcome_table,
    parse_rule,
    suggest,
)

_LOG = "the log, as optaxclip.audit.ClipLog wrote it"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors can be printed, whatever the arguments are."""

    def error(self, message: str) -> NoReturn:
        """Prints it and exits with status 2."""
        super().error(shown(message, 1000))


class _Failure(Exception):
    """What stops a command, as a line for the terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: Its arguments; by default those of the process, which then keeps to the CPU:
        the accelerator may be taken by the very run that is looked at.

    Returns:
      The exit status: 0, or 1 if the log cannot be read or the output be written.

    Raises:
      SystemExit: with status 2, the arguments are wrong; with 0, after ``--help``.
    """
    if argv is None:
        jax.config.update("jax_platforms", "cpu")
    args = _parser().parse_args(argv)
    try:
        with np.errstate(all="ignore"):  # of norms at the ends of float64
            _print(args.command(args))
    except _Failure as failure:
        print(printable(f"optaxclip: {failure}"), file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="optaxclip", description="Shows what gradient clipping did in a run."
    )
    parser.add_argument(
        "--version", action="version", version=f"optaxclip {optaxclip.__version__}"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    report = _command(
        commands, "report", _report, "write the report, a page of HTML", "-o run.html"
    )
    report.add_argument(
        "-o", "--output", required=True, metavar="PAGE", help="the page to write"
    )
    report.add_argument("--title", help="its title")
    replay = _command(
        commands,
        "replay",
        _replay,
        "show what other rules would have done with the norms of the run",
        "--rule constant:1.0 --rule quantile:0.95,1000",
    )
    replay.add_argument(
        "--rule",
        action="append",
        required=True,
        type=_rule,
        metavar="RULE",
        dest="rules",
        help=f"{SYNTAX}; may be given several times",
    )
    texts = [
        replay,
        _command(commands, "suggest", _suggest, "propose thresholds and say why"),
        _command(commands, "summary", _summary, "say what stands out in the run"),
    ]
    for command in texts:
        command.add_argument("--json", action="store_true", help="print JSON instead")
    return parser


def _command(
    commands: Any, name: str, run: Callable, purpose: str, options: str = ""
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=f"example: optaxclip {name} run.jsonl {options}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run)
    command.add_argument("log", help=_LOG)
    return command


def _rule(text: str) -> tuple[str, optax.GradientTransformation]:
    try:
        return text, parse_rule(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _report(args: argparse.Namespace) -> str:
    data = _read(args.log)
    if os.path.exists(args.output) and os.path.samefile(args.log, args.output):
        raise _Failure(f"{args.output} is the log: name another file for the page")
    try:
        from optaxclip.audit._report import report

        written = report(data, args.output, title=args.title)
        return f"Wrote {printable(str(written))}"
    except ImportError as error:
        if "matplotlib" not in str(error):
            raise
        hint = 'pip install "optaxclip[audit]"'
        raise _Failure(f"the report needs matplotlib: {hint}") from None
    except OSError as error:
        raise _Failure(_reason(error, args.output)) from None


def _replay(args: argparse.Namespace) -> str:
    data = _read(args.log)
    outcomes = [outcome("recorded", data.norm, data.scale, data.clipped)]
    for text, rule in args.rules:
        try:
            outcomes += compare({text: rule}, data.norm)
        # What becomes of numbers that are too large depends on where they stand.
        except (
            MemoryError,
            OverflowError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise _Failure(f"the rule {text} cannot be replayed: {error}") from None
    if args.json:
        return _json(
            {"steps": len(data.step), "outcomes": [o._asdict() for o in outcomes]}
        )
    return "\n".join([outcome_table(outcomes), *_gaps(data)])


def _suggest(args: argparse.Namespace) -> str:
    data = _read(args.log)
    try:
        fixed, percentile, remarks = suggest(data.norm, optimizer_of(data))
    except ValueError as error:
        raise _Failure(f"{args.log}: {error}") from None
    if args.json:
        return _json(
            {
                "fixed": fixed._asdict(),
                "percentile": percentile._asdict(),
                "remarks": remarks,
            }
        )
    lines = []
    for suggestion in (fixed, percentile):
        lines += [suggestion.setting, _indented(suggestion.reason)]
    if cautions := [*remarks, *_gaps(data)]:
        lines += ["Caution:", *map(_indented, cautions)]
    log = printable(shlex.quote(args.log))
    rules = f"--rule {fixed.rule} --rule {percentile.rule}"
    return "\n".join([*lines, f"Try: optaxclip replay {log} {rules}"])


def _summary(args: argparse.Namespace) -> str:
    data = _read(args.log)
    if not args.json:
        return summary_text(data)
    return _json(
        {
            "statistics": stats.statistics(data)._asdict(),
            "findings": [finding._asdict() for finding in findings(data)],
            "missed": data.missed,
            "rewritten": data.rewritten,
            "torn": data.torn,
            "metadata": data.metadata,
        }
    )


def _print(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names have any character
    try:
        print(printable(text, keep="\n"), flush=True)
    except OSError as error:
        # What is left goes nowhere when the interpreter flushes it in the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise _Failure(_reason(error, "standard output")) from None


def _read(path: str) -> LogData:
    try:
        data = read(path)
    except OSError as error:
        raise _Failure(_reason(error, path)) from None
    except ValueError as error:
        raise _Failure(_without_call(str(error))) from None
    if not len(data.step):
        raise _Failure(f"{path}: the log has no steps yet.")
    return data


def _reason(error: OSError, path: str | Path) -> str:
    return f"{error.filename or path}: {_without_call(error.strerror or str(error))}"


def _without_call(message: str) -> str:
    """An error's text without the Python call that it begins with."""
    return re.sub(r"^`\w+\(path=\.\.\.\)`:? ", "", message)


def _gaps(data: LogData) -> list[str]:
    lost = sum(last - first + 1 for first, last in data.missed)
    return [f"{count(lost, 'step')} missing from the log."] if lost else []


def _indented(text: str) -> str:
    return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="  ")


def _json(value: dict[str, Any]) -> str:
    text = json.dumps(finite_json(value), allow_nan=False, indent=2)
    return text.replace("\x7f", "\\u007f")  # of control characters the only one left
