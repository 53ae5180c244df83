"""`examples/digits_cnn.py`, run as a person runs it, on a model that takes seconds."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import optaxclip
from optaxclip.audit import read

SCRIPT = Path(__file__).parents[2] / "examples" / "digits_cnn.py"
TINY = (
    "--cpu-devices 2 --seeds 1 --steps 12 --every 5 --broken-every 5 --batch 16 "
    "--width 4 --rate 0.01"
)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with jax.numpy_rank_promotion("allow"):  # the example is no part of the package
        yield __import__(SCRIPT.stem)


def run(arguments: str, out: Path) -> subprocess.CompletedProcess:
    # Import the package under test, which need not be installed.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, SCRIPT, *TINY.split(), *arguments.split(), "--out", out],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )


def columns(path: Path) -> dict[str, np.ndarray]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]
    }


@pytest.mark.slow
def test_every_clip_meets_the_same_batches_and_holds_its_threshold(tmp_path):
    done = run("", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits_cnn.png").read_bytes().startswith(b"\x89PNG")
    lines = done.stdout.replace("global 1 ", "global ").splitlines()
    rows = [line.split() for line in lines]
    table = {row[0]: row[1:] for row in rows[1:5]}
    assert list(table) == ["none", "global", "percentile", "agc"]

    runs = {name: columns(tmp_path / f"{name}-seed0.csv") for name in table}
    none = runs["none"]
    for name, metrics in runs.items():
        np.testing.assert_array_equal(metrics["step"], np.arange(1, 13))
        # The same model and batch at the first step.
        for key in ("train_loss", "before/grad_norm"):
            np.testing.assert_allclose(metrics[key][0], none[key][0], rtol=1e-6)
        limit = metrics["clip/clip_threshold"] * (1 + 1e-5)
        assert (metrics["clip/clipped_grad_norm"] <= limit).all()
        # A validation after each stretch of five steps, and one after the rest.
        validated = ~np.isnan(metrics["val_error"])
        assert metrics["step"][validated].tolist() == [5, 10, 12]
        assert table[name][0] == f"{metrics['val_loss'][-1]:.3f}"
        assert table[name][1] == f"{metrics['val_error'][-1]:.1%}"
        assert table[name][2] == f"{metrics['clip/clip_fraction'][-1]:.1%}"
        assert table[name][4] == f"{metrics['before/grad_norm'].max():.3g}"
        assert table[name][5] == f"{metrics['after/grad_norm'].max():.3g}"

        log = read(tmp_path / f"{name}-seed0.jsonl")
        assert log.metadata["transform"] == name
        assert log.step.tolist() == list(range(12))
        np.testing.assert_allclose(log.norm, metrics["clip/grad_norm"], rtol=1e-6)
        np.testing.assert_allclose(log.loss, metrics["train_loss"], rtol=1e-6)
        page = (tmp_path / f"{name}-seed0.html").read_text()
        assert f"digits_cnn, {name}" in page

    # Batches 5 and 10 are broken: pixels 255 times too large.
    for name in ("global", "percentile", "agc"):
        norms = runs[name]["before/grad_norm"]
        assert norms[4] > 50 * norms[:4].max()
    gauges = none["after/grad_norm"], none["before/grad_norm"]
    np.testing.assert_allclose(*gauges, rtol=1e-6)
    assert (runs["global"]["after/grad_norm"] <= 1 + 1e-5).all()
    percentile = runs["percentile"]
    assert percentile["after/grad_norm"][4] < percentile["before/grad_norm"][4] / 10


@pytest.mark.slow
def test_devices_share_a_batch_and_agree_with_one(tmp_path):
    results = []
    for devices in (1, 4):
        out = tmp_path / str(devices)
        done = run(f"--clip percentile,agc --steps 4 --cpu-devices {devices}", out)
        assert done.returncode == 0, done.stderr
        results.append(
            {n: columns(out / f"{n}-seed0.csv") for n in ("percentile", "agc")}
        )
    for name in ("percentile", "agc"):
        for key in ("train_loss", "before/grad_norm", "after/grad_norm"):
            one, four = (result[name][key] for result in results)
            np.testing.assert_allclose(one, four, rtol=1e-3)


@pytest.mark.slow
def test_seeds_differ_and_the_table_gives_their_spread(tmp_path):
    done = run("--clip agc --seeds 2 --steps 2 --broken-every 0", tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = (
        columns(tmp_path / f"agc-seed{seed}.csv")["val_loss"][-1] for seed in (0, 1)
    )
    assert a != b
    assert f"{np.mean([a, b]):.3f} ± {np.std([a, b], ddof=1):.3f}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--clip none,glob", "['glob'] are not among ['none',"),
        ("--batch 3", "--batch must be a multiple of 2"),
    ],
)
def test_what_cannot_run_is_refused_at_once(tmp_path, arguments, message):
    done = run(arguments, tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.slow
def test_adaptive_clipping_leaves_the_head_to_a_fixed_bound(example):
    config = example.Config(clipping=0.04, max_norm=0.5, rate=1.0, momentum=0.0)
    _, params = example.new_model(config, seed=0)
    grads = jax.tree.map(lambda x: x + 1.0, params)
    tx = example.CLIPS["agc"](config)
    updates, _ = tx.update(grads, tx.init(params), params)
    bound = jax.tree.map(
        lambda norm: 0.04 * np.maximum(norm, 1e-3), optaxclip.unit_norm(params)
    )
    norms = optaxclip.unit_norm(updates)
    head = jax.tree.map(np.asarray, (grads["head"], updates["head"]))
    scale = 0.5 / np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(head[0])))
    assert scale < 1
    for grad, update in zip(*map(jax.tree.leaves, head), strict=True):
        np.testing.assert_allclose(update, -scale * grad, rtol=1e-5)
    for norm, limit in zip(
        *(jax.tree.leaves(tree["convs"]) for tree in (norms, bound)), strict=True
    ):
        np.testing.assert_allclose(norm, limit, rtol=1e-5)


def test_batches_are_broken_outside_the_training(example):
    images, labels, *valid = example.load_digits()
    assert images.shape == (1347, 8, 8, 1)
    assert valid[0].shape == (450, 8, 8, 1)
    assert images.min() == 0
    assert images.max() == 1
    config = example.Config(broken_every=3, batch=4)
    plain = example.training_batches(config, images, labels, seed=0)
    wrapped = example.training_batches(config, images, labels, seed=0)
    wrapped = example.broken(config, wrapped)
    for number in range(1, 8):
        (x, y), (broken_x, broken_y) = next(plain), next(wrapped)
        np.testing.assert_array_equal(y, broken_y)
        np.testing.assert_allclose(broken_x, x * (255 if number % 3 == 0 else 1))
