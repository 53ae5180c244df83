"""The command line: `optaxclip report`, `replay`, `suggest`, `summary`, `watch`."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
import optax

import optaxclip
from optaxclip.audit import _commands
from optaxclip.audit._text import printable, shown
from optaxclip.audit._what_if import SYNTAX, parse_rule

_LOG = "a log, as optaxclip.audit.ClipLog wrote it"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors can be printed, whatever the arguments are."""

    def error(self, message: str) -> NoReturn:
        """Prints it and exits with status 2."""
        super().error(shown(message, 1000))


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
            if text := args.command(args):
                _print(text)
    except _commands.Failure as failure:
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
        commands,
        "report",
        _commands.report_command,
        "write the report, an HTML page",
        "-o run.html",
    )
    report.add_argument(
        "-o",
        "--output",
        metavar="PAGE",
        help="the page to write; by default beside the log, run.html for run.jsonl",
    )
    report.add_argument("--title", help="the title of the page")
    replay = _command(
        commands,
        "replay",
        _commands.replay_command,
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
        _command(
            commands,
            "suggest",
            _commands.suggest_command,
            "propose thresholds and say why",
        ),
        _command(
            commands,
            "summary",
            _commands.summary_command,
            "say what stands out in the run",
        ),
    ]
    for command in texts:
        command.add_argument("--json", action="store_true", help="print JSON instead")
    watch = _command(
        commands,
        "watch",
        _commands.watch_command,
        "follow a run that is still training",
        "",
    )
    watch.add_argument(
        "--every",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="how long to wait between two looks at the log (default: 2 seconds)",
    )
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
    if name == "watch":
        command.add_argument("log", help=_LOG)
    else:
        command.add_argument("logs", nargs="+", metavar="log", help=_LOG)
    return command


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def _rule(text: str) -> tuple[str, optax.GradientTransformation]:
    try:
        return text, parse_rule(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
        raise _commands.Failure(_commands.reason(error, "standard output")) from None
