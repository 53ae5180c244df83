"""`examples/fsdp.py`, run as a person runs it, on a model that takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optaxclip.audit import read

SCRIPT = Path(__file__).parents[2] / "examples" / "fsdp.py"
TINY = (
    "--cpu-devices 4 --steps 12 --save 4 --every 3 --spike 5 --nan 9 --kill 7 "
    "--batch 8 --context 16 --depth 1 --heads 2 --width 16"
)


def run(arguments: str, out: Path, **environment: str) -> subprocess.CompletedProcess:
    # Import the package under test, which need not be installed.
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, SCRIPT, *TINY.split(), *arguments.split(), "--out", out],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )


def table(stdout: str) -> dict[tuple[str, str], list[str]]:
    rows = [line.split() for line in stdout.splitlines()]
    return {
        (row[0], row[1]): row[2:] for row in rows if row[0].startswith(("fl", "bf"))
    }


def logs(out: Path, name: str):
    return read(out / f"{name}-sharded.jsonl"), read(out / f"{name}-alone.jsonl")


@pytest.mark.slow
def test_four_devices_clip_and_skip_as_one_does(tmp_path):
    done = run("--clip layer", tmp_path)
    assert done.returncode == 0, done.stderr
    stdout = done.stdout.replace("layer 0.5", "layer")
    rows = table(stdout.partition("\n\n")[0])
    assert list(rows) == [("float32", "layer"), ("bfloat16", "layer")]
    assert (tmp_path / "fsdp.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for (dtype, clip), row in rows.items():
        rounding = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
        seed, devices, share, _, clipped, skipped, norms, weights = row
        assert (seed, devices, skipped) == ("0", "4", "1")
        # A quarter of the matrices; norms and the recorder's columns are whole.
        assert 25 < float(share.rstrip("%")) < 75
        assert float(norms) < rounding
        assert 0 < float(weights) < rounding

        sharded, alone = logs(tmp_path, f"{dtype}-{clip}-seed0")
        assert sharded.metadata["transform"] == clip
        np.testing.assert_allclose(sharded.norm, alone.norm, rtol=rounding)
        np.testing.assert_array_equal(sharded.skipped, np.arange(12) == 9)
        assert sharded.clipped.sum() == int(clipped)
        # What one device alone has seen is clipped on all.
        assert sharded.clipped[5]
        assert sharded.norm[5] > 10 * np.nanmedian(sharded.norm)
        # The table of layers: six norms, each the same on four devices as on one.
        _, _, layers = stdout.partition(f"\n{dtype}, layer")
        lines = [line.split() for line in layers.partition("\n\n")[0].splitlines()[1:]]
        lines = [line for line in lines if len(line) == 4]
        names = ["blocks/0", "characters/embedding", "head/kernel"]
        assert [line[0] for line in lines][:3] == names
        assert all(float(line[3]) < rounding for line in lines)
        # The clip's own norm is the largest of them.
        assert max(float(line[2]) for line in lines) == pytest.approx(
            sharded.norm[5], rel=0.01
        )
        report = (tmp_path / f"{dtype}-{clip}-seed0-sharded.html").read_text()
        assert f"fsdp, {dtype}-{clip}-seed0" in report


@pytest.mark.slow
def test_two_processes_go_on_after_one_is_killed(tmp_path):
    done = run("--processes 2 --clip percentile --dtype float32", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "float32-percentile-seed0-sharded goes on from step 4" in done.stdout
    *_, norms, weights = table(done.stdout)["float32", "percentile"]
    assert float(norms) < 1e-4
    assert float(weights) < 1e-4
    sharded, alone = logs(tmp_path, "float32-percentile-seed0")
    assert sharded.metadata["process_count"] == 2
    assert sharded.step.tolist() == alone.step.tolist() == list(range(12))
    np.testing.assert_allclose(sharded.loss, alone.loss, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--clip glob", "['glob'] are not among ['percentile',"),
        ("--batch 6", "--batch and --width must be multiples of 4 (devices)"),
        ("--spike 12", "--spike must be between 0 and 11"),
    ],
)
def test_what_cannot_run_is_refused_at_once(tmp_path, arguments, message):
    done = run(arguments, tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
