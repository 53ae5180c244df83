"""The command line: `optaxclip report`, `replay`, `suggest`, `summary`, `watch`."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import optax

import optaxclip
from optaxclip.audit import _commands
from optaxclip.audit._text import printable, shown
from optaxclip.audit._what_if import SYNTAX, parse_rule


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
    version = f"optaxclip {optaxclip.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (run, purpose, example, options) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
            epilog=f"example: optaxclip {name} run.jsonl {example}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=run)
        for flags, settings in options.items():
            command.add_argument(*flags.split(), **settings)
    return parser


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


def _every(seconds: float, of: str) -> dict[str, Any]:
    text = f"how long to wait between two looks at the log{of} (default: {seconds:g})"
    return {"type": _seconds, "default": seconds, "metavar": "SECONDS", "help": text}


class _Command(NamedTuple):
    run: Callable[[argparse.Namespace], str]
    purpose: str
    example: str  # of its options
    options: dict[str, dict[str, Any]]  # by flags, as argparse takes them


_LOG = {"help": "a log, as optaxclip.audit.ClipLog wrote it"}
_LOGS = {"logs": {"nargs": "+", "metavar": "log", **_LOG}}
_JSON = {"--json": {"action": "store_true", "help": "print JSON instead"}}
_PAGE = "the page to write; by default beside the log, run.html for run.jsonl"
_FOLLOW = "write the page again whenever the log has grown, until Ctrl-C"
_RULE = f"{SYNTAX}; may be given several times"
_COMMANDS = {
    "report": _Command(
        _commands.report_command,
        "write the report, an HTML page",
        "-o run.html",
        {
            **_LOGS,
            "-o --output": {"metavar": "PAGE", "help": _PAGE},
            "--title": {"help": "the title of the page"},
            "--follow": {"action": "store_true", "help": _FOLLOW},
            "--every": _every(30.0, ", with --follow"),
        },
    ),
    "replay": _Command(
        _commands.replay_command,
        "show what other rules would have done with the norms of the run",
        "--rule constant:1.0 --rule quantile:0.95,1000",
        {
            **_LOGS,
            "--rule": {
                **{"action": "append", "required": True, "type": _rule},
                **{"metavar": "RULE", "dest": "rules", "help": _RULE},
            },
            **_JSON,
        },
    ),
    "suggest": _Command(
        _commands.suggest_command,
        "propose thresholds and say why",
        "",
        _LOGS | _JSON,
    ),
    "summary": _Command(
        _commands.summary_command,
        "say what stands out in the run",
        "",
        _LOGS | _JSON,
    ),
    "watch": _Command(
        _commands.watch_command,
        "follow a run that is still training",
        "",
        {"log": _LOG, "--every": _every(2.0, "")},
    ),
}


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
