"""What the benchmarks share: options, interleaved timing, the record, tables."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

HERE = Path(__file__).parent
Times = dict[Any, list[float]]


def arguments(doc: str, **options: tuple[Any, Any, str]) -> argparse.Namespace:
    """Options ``name=(default, default with --quick, help)``, and the common ones."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quick = "--quick" in sys.argv[1:]
    common = {"rounds": (15, 2, "timed rounds, after the warm-up")}
    for name, (full, small, text) in {**common, **options}.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(full),
            default=small if quick else full,
            help=f"{text} (default {full}, with --quick {small})",
        )
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args()


# --- timing ---------------------------------------------------------------------------


def interleave(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, least: float = 5e-3
) -> Times:
    """Seconds a call, for every round: each round times every call, in a new order.

    What disturbs a machine for longer than a call then falls on all of them alike.
    A call shorter than ``least`` is repeated to last as long. Warm-up is not timed.
    """
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        repeats[name] = max(1, math.ceil(least / _seconds(call, 1)))
    order, shuffle = list(calls), random.Random(0).shuffle
    times: Times = {name: [] for name in calls}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(_seconds(calls[name], repeats[name]))
    return times


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def fastest(times: Times, names: Sequence[str]) -> str:
    return min(names, key=lambda name: statistics.median(times[name]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio, taken round by round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


# --- the record -----------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Where, with what and on which commit a benchmark ran."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "numpy", "optax")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": device.platform,
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "cores": os.process_cpu_count()
        if hasattr(os, "process_cpu_count")
        else os.cpu_count(),
        "memory_gib": round(memory() / 2**30, 1),
        "python": platform.python_version(),
        **versions,
        **COMMIT,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def memory() -> int:
    """The bytes of memory of the device."""
    stats = jax.devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit", host)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> dict[str, Any]:
    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(HERE.parent), *command],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "optaxclip", "benchmarks/*.py")
        return {"commit": git("rev-parse", "HEAD"), "uncommitted": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "uncommitted": None}


COMMIT = _commit()  # of the code that was imported, whatever happens later


# --- tables ---------------------------------------------------------------------------


def cell(value: Any) -> str:
    """A number with three digits, a spread as ``median (q1-q3)``, a text as it is."""
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['q1']:.2f}-{value['q3']:.2f})"
    if isinstance(value, float):
        return (
            f"{value:.2f}" if 0.01 <= abs(value) < 1e4 or not value else f"{value:.1e}"
        )
    return "" if value is None else str(value)


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table of the ``columns`` (key -> heading) of rows."""
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        line[:] = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(
    doc: str,
    options: argparse.Namespace,
    tables: Sequence[tuple[str, Sequence[Mapping[str, Any]], Mapping[str, str]]],
    **also: Any,
) -> None:
    """Prints the tables (title, rows, columns), and writes them beside the JSON.

    ``also`` adds to the record of the environment, or corrects it.
    """
    script, where = Path(sys.argv[0]).stem, {**environment(), **also}
    place = re.sub(r"\W+", "-", where["device"].lower()).strip("-")
    out = options.out or HERE / "results" / f"{where['date'][:10]}-{place}-{script}"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "script": script,
        "environment": where,
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "tables": [{"title": title, "rows": rows} for title, rows, _ in tables],
    }
    lines = [f"# {script}: {doc.splitlines()[0]}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in where.items()), ""]
    for title, rows, columns in tables:
        lines += [f"## {title}", "", markdown(rows, columns), ""]
    text = "\n".join(lines)
    print(text)
    out.with_name(out.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_name(out.name + ".md").write_text(text)
    print(f"written: {out}.json, {out}.md")
