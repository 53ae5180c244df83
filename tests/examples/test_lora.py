"""`examples/lora.py`, run as a person runs it, on a model that takes seconds."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optaxclip.audit import read

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "lora.py"
TINY = (
    "--base-steps 6 --steps 20 --every 5 --batch 8 --context 16 --depth 1 --heads 2 "
    "--width 16 --rank 2 --outliers 0.05"
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


@pytest.mark.slow
def test_the_clip_and_the_log_know_of_the_adapters_alone(tmp_path):
    done = run("--clip none,global --seeds 2", tmp_path)
    assert done.returncode == 0, done.stderr
    # 2 times (16 + 3·16) + (16 + 16) + (16 + 4·16) + (4·16 + 16) + (16 + 128).
    assert "Adapters of 800 parameters on a base of 7,472." in done.stdout
    assert (tmp_path / "lora.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    rows = [
        row.replace("global 1 ", "global ").split() for row in done.stdout.splitlines()
    ]
    table = {row[0]: row for row in rows[1:4]}
    assert table["none"][1] == table["global"][1]  # the same base
    logs = {}
    for name in ("none", "global"):
        logs[name] = log = read(tmp_path / f"{name}-seed0.jsonl")
        assert log.metadata["transform"] == name
        assert log.metadata["parameter_count"] == 800
        assert len(log.leaf_names) == 10
        assert all("lora_" in leaf for leaf in log.leaf_names)
        assert log.step.tolist() == list(range(20))
        # The norm that is clipped is the norm of the adapters.
        whole = np.sqrt(np.sum(np.square(log.leaf_norms), axis=1))
        np.testing.assert_allclose(log.norm, whole, rtol=1e-5)
        page = (tmp_path / f"{name}-seed0.html").read_text()
        assert f"lora, {name}-seed0" in page
        losses = float(table[name][1]), float(table[name][2])
        assert losses[0] != losses[1]
    # The second factors are zero at first: so is the gradient of the first ones.
    first = [leaf.endswith("lora_a") for leaf in logs["none"].leaf_names]
    assert (logs["none"].leaf_norms[0][first] == 0).all()
    # One batch of the twenty has an outlier, the same for both.
    assert logs["none"].norm.max() > 20 * np.median(logs["none"].norm)
    assert not logs["none"].clipped.any()
    spike = logs["none"].norm.argmax()
    assert spike >= 5
    assert logs["global"].clipped[spike]
    other = read(tmp_path / "none-seed1.jsonl")
    assert other.norm[0] != logs["none"].norm[0]


@pytest.mark.slow
def test_devices_share_a_batch_and_agree_with_one(tmp_path):
    logs = []
    for devices in (1, 4):
        done = run("--clip percentile", tmp_path / str(devices), devices)
        assert done.returncode == 0, done.stderr
        logs.append(read(tmp_path / str(devices) / "percentile-seed0.jsonl"))
    np.testing.assert_allclose(logs[0].norm, logs[1].norm, rtol=1e-3)
    np.testing.assert_allclose(logs[0].loss, logs[1].loss, rtol=1e-4)


@pytest.fixture
def lora(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("lora")


@pytest.mark.slow
def test_adapters_change_nothing_at_first_and_then_leave_the_base_alone(lora):
    config = lora.Config(context=16, depth=1, heads=2, width=16, rank=2, batch=4)
    base = lora.new_base(config)
    tokens_BT1 = jnp.asarray(lora.other_text()[0][: 4 * 17].reshape(4, 17))
    kernels = jax.tree.map(jnp.copy, nnx.state(base, nnx.Param))
    # The examples run as they are, without the package's strict promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        before = base(tokens_BT1[:, :-1])
        model, optimizer = lora.new_model(config, base, "percentile", 0)
        np.testing.assert_array_equal(model(tokens_BT1[:, :-1]), before)
        for _ in range(3):
            lora.tune_step(model, optimizer, tokens_BT1, jnp.ones((4, 16)))
        assert not np.array_equal(model(tokens_BT1[:, :-1]), before)
    after = nnx.state(base, nnx.Param)
    assert jax.tree.all(jax.tree.map(np.array_equal, after, kernels))
    frozen = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    for old, new in zip(*map(jax.tree.leaves, (kernels, frozen)), strict=True):
        np.testing.assert_array_equal(old, new)
    trained = nnx.state(model, nnx.LoRAParam)
    assert sum(x.size for x in jax.tree.leaves(trained)) == 800


def test_the_other_text_is_other(lora):
    train, validation = lora.other_text()
    assert train.size > 3 * validation.size > 1e5
    text = bytes(validation).decode("ascii")
    assert text == text.upper()
    assert lora.other_text(0.01)[0].size == 10_000


def test_a_text_of_your_own_stays_within_the_vocabulary(lora, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("naïve café " * 100, encoding="utf-8")
    train, validation = lora.tuning_text(lora.Config(text=str(path)))
    assert train.size + validation.size == path.stat().st_size
    assert train.max() == validation.max() == 127  # beyond it, the loss is NaN


@pytest.mark.slow
def test_what_cannot_run_is_refused_at_once(tmp_path):
    done = run("--clip none,glob", tmp_path)
    assert done.returncode == 1
    assert "['glob'] are not among ['none'," in done.stderr
