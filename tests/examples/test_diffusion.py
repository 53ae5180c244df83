"""`examples/diffusion.py`, run as a person runs it, on a model that takes seconds."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optaxclip.audit import read

pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parents[2] / "examples" / "diffusion.py"
TINY = (
    "--seeds 1 --steps 30 --every 10 --bad-step 25 --warmup 2 --batch 32 --width 16 "
    "--samples 4 --sampling-steps 5"
)


def run(arguments: str, out: Path, devices: int = 1) -> subprocess.CompletedProcess:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, SCRIPT, *TINY.split(), *arguments.split(), "--out", out],
        # Import the package under test, which need not be installed.
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )


def losses(folder: Path) -> dict[tuple[str, str], list[float]]:
    """Validation losses by clip and seed."""
    found = {}
    with open(folder / "validation.csv", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["clip"], row["seed"]), []).append(float(row["loss"]))
    return found


@pytest.mark.slow
def test_every_optimizer_meets_the_same_batches(tmp_path):
    done = run("--seeds 2", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[1:4]}
    assert list(rows) == ["none", "global", "percentile"]
    assert (tmp_path / "diffusion.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    found = losses(tmp_path)
    none = read(tmp_path / "none-seed0.jsonl")
    # One batch of the thirty is a thousand times too large.
    assert none.norm.argmax() == 25
    assert none.norm[25] > 50 * np.median(none.norm)
    assert not none.clipped.any()
    for name, row in rows.items():
        assert f"diffusion, {name}" in (tmp_path / f"{name}-seed0.html").read_text()
        log = read(tmp_path / f"{name}-seed0.jsonl")
        assert log.step.tolist() == list(range(30))
        assert (log.norm[0], log.loss[0]) == (none.norm[0], none.loss[0])
        key = "global 1" if name == "global" else name
        final = [found[key, seed][-1] for seed in "01"]
        assert final[0] != final[1]
        assert f"{np.mean(final):.3f} ± {np.std(final, ddof=1):.3f}" in row
        assert found[key, "0"][1] < found[key, "0"][0]  # it learns
    for name in ("global", "percentile"):
        log = read(tmp_path / f"{name}-seed0.jsonl")
        assert log.clipped[25]
        assert log.norm[25] * log.scale[25] < none.norm[25] / 50


@pytest.mark.slow
def test_only_a_skip_survives_a_batch_of_nan(tmp_path):
    done = run("--bad-factor nan --clip percentile,skip", tmp_path)
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path)
    assert np.isnan(found["percentile", "0"][-1])
    assert np.isfinite(found["skip", "0"]).all()
    log = read(tmp_path / "skip-seed0.jsonl")
    assert np.flatnonzero(log.skipped).tolist() == [25]


@pytest.mark.slow
def test_devices_share_a_batch_and_agree_with_one(tmp_path):
    one, eight = tmp_path / "one", tmp_path / "eight"
    for out, devices in ((one, 1), (eight, 8)):
        done = run("--clip global --steps 4 --every 2", out, devices)
        assert done.returncode == 0, done.stderr
    one, eight = (read(out / "global-seed0.jsonl") for out in (one, eight))
    # To the precision of bfloat16 activations and gradients.
    np.testing.assert_allclose(one.loss, eight.loss, rtol=1e-3)
    np.testing.assert_allclose(one.norm, eight.norm, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--clip none,glob", "['glob'] are not among ['none',"),
        ("--batch 3", "partitioned 2 times, but the dimension size is 3"),
        ("--warmup 30", "--steps must be above --warmup"),
        ("--every 31", "--steps must be above --warmup, and at least --every"),
    ],
)
def test_what_cannot_run_is_refused_at_once(tmp_path, arguments, message):
    done = run(arguments, tmp_path, devices=2)
    assert done.returncode == 1
    assert message in done.stderr
