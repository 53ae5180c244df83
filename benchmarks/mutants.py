"""Which small faults in the library would its tests notice?

Puts one fault at a time (a mutant) into the norms, thresholds, kernel or transforms: a
comparison off by its boundary, another operator, a constant that is one too large, a
condition turned around, a statement left out. Then runs the tests that reach the line,
the quick ones first. A mutant is

- caught by default: a test fails that `pytest` runs,
- caught by a variant: only a test marked `slow` fails, as GitHub runs them all,
- not caught: no test fails. It is equivalent to the library, or a test is missing.

Prints the table; `--out` writes every mutant to a JSON file. Needs pytest-cov, and
hours: start it in a clone, since it reads the tests from the directory it runs in.
"""

import argparse
import ast
import bisect
import collections
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
PACKAGES = ("_norms", "_thresholds", "_kernel", "_transforms")
QUICK, REST = 20.0, 120.0  # seconds of tests, fastest first, in the passes of a mutant
BROKEN = 99  # exit status: it was not the tests that failed
LONGEST = 900  # seconds of a pass; a mutant that never ends is caught

SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult},
}
NAMES = {
    **{"minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"},
    **{"min": "max", "max": "min", "isfinite": "isnan", "sum": "max", "abs": "real"},
    **{"psum": "pmax", "pmax": "psum", "floor": "ceil", "ceil": "floor"},
    **{"zeros_like": "ones_like", "ones_like": "zeros_like", "sqrt": "square"},
}
KEY = ("file", "line", "column", "before", "after")


@dataclasses.dataclass
class Mutant:
    file: str  # below the root
    line: int
    column: int
    before: str
    after: str
    source: str = dataclasses.field(repr=False)  # of the whole file
    verdict: str = ""
    by: str = ""  # the test that failed


def mutants(path: Path) -> list[Mutant]:
    """All mutants of a file."""
    text, found = path.read_bytes(), []
    starts = [0]  # of the lines, in bytes as `ast` counts
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, after in Faults().of(ast.parse(text)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        changed = text[:start] + after.encode() + text[end:]
        file, before = path.relative_to(ROOT).as_posix(), text[start:end].decode()
        at = node.lineno, node.col_offset
        found.append(Mutant(file, *at, before, after, changed.decode()))
    return found


class Faults(ast.NodeVisitor):
    """The nodes of a module that can be changed, with the text that each becomes."""

    def of(self, tree: ast.Module) -> list[tuple[ast.AST, str]]:
        self.found = []
        self.visit(tree)
        return self.found

    def visit(self, node: ast.AST) -> None:
        match node:
            case ast.Raise() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
                return  # messages and names
            case ast.Expr(value=ast.Constant()):
                return  # a docstring
            case ast.Assign(value=ast.BinOp(op=ast.BitOr())):
                return  # a type
            case ast.If(test=ast.Name() | ast.Call() | ast.Attribute()):
                self.found.append((node.test, f"(not {ast.unparse(node.test)})"))
            case ast.Expr(value=ast.Call()):
                self.found.append((node, "pass"))
        if other := changed(node):
            self.found.append((node, f"({ast.unparse(other)})"))
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child)


def changed(node: ast.AST) -> ast.expr | None:
    """What an expression may become; nothing if it is to stay."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            return ast.Compare(node.left, [SWAPS[type(op)]()], node.comparators)
        case ast.BinOp(op=op) if type(op) in SWAPS:
            return ast.BinOp(node.left, SWAPS[type(op)](), node.right)
        case ast.BoolOp(op=op):
            return ast.BoolOp(SWAPS[type(op)](), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            return node.operand
        case ast.Constant(value=bool()):
            return ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            return ast.Constant(node.value + 1)
        case ast.IfExp():
            return ast.IfExp(node.test, node.orelse, node.body)
        case ast.Attribute(attr=name) if name in NAMES:
            return ast.Attribute(node.value, NAMES[name])
    return None


def reach(folder: Path) -> tuple[dict[str, dict[int, list[str]]], dict[str, float]]:
    """The tests that reach each line of each file, and the seconds of each test."""
    data, times = folder / "coverage", folder / "times.json"
    if not times.exists():
        (folder / "rc").write_text(f"[run]\nsource=optaxclip\ndata_file={data}\n")
        options = f"--cov=optaxclip --cov-config={folder}/rc --cov-context=test"
        options += f" --cov-report= -o junit_family=xunit1 --junitxml={folder}/xml"
        pytest = [sys.executable, "-m", "pytest", "-q", *options.split()]
        subprocess.run(pytest, check=True, cwd=ROOT)
        cases = ElementTree.parse(folder / "xml").iter("testcase")
        named = {
            f"{x.get('file')}::{x.get('name')}": float(x.get("time")) for x in cases
        }
        times.write_text(json.dumps(named))
    import coverage

    covered = coverage.CoverageData(str(data))
    covered.read()
    lines = {
        Path(file).relative_to(ROOT).as_posix(): {
            line: [x.removesuffix("|run").removesuffix("|setup") for x in contexts if x]
            for line, contexts in covered.contexts_by_lineno(file).items()
        }
        for file in covered.measured_files()
    }
    return lines, json.loads(times.read_text())


def passes(mutant: Mutant, lines: dict, times: dict[str, float]) -> list[list[str]]:
    """The tests for a mutant: the fastest, others, and variants that are slow."""
    tests = set(lines.get(mutant.file, {}).get(mutant.line, ())) & set(times)
    ordered = sorted(tests, key=times.__getitem__)
    until = list(itertools.accumulate(times[test] for test in ordered))
    quick = bisect.bisect_right(until, max(QUICK, until[0])) if until else 0
    rest = bisect.bisect_right(until, REST)
    functions = list(dict.fromkeys(test.partition("[")[0] for test in ordered))
    slow = ["-mslow", *functions] if functions else []
    return [ordered[:quick], ordered[quick:rest], slow]


def child(place: Path, tests: list[str], log: Path) -> None:
    """Runs tests with the package of a place; never returns."""
    signal.alarm(LONGEST)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["PYTHONPATH"] = str(place)
    sys.path.insert(0, str(place))
    os.chdir(ROOT)
    try:
        import pytest

        options = "-x -q -n0 -pno:cacheprovider --no-cov --tb=no -m="
        status = int(pytest.main([*options.split(), *tests]))
    except BaseException:
        traceback.print_exc()
        status = BROKEN
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def warm(cache: Path) -> None:
    """Imports what tests import, once for all; no JAX backend is made here.

    Mutants share what they compile: a fault changes few programs.
    """
    flag = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flag
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    import chex  # noqa: F401
    import flax.nnx  # noqa: F401
    import matplotlib.figure  # noqa: F401


class Worker:
    """A copy of the package, into which one mutant after another is put."""

    def __init__(self, folder: Path, number: int) -> None:
        self.place = folder / f"worker{number}"
        shutil.copytree(
            ROOT / "optaxclip", self.place / "optaxclip", dirs_exist_ok=True
        )
        self.log = folder / f"worker{number}.log"
        self.mutant: Mutant | None = None

    def start(self, mutant: Mutant, todo: list[tuple[str, list[str]]]) -> int:
        self.mutant, self.todo = mutant, todo
        (self.place / mutant.file).write_text(mutant.source)
        return self.fork()

    def fork(self) -> int:
        process = os.fork()
        if not process:
            child(self.place, self.todo[0][1], self.log)
        return process

    def ended(self, status: int) -> int | None:
        """Takes the result of a pass; the process of the next one, if there is."""
        verdict, _ = self.todo.pop(0)
        code = os.waitstatus_to_exitcode(status)
        if code in (BROKEN, 3):  # 3: pytest's own error
            raise SystemExit(self.log.read_text())
        if code not in (0, 5):  # 5: no slow variants
            words = self.log.read_text(errors="replace").split()
            at = [i for i, word in enumerate(words) if word in ("FAILED", "ERROR")]
            self.mutant.by = words[at[-1] + 1] if at else f"exit status {code}"
            self.mutant.verdict = verdict
        elif self.todo:
            return self.fork()
        else:
            self.mutant.verdict = "not caught"
        original = (ROOT / self.mutant.file).read_text()
        (self.place / self.mutant.file).write_text(original)
        return None


def run(
    chosen: list[Mutant], folder: Path, jobs: int, variants: bool, save: Callable
) -> None:
    lines, times = reach(folder)
    warm(folder / "compiled")
    queue = list(reversed(chosen))
    free = [Worker(folder, n) for n in range(jobs)]
    busy: dict[int, Worker] = {}
    while queue or busy:
        while queue and free:
            mutant = queue.pop()
            quick, rest, slow = passes(mutant, lines, times)
            todo = [("default", quick), ("default", rest)]
            todo += [("variant", slow)] if variants else []
            todo = [(verdict, tests) for verdict, tests in todo if tests]
            if not todo:
                mutant.verdict = "not reached"
                continue
            worker = free.pop()
            busy[worker.start(mutant, todo)] = worker
        if not busy:
            break
        process, status = os.wait()
        worker = busy.pop(process)
        following = worker.ended(status)
        if following is not None:
            busy[following] = worker
        else:
            free.append(worker)
            save(worker.mutant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--variants", action="store_true", help="slow tests, too")
    parser.add_argument("--none", action="store_true", help="put no fault into it")
    parser.add_argument("--only", default="", help="a part of the path of a file")
    parser.add_argument("--folder", type=Path, help="keeps coverage for the next run")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    args = parser.parse_args()
    files = [
        x for name in PACKAGES for x in sorted((ROOT / "optaxclip" / name).glob("*.py"))
    ]
    every = [x for file in files if args.only in str(file) for x in mutants(file)]
    chosen = random.Random(args.seed).sample(every, min(args.count, len(every)))
    if args.none:  # the same tests have to pass without a fault
        chosen = [
            dataclasses.replace(x, source=(ROOT / x.file).read_text()) for x in chosen
        ]
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(chosen)} of {len(every)} mutants", flush=True)
    done: list[Mutant] = []
    if args.out.exists():  # it goes on
        known = {
            tuple(row[x] for x in KEY): row for row in json.loads(args.out.read_text())
        }
        for mutant in chosen:
            if row := known.get(tuple(getattr(mutant, x) for x in KEY)):
                mutant.verdict, mutant.by = row["verdict"], row["by"]
                done.append(mutant)
    began = time.monotonic()

    def save(mutant: Mutant) -> None:
        done.append(mutant)
        rows = [dataclasses.asdict(x) for x in done]
        for row in rows:
            del row["source"]
        args.out.write_text(json.dumps(rows, indent=1))
        at = f"{time.monotonic() - began:5.0f} s {mutant.verdict:10}"
        what = (
            f"{mutant.file}:{mutant.line} {mutant.before[:60]!r} {mutant.after[:60]!r}"
        )
        print(at, what, mutant.by, flush=True)

    run([x for x in chosen if not x.verdict], folder, args.jobs, args.variants, save)
    for verdict, count in collections.Counter(x.verdict for x in chosen).most_common():
        print(f"{verdict:12}{count:5}{count / len(chosen):8.1%}")


if __name__ == "__main__":
    main()
