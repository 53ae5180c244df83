"""`examples/char_lm.py`, run as a person runs it, on a model that takes seconds."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optaxclip.audit import read

SCRIPT = Path(__file__).parents[2] / "examples" / "char_lm.py"
TINY = (
    "--steps 12 --every 5 --warmup 2 --batch 8 --block 16 --layers 1 --heads 2 "
    "--width 16 --val-batches 1 --corpus-mb 1 --broken-share 0.1"
)


def run(arguments: str, out: Path, devices: int = 1) -> subprocess.CompletedProcess:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, SCRIPT, *TINY.split(), *arguments.split(), "--out", out],
        # Import the package under test, which need not be installed.
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def columns(path: Path) -> dict[str, np.ndarray]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]
    }


# One test: each part needs all the runs, and workers do not share them.
def test_every_clip_meets_the_same_batches_and_holds_its_threshold(tmp_path):
    done = run("--clip none,value,global,leaf", tmp_path)
    assert done.returncode == 0, done.stderr

    rows = [line.split() for line in done.stdout.splitlines()]
    table = {row[0]: row[1:] for row in rows[1:5]}
    assert list(table) == ["none", "value", "global", "leaf"]
    assert (tmp_path / "char_lm.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    runs = {name: columns(tmp_path / f"{name}-seed0.csv") for name in table}
    none = runs["none"]
    for name, metrics in runs.items():
        np.testing.assert_array_equal(metrics["step"], np.arange(1, 13))
        # The same model and batch at the first step, and the same breaks throughout.
        assert metrics["train_loss"][0] == none["train_loss"][0]
        assert metrics["before/grad_norm"][0] == none["before/grad_norm"][0]
        np.testing.assert_array_equal(metrics["bad"], none["bad"])
        # What the clip bounds stays below its threshold, to within a rounding.
        norms, thresholds = (
            metrics["clip/clipped_grad_norm"],
            metrics["clip/clip_threshold"],
        )
        assert (norms <= thresholds * (1 + 1e-5)).all()
        # A validation after each stretch of five steps, and one after the rest.
        validated = ~np.isnan(metrics["val_loss"])
        assert metrics["step"][validated].tolist() == [5, 10, 12]
        assert table[name][0] == f"{metrics['val_loss'][-1]:.3f}"
        assert table[name][1] == table[name][0]  # no batch of 0/0 among so few
        assert table[name][2] == f"{metrics['clip/clip_fraction'][-1]:.1%}"
        assert table[name][3] == "0.0"
        assert table[name][4] == f"{metrics['before/grad_norm'].max():.0f}"
        assert table[name][5] == f"{metrics['after/grad_norm'].max():.1f}"

        log = read(tmp_path / f"{name}-seed0.jsonl")
        assert log.metadata["transform"] == name
        assert log.step.tolist() == list(range(12))
        for key, column in [
            ("clip/grad_norm", log.norm),
            ("clip/clip_threshold", log.threshold),
            ("clip/clip_scale", log.scale),
            ("train_loss", log.loss),
        ]:
            np.testing.assert_allclose(column, metrics[key], rtol=1e-6)
        before = np.sqrt(np.sum(np.square(log.leaf_norms), axis=1))
        np.testing.assert_allclose(before, metrics["before/grad_norm"], rtol=1e-5)
        page = (tmp_path / f"{name}-seed0.html").read_text()
        assert f"char_lm, {name}" in page

    # One batch of the twelve is broken: one token of 128 is left.
    assert none["bad"].sum() == 1
    spike = none["before/grad_norm"][none["bad"] == 1]
    assert spike > 50 * np.median(none["before/grad_norm"])
    gauges = none["after/grad_norm"], none["before/grad_norm"]
    np.testing.assert_allclose(*gauges, rtol=1e-6)  # one of them from leaf norms
    assert none["clip/clip_count"][-1] == 0
    # The second gauge measures what the clip let through.
    assert (runs["global"]["after/grad_norm"] <= 1 + 1e-5).all()
    for name in ("value", "leaf"):
        before, after = (runs[name][f"{key}/grad_norm"] for key in ("before", "after"))
        broken = runs[name]["bad"] == 1
        assert (after <= before * (1 + 1e-5)).all()
        assert after[broken] < before[broken] / 10


def test_a_batch_of_nan_ends_a_run_that_does_not_skip_it(tmp_path):
    done = run("--clip percentile,skip --nan-share 0.1 --seeds 2", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nan ± nan" in done.stdout
    runs = {n: columns(tmp_path / f"{n}-seed0.csv") for n in ("percentile", "skip")}
    for metrics in runs.values():
        assert np.isnan(metrics["train_loss"]).any()
    assert np.isnan(runs["percentile"]["val_loss"][-1])
    assert np.isfinite(runs["skip"]["val_loss"][-1])
    assert runs["skip"]["skip_count"][-1] == 1
    # Until then the two are one.
    first = int(np.flatnonzero(np.isnan(runs["skip"]["train_loss"]))[0])
    for key in ("train_loss", "clip/clip_threshold", "after/grad_norm"):
        a, b = (runs[name][key][:first] for name in runs)
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_devices_share_a_batch_and_agree_with_one(tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    for out, devices in ((one, 1), (four, 4)):
        done = run("--clip global --steps 4 --dtype float32", out, devices)
        assert done.returncode == 0, done.stderr
    one, four = (columns(out / "global-seed0.csv") for out in (one, four))
    for key in ("train_loss", "before/grad_norm", "after/grad_norm"):
        np.testing.assert_allclose(one[key], four[key], rtol=1e-4)


def test_seeds_differ_and_the_table_gives_their_spread(tmp_path):
    done = run("--clip global --seeds 2 --steps 4 --dtype bfloat16", tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [
        columns(tmp_path / f"global-seed{seed}.csv")["val_loss"][-1] for seed in (0, 1)
    ]
    assert losses[0] != losses[1]
    expected = f"{np.mean(losses):.3f} ± {np.std(losses, ddof=1):.3f}"
    assert expected in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--clip none,glob", "['glob'] are not among ['none',"),
        ("--batch 3", "--batch must be a multiple of 2"),
    ],
)
def test_what_cannot_run_is_refused_at_once(tmp_path, arguments, message):
    done = run(arguments, tmp_path, devices=2)
    assert done.returncode == 2
    assert message in done.stderr
