"""`examples/temporal_order.py`, run as a person runs it, for seconds."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from optaxclip.audit import read

SCRIPT = Path(__file__).parents[2] / "examples" / "temporal_order.py"
TINY = "--lengths 10 --seeds 4 --updates 40 --every 20 --check 100"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with jax.numpy_rank_promotion("allow"):  # the example is no part of the package
        yield __import__(SCRIPT.stem)


def run(arguments: str, out: Path, devices: int = 1) -> subprocess.CompletedProcess:
    arguments = f"{TINY} {arguments} --cpu-devices {devices}"
    # Import the package under test, which need not be installed.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments.split(), "--out", out],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )


def columns(out: Path, clip: str, length: int = 10) -> dict[str, np.ndarray]:
    """The columns of a run, of shape (checks, seeds)."""
    with open(out / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["clip"] == clip]
    rows = [row for row in rows if row["length"] == str(length)]
    seeds = 1 + max(int(row["seed"]) for row in rows)
    return {
        key: np.array([float(row[key]) for row in rows]).reshape(-1, seeds)
        for key in ("update", "loss", "wrong", "norm", "clipped")
    }


@pytest.mark.slow
def test_table_metrics_logs_and_cliff_tell_the_same(tmp_path):
    done = run("--clip none,global,percentile --max-norm 0.3", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "temporal_order.png").read_bytes().startswith(b"\x89PNG")
    lines = done.stdout.replace("global 0.3", "global").splitlines()
    rows = [line.split() for line in lines]
    table = {row[1]: row for row in rows if row and row[0] == "10"}
    assert list(table) == ["none", "global", "percentile"]
    for name, row in table.items():
        run_CS = columns(tmp_path, name.replace("global", "global 0.3"))
        solved_S = (run_CS["wrong"] <= 0.01).any(0)
        assert row[2] == f"{solved_S.sum()}/4"
        assert row[-2] == f"{run_CS['clipped'][-1].mean():.1%}"
        assert row[-1] == f"{run_CS['norm'].max():.1f}"
        log = read(tmp_path / f"{name}-length10.jsonl")
        assert log.step.tolist() == list(range(len(run_CS["loss"]) * 20))
        of_stretches = log.loss.reshape(-1, 20).mean(1)
        np.testing.assert_allclose(of_stretches, run_CS["loss"][:, 0], rtol=1e-4)
        np.testing.assert_allclose(log.clipped.mean(), run_CS["clipped"][-1, 0])
        after = log.norm * log.scale
        assert (after <= log.threshold * (1 + 1e-5)).all()
        page = (tmp_path / f"{name}-length10.html").read_text()
        assert f"temporal_order, {name}, length 10" in page
    assert table["none"][-2] == "0.0%"
    assert float(table["global"][-2].rstrip("%")) > 10

    cliff = {row[0]: [float(x) for x in row[-3:]] for row in rows[-3:-1]}
    norm, leap, error = cliff["no"]
    assert norm > 5
    assert leap > 1
    assert error > 0.05
    norm, longest, error = cliff["norm"]
    assert longest <= 0.0101  # the rate times the largest norm
    assert error < 0.01


@pytest.mark.slow
def test_a_clip_at_each_time_step_bounds_what_flows_back(tmp_path):
    done = run("--clip global,step --max-flow 0.02", tmp_path)
    assert done.returncode == 0, done.stderr
    assert columns(tmp_path, "step 0.02")["clipped"].max() == 0  # by the optimizer
    rows = [line.split() for line in done.stdout.splitlines()]
    flows = {" ".join(row[:-2]): row[-2:] for row in rows if row and row[-2:-1]}
    assert [float(x) > 0.02 for x in flows["no clip"]] == [True, True]
    assert flows["norm held to 0.02"] == ["0.0200", "0.0200"]
    largest = {n: columns(tmp_path, n)["norm"].max() for n in ("global 1", "step 0.02")}
    assert largest["step 0.02"] < 0.5 * largest["global 1"]


@pytest.mark.slow
def test_flow_back_is_the_gradient_by_the_state(example):
    """Against states that are given by hand, one time step after the other."""
    config = example.Config(batch=3, units=4)
    key = jax.random.key(0)
    graphdef, params = example.new_model(config, key)
    params = jax.tree.map(lambda x: 3 * x, params)
    model = nnx.merge(graphdef, params)
    inputs_BTI, labels_B = example.temporal_order(key, 3, 10)

    def after(state_BH, step):
        for inputs_BI in inputs_BTI.swapaxes(0, 1)[step:]:
            state_BH, _ = model.cell(state_BH, inputs_BI)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model.readout(state_BH), labels_B
        )
        return losses.mean()

    state_BH, expected = jax.numpy.zeros((3, 4)), []
    for step in range(10):
        state_BH, _ = model.cell(state_BH, inputs_BTI[:, step])
        expected.append(np.linalg.norm(jax.grad(after)(state_BH, step + 1)))
    flow_T = example.flow_back(config, 10, (0.0, params, key), np.inf)
    np.testing.assert_allclose(flow_T, expected, rtol=1e-4)
    bound = float(np.median(expected))
    held_T = example.flow_back(config, 10, (0.0, params, key), bound)
    assert (held_T <= bound * (1 + 1e-6)).all()


@pytest.mark.slow
def test_every_clip_meets_the_same_networks_and_sequences(tmp_path):
    done = run("--updates 2 --every 1", tmp_path)
    assert done.returncode == 0, done.stderr
    none = columns(tmp_path, "none")
    assert len(np.unique(none["loss"][0])) == 4  # seeds differ
    for name in ("global 1", "percentile", "step 0.03"):
        metrics = columns(tmp_path, name)
        np.testing.assert_allclose(metrics["loss"][0], none["loss"][0], rtol=1e-6)
        if not name.startswith("step"):  # which clips before the norm is taken
            np.testing.assert_allclose(metrics["norm"][0], none["norm"][0], rtol=1e-5)


@pytest.mark.slow
def test_a_run_ends_once_all_seeds_have_solved_the_task(tmp_path):
    arguments = "--clip global --updates 1000 --seeds 2"
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search("2/2 +34% to 100%", done.stdout)
    metrics = columns(tmp_path, "global 1")
    solved_CS = metrics["wrong"] <= 0.01
    assert solved_CS.any(0).all()
    assert not solved_CS[:-1].any(0).all()
    assert metrics["update"][-1, 0] < 1000
    first = np.median([20 * (1 + solved_S.argmax()) for solved_S in solved_CS.T])
    assert f"100%{first:>9.0f}" in done.stdout


@pytest.mark.slow
def test_devices_share_the_seeds_and_agree_with_one(tmp_path):
    results = []
    for devices in (1, 8):
        out = tmp_path / str(devices)
        done = run("--clip global --updates 5 --every 5", out, devices)
        assert done.returncode == 0, done.stderr
        results.append(columns(out, "global 1"))
    for key in ("loss", "norm"):
        np.testing.assert_allclose(*(result[key] for result in results), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--clip none,glob", "['glob'] are not among ['none',"),
        ("--lengths 10,9", "--lengths must be at least 10, got 10,9"),
        ("--updates 50", "--updates must be a multiple of --every, 20"),
    ],
)
def test_what_cannot_run_is_refused_at_once(tmp_path, arguments, message):
    done = run(arguments, tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("length", [10, 25, 30])
@pytest.mark.sample(1)
def test_sequences_hold_two_marks_where_the_task_puts_them(example, length):
    inputs_BTI, labels_B = example.temporal_order(jax.random.key(0), 500, length)
    symbols_BT = np.asarray(inputs_BTI).argmax(-1)
    assert inputs_BTI.shape == (500, length, 6)
    np.testing.assert_array_equal(np.asarray(inputs_BTI).sum(-1), 1)
    marks_B2 = np.empty((500, 2), int)
    for sequence, symbols_T in enumerate(symbols_BT):
        first, second = np.flatnonzero(symbols_T < 2)
        assert length // 10 <= first < 2 * (length // 10)
        assert length // 2 <= second < length // 2 + length // 10
        marks_B2[sequence] = symbols_T[[first, second]]
    np.testing.assert_array_equal(labels_B, 2 * marks_B2[:, 0] + marks_B2[:, 1])
    assert set(np.asarray(labels_B).tolist()) == {0, 1, 2, 3}
