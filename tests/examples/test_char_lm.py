"""`examples/char_lm.py`, run as a person runs it, on a model that takes seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optaxclip.audit import read

SCRIPT = Path(__file__).parents[2] / "examples" / "char_lm.py"
TINY = (
    "--steps 12 --every 5 --warmup 2 --batch 8 --context 16 --depth 1 --heads 2 "
    "--width 16 --broken-share 0.1"
)


def start(arguments: str, out: Path, devices: int = 1) -> subprocess.CompletedProcess:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, SCRIPT, *TINY.split(), *arguments.split(), "--out", out],
        # Import the package under test, which need not be installed.
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )


def cells(line: str) -> list[str]:
    """Between them are two spaces or more: a name may have one in it."""
    return re.split(r"  +", line)


def run(arguments: str, out: Path, devices: int = 1) -> dict[str, list[str]]:
    """The table, a row a clip."""
    done = start(arguments, out, devices)
    assert done.returncode == 0, done.stderr
    assert (out / "char_lm.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = done.stdout.splitlines()
    return {name: rest for name, *rest in map(cells, lines[1:-1])}


# One test: each part needs all the runs, and workers do not share them.
@pytest.mark.slow
def test_every_clip_meets_the_same_batches_and_holds_its_threshold(tmp_path):
    table = run("--clip none,global,value,leaf", tmp_path)
    assert list(table) == ["none", "global 1", "value", "leaf"]
    table["global"] = table.pop("global 1")
    logs = {name: read(tmp_path / f"{name}-seed0.jsonl") for name in table}
    none = logs["none"]
    # One batch of the twelve is broken, and not the one whose loss is looked at below.
    huge = none.loss > 100
    assert huge.sum() == 1
    assert not huge[0]
    for name, log in logs.items():
        assert log.metadata["transform"] == name
        assert log.step.tolist() == list(range(12))
        # The same model and batch at the first step, and the same breaks throughout.
        assert log.loss[0] == none.loss[0]
        np.testing.assert_array_equal(log.loss > 100, huge)
        # What the clip bounds stays below its threshold, to within a rounding.
        assert (log.norm * log.scale <= log.threshold * (1 + 1e-5)).all()
        loss, clipped, skipped, before, after = table[name]
        assert 2 < float(loss) < 6
        assert (clipped, skipped) == (f"{log.clipped.mean():.1%}", "0.0")
        assert before == f"{log.norm.max():.0f}"
        assert after == f"{(log.norm * log.scale).max():.1f}"
        page = (tmp_path / f"{name}-seed0.html").read_text()
        assert f"char_lm, {name}" in page
    # About a thousandfold, in the loss and in the gradient.
    assert 300 < none.loss[huge] / np.median(none.loss) < 3000
    assert 300 < none.norm[huge] / np.median(none.norm) < 10000
    assert not none.clipped.any()
    assert logs["global"].clipped[huge]
    assert (logs["global"].threshold == 1).all()


@pytest.mark.slow
def test_a_batch_of_nan_ends_a_run_that_does_not_skip_it(tmp_path):
    table = run("--clip percentile,skip --nan-share 0.1 --seeds 2", tmp_path)
    logs = [read(tmp_path / f"{name}-seed0.jsonl") for name in table]
    (first,) = np.flatnonzero(np.isnan(logs[1].loss))
    assert first >= 9  # late
    assert table["percentile"][0] == "nan ± nan"
    assert "nan" not in table["skip"][0]
    assert table["skip"][2] == "1.0"
    assert logs[1].skipped.tolist() == [step == first for step in range(12)]
    # Until then the two are one.
    for name in ("loss", "norm", "threshold"):
        a, b = (getattr(log, name)[:first] for log in logs)
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow
def test_devices_share_a_batch_and_agree_with_one(tmp_path):
    logs = []
    for devices in (1, 8):
        run("--clip global --steps 4", tmp_path / str(devices), devices)
        logs.append(read(tmp_path / str(devices) / "global-seed0.jsonl"))
    for name in ("loss", "norm", "scale"):
        one, eight = (getattr(log, name) for log in logs)
        np.testing.assert_allclose(one, eight, rtol=1e-4)


@pytest.mark.slow
def test_seeds_differ_and_the_table_gives_their_spread(tmp_path):
    table = run("--clip global --seeds 2 --steps 4 --dtype bfloat16", tmp_path)
    _, sign, deviation = table["global 1"][0].split()
    assert sign == "±"
    assert 0 < float(deviation) < 1
    logs = [read(tmp_path / f"global-seed{seed}.jsonl") for seed in (0, 1)]
    assert logs[0].loss[0] != logs[1].loss[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--clip none,glob", "['glob'] are not among ['none',"),
        ("--batch 3", "partitioned 2 times, but the dimension size is 3"),
    ],
)
def test_what_cannot_run_is_refused_at_once(tmp_path, arguments, message):
    done = start(arguments, tmp_path, devices=2)
    assert done.returncode == 1
    assert message in done.stderr
