"""`examples/train.py` and its twin in Linen, run, killed and resumed as by a person."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tensorboardX.proto import event_pb2

from optaxclip.audit import read

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = "train.py", "train_linen.py"
STEPS = 60
TINY = (
    f"--steps {STEPS} --every 5 --warmup 2 --batch 8 --context 16 --depth 1 --heads 2 "
    "--width 16 --sample 40"
)


def start(script: str, out: Path, arguments: str = "", devices: int = 1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    arguments = f"{TINY} {arguments}"
    return subprocess.Popen(
        [sys.executable, EXAMPLES / script, *arguments.split(), "--out", out],
        # Import the package under test, which need not be installed.
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def run(*arguments, **options) -> str:
    process = start(*arguments, **options)
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    return stdout


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = [path.name for path in (folder / "seed0" / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def kill_after_a_checkpoint(process, folder: Path) -> int:
    """Kills the process once it has written a checkpoint or more: the newest's step."""
    deadline = time.monotonic() + 900
    while newest(folder) == 0 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "The run was over too soon."
    return newest(folder)


def state(folder: Path) -> list[np.ndarray]:
    with ocp.CheckpointManager(folder / "seed0" / "checkpoints") as checkpoints:
        tree = checkpoints.restore(STEPS, args=ocp.args.StandardRestore())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def scalars(folder: Path, name: str) -> dict[int, float]:
    """What TensorBoard shows of a metric, by step."""
    values = {}
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])  # then its check, 4 bytes
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]
            for value in event.summary.value:
                if value.tag == name:
                    values[event.step] = value.simple_value
    return values


LINEN = pytest.param("train_linen.py", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["train.py", LINEN])
def whole(request, tmp_path_factory):
    """A run that nothing disturbs: its script, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    return request.param, folder, run(request.param, folder)


@pytest.mark.slow
def test_a_run_tells_what_it_did(whole):
    script, folder, printed = whole
    log = read(folder / "seed0" / "clip.jsonl")
    assert log.step.tolist() == list(range(STEPS))
    # The loss reached the recorder, and it fell.
    assert log.loss[0] > 4.5
    assert np.isfinite(log.loss).all()
    assert log.loss[-10:].mean() < 3.6
    seed, loss, validation_loss, *counts = printed.splitlines()[-2].split()
    assert (seed, loss) == ("0", f"{log.loss[-50:].mean():.3f}")
    assert abs(float(validation_loss) - log.loss[-10:].mean()) < 0.4  # of other text
    assert counts == [f"{log.clipped.mean():.1%}", "0"]
    for name, column in [("grad_norm", log.norm), ("loss", log.loss)]:
        shown = scalars(folder / "seed0", name)
        assert list(shown) == list(range(STEPS))
        np.testing.assert_allclose(list(shown.values()), column, rtol=1e-6)
    page = (folder / "seed0" / "report.html").read_text()
    assert f"{script}, seed 0" in page
    assert len(set(printed.split("Seed 0 writes:\n")[1][:40])) > 3
    picture = (folder / script).with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(whole, tmp_path):
    script, folder, printed = whole
    first = kill_after_a_checkpoint(start(script, tmp_path), tmp_path)
    assert 0 < first < STEPS
    resumed = run(script, tmp_path)

    assert f"Resuming from step {first}" in resumed
    resumed = resumed[resumed.index("Seed 0 writes") :]  # the sample, and the table
    assert resumed.replace(str(tmp_path), str(folder)) in printed
    for a, b in zip(state(folder), state(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)
    logs = [read(path / "seed0" / "clip.jsonl") for path in (folder, tmp_path)]
    for name in ("step", "norm", "threshold", "scale", "loss", "leaf_norms"):
        np.testing.assert_array_equal(*(getattr(log, name) for log in logs))
    shown = [scalars(path / "seed0", "loss") for path in (folder, tmp_path)]
    assert shown[0] == shown[1]


@pytest.mark.slow
def test_devices_share_a_batch_and_agree_with_one(whole, tmp_path):
    script, folder, _ = whole
    run(script, tmp_path, "--seeds 2 --every 60", devices=8)
    logs = [read(path / "seed0" / "clip.jsonl") for path in (folder, tmp_path)]
    for name in ("loss", "norm"):
        one, eight = (getattr(log, name)[:5] for log in logs)
        np.testing.assert_allclose(one, eight, rtol=1e-4)
    other = read(tmp_path / "seed1" / "clip.jsonl")
    assert other.loss[0] != logs[1].loss[0]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_batch_that_devices_cannot_share_is_refused_at_once(tmp_path, script):
    process = start(script, tmp_path, "--batch 3", devices=2)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "partitioned 2 times, but the dimension size is 3" in stderr


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import train

    # Flax itself broadcasts vectors to matrices.
    with jax.numpy_rank_promotion("allow"):
        yield train


def model(train, key=0):
    config = train.Config(width=16, depth=1, heads=2, context=8)
    return train.Transformer(config, nnx.Rngs(key))


def test_no_logits_depend_on_later_tokens(train):
    tokens_BT = jnp.arange(16).reshape(2, 8)
    both = (tokens_BT, tokens_BT.at[:, 5].set(99))
    before, after = map(jax.jit(model(train)), both)
    assert before.shape == (2, 8, 128)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_the_loss_is_the_weighted_cross_entropy(train):
    tokens_BT1 = np.arange(18, dtype=np.uint8).reshape(2, 9)
    logits_BTV = np.asarray(model(train)(jnp.asarray(tokens_BT1[:, :-1])), np.float64)
    chosen_BT = np.take_along_axis(logits_BTV, tokens_BT1[:, 1:, None].astype(int), -1)
    losses_BT = np.log(np.exp(logits_BTV).sum(-1)) - chosen_BT[..., 0]
    weights_BT = np.linspace(0, 100, 16, dtype=np.float32).reshape(2, 8)
    tokens_BT1 = jnp.asarray(tokens_BT1)
    plain = train.cross_entropy(model(train), tokens_BT1)
    np.testing.assert_allclose(plain, losses_BT.mean(), rtol=1e-5)
    weighted = train.cross_entropy(model(train), tokens_BT1, jnp.asarray(weights_BT))
    np.testing.assert_allclose(weighted, (weights_BT * losses_BT).mean(), rtol=1e-5)


def test_parameters_are_the_only_state_and_stack_over_seeds(train):
    def parameters(key):
        return nnx.split(model(train, key))[1]

    def loss(params):
        return train.cross_entropy(nnx.merge(graph, params), tokens_BT1)

    graph, tokens_BT1 = nnx.split(model(train))[0], jnp.arange(18).reshape(2, 9)
    kinds = jax.tree.leaves(
        parameters(0), is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    assert all(isinstance(kind, nnx.Param) for kind in kinds)
    stacked = jax.vmap(parameters)(jax.random.split(jax.random.key(0), 3))
    losses = jax.jit(jax.vmap(loss))(stacked)
    assert len(set(losses.tolist())) == 3


def test_a_text_of_ones_own_is_split_for_validation(train, tmp_path):
    (tmp_path / "own.txt").write_text("abcdefghi\u00e9" * 10, encoding="latin-1")
    text, validation_text = train.load_text(tmp_path / "own.txt")
    assert bytes(text) == b"abcdefghi\x7f" * 9
    assert bytes(validation_text) == b"abcdefghi\x7f"
    text, validation_text = train.load_text()
    assert len(text) > 1e6
    assert max(text.max(), validation_text.max()) < 128


def test_a_stream_of_batches_goes_on_where_it_was_left(train):
    text = np.arange(1000) % 128
    whole = train.batches(text, batch=2, context=4, seed=1)
    rest = train.batches(text, batch=2, context=4, seed=1, first=3)
    whole = [next(whole) for _ in range(5)]
    assert whole[0].shape == (2, 5)
    np.testing.assert_array_equal(whole[3:], [next(rest) for _ in range(2)])
    assert (np.diff(whole) % 128 == 1).all()
