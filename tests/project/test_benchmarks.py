"""Every benchmark runs, small, and records what its tables are made of."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import _hlo
import pytest

ROOT = Path(__file__).resolve().parents[2]

# script -> (options beside --quick, what every row has to hold)
SCRIPTS = {
    "overhead": ([], ["name", "bytes", "temp", "time"]),
    "norms": (
        ["--dtypes", "bfloat16"],
        ["name", "bandwidth", "share", "bytes", "temp"],
    ),
    "quantile": (["--windows", "100"], ["window", "name", "call", "ratio"]),
    "compile": ([], ["leaves", "name", "trace", "lower", "compile", "instructions"]),
    "contrib_bytes": ([], ["name", "bytes", "temp", "state"]),
    "scaling": (["--ways", "jit"], ["devices", "way", "name", "collectives", "temp"]),
    "tpu_compile": ([], ["name", "moved", "temp", "fusions", "all_reduces"]),
    "tpu_schedule": ([], ["name", "moved", "beyond", "temp"]),
    "gpu_compile": ([], ["name", "moved", "temp", "fusions", "graphs", "waits"]),
    "examples_compile": ([], ["name", "state", "moved", "temp", "others"]),
}
COMPILERS = {
    "tpu_compile": ["libtpu"],
    "tpu_schedule": ["libtpu"],
    "gpu_compile": ["jax_cuda13_plugin"],
    "examples_compile": ["libtpu", "jax_cuda13_plugin"],
}


@pytest.fixture(scope="module", params=SCRIPTS)
def record(request, tmp_path_factory):
    options, fields = SCRIPTS[request.param]
    compilers = COMPILERS.get(request.param, ["jax"])
    if not any(map(importlib.util.find_spec, compilers)):
        pytest.skip(f"the compiler, {' or '.join(compilers)}, is not installed")
    out = tmp_path_factory.mktemp("benchmarks") / request.param
    environment = dict(os.environ)
    environment.pop("XLA_FLAGS", None)  # the eight devices of the tests
    script = ROOT / "benchmarks" / f"{request.param}.py"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--out", out, *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = out.with_suffix(".md").read_text()
    assert table in done.stdout
    return json.loads(out.with_suffix(".json").read_text()), fields


@pytest.mark.sample(1)
@pytest.mark.slow
def test_a_benchmark_records_where_it_ran_and_what_it_measured(record):
    written, fields = record
    where = written["environment"]
    assert {"date", "device", "python", "jax", "optax", "commit", "command"} <= set(
        where
    )
    assert written["options"]["quick"]
    assert written["tables"]
    for table in written["tables"]:
        names = [row["name"] for row in table["rows"]]
        theirs = {"np.percentile", "fsdp"}  # an example is compared with nothing
        assert any(name.startswith("optax.") or name in theirs for name in names)
        for row in table["rows"]:
            assert set(fields) <= set(row)
            for value in row.values():
                if isinstance(value, dict) and "median" in value:
                    assert 0 < value["q1"] <= value["median"] <= value["q3"]


PROGRAM = """\
HloModule step

%body (p: (f32[8], f32[4])) -> (f32[8], f32[4]) {
  %p = (f32[8]{0:T(8,128)}, f32[4]{0:T(8,128)}) parameter(0)
  %g = f32[8]{0:T(8,128)} get-tuple-element(%p), index=0
  ROOT %t = f32[4]{0:T(8,128)} fusion(%g), kind=kLoop, calls=%f
}

ENTRY %main (a: f32[8], b: bf16[8]) -> f32[8] {
  %a = f32[8]{0:T(8,128)} parameter(0)
  %b = bf16[8]{0:T(8,128)} parameter(1)
  %w = (f32[8]{0:T(8,128)}, f32[4]{0:T(8,128)}) while(%a), condition=%c, body=%body
  %s = (bf16[8]{0:T(8,128)S(1)}, bf16[8]{0:T(8,128)}, u32[]{:S(2)}) copy-start(%b)
  %d = bf16[8]{0:T(8,128)S(1)} copy-done(%s)
  %r = f32[8]{0} all-reduce(%a), to_apply=%add
  %n = ((bf16[8]{0}), bf16[8]{0}) all-reduce-start(%b), to_apply=%add
  %e = bf16[8]{0} all-reduce-done(%n)
  ROOT %o = f32[8]{0:T(8,128)} fusion(%r, %d), kind=kLoop, calls=%f
}
"""


def test_bytes_of_main_memory_are_counted_once():
    # The loop reads 8 and writes 4 floats; 8 halves are fetched; the all-reduce and the
    # last fusion read 8 and write 8 floats each, the fetched halves not again; the
    # other all-reduce reads and writes 8 halves.
    assert _hlo.Program(PROGRAM).bytes_moved() == 48 + 16 + 64 + 64 + 32


RARE = """\
%again (a: f32[8]) -> f32[] {
  %a = f32[8] parameter(0)
  %s = f32[] reduce(%a), to_apply=%add
  ROOT %r = f32[] all-reduce(%s), to_apply=%add
}

%not (n: f32[]) -> f32[] {
  ROOT %n = f32[] parameter(0)
}

ENTRY %main (p: pred[], a: f32[8], n: f32[]) -> f32[] {
  %p = pred[] parameter(0)
  %a = f32[8] parameter(1)
  %n = f32[] parameter(2)
  ROOT %c = f32[] conditional(%p, %a, %n), SCOPE
}
"""


@pytest.mark.parametrize(("scope", "moved", "reduced"), [("x", 44, 1), ("RARE", 0, 0)])
@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%again, %not}",
        "true_computation=%not, false_computation=%again",
    ],
)
def test_sums_taken_again_are_no_part_of_an_ordinary_step(
    scope, moved, reduced, branches
):
    scope = (
        f'{branches}, metadata={{op_name="{_hlo.RARE if scope == "RARE" else scope}"}}'
    )
    program = _hlo.Program(RARE.replace("SCOPE", scope))
    assert program.bytes_moved() == moved
    assert sum(line.op == "all-reduce" for line in program.ordinary()) == reduced


def test_collectives_are_counted_with_their_bytes():
    class Program:
        def as_text(self):
            return PROGRAM

        def cost_analysis(self):
            return {"bytes accessed": 1.0}

        def memory_analysis(self):
            return type("Memory", (), {"temp_size_in_bytes": 2})

    counted = _hlo.figures(Program())
    # Of the one that is only started the result counts, not the operand in its type.
    assert counted["collectives"] == {"all-reduce": {"count": 2, "bytes": 32 + 16}}
    assert counted["fusions"] == 2
