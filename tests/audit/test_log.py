"""The log of a run: whatever was drained is read back, whatever was not is counted."""

import contextlib
import dataclasses
import enum
import gzip
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import optaxclip
from optaxclip import History, HistoryState
from optaxclip.audit import ClipLog, LogData, read
from optaxclip.audit._log import lines as _lines

FIELDS = ("norm", "threshold", "scale", "loss", "clipped", "skipped")


def truth(run, steps=400, leaves=2):
    """What happens in a run, step by step: among it all that is hard to write."""
    rng = np.random.default_rng(run)
    norm = rng.lognormal(size=steps, sigma=20).astype(np.float32)
    norm[5::17], norm[6::17], norm[7::17], norm[8] = np.nan, np.inf, 0, 1e-45
    loss = rng.normal(size=steps).astype(np.float32)
    loss[3::13], loss[4::13], loss[5::13] = np.nan, np.inf, -np.inf
    threshold = rng.uniform(size=steps).astype(np.float32)
    threshold[::7] = np.inf
    scale = rng.uniform(size=steps).astype(np.float32)
    bools = rng.integers(2, size=(2, steps)).astype(bool)
    leaf_norms = rng.lognormal(size=(steps, leaves)).astype(np.float32)
    leaf_norms[9] = np.nan
    return (norm, threshold, scale, loss, *bools), leaf_norms


def ring(values, count, length):
    """A ring buffer that has taken the first values, as arrays of the host."""
    buffer = np.zeros((length,), values.dtype)
    step = np.arange(max(0, count - length), count)
    buffer[step % length] = values[step]
    return buffer


def recorder(count, length=8, run=0, leaves=0):
    """The state of a recorder after ``count`` steps of a run."""
    columns, leaf_norms = truth(run, leaves=leaves)
    rings = [jnp.asarray(ring(column, count, length)) for column in columns]
    tree = {
        f"leaf{i}": jnp.asarray(ring(column, count, length))
        for i, column in enumerate(leaf_norms.T)
    }
    rings.insert(4, jnp.ones(length, jnp.int8))  # every step has a loss
    return HistoryState(jnp.int32(count), History(*rings, tree if leaves else ()), ())


def assert_run(data, run, start, stop, leaves=0):
    """Steps from start to stop are those of a run, bit for bit."""
    columns, leaf_norms = truth(run, leaves=leaves)
    here = (data.step >= start) & (data.step < stop)
    np.testing.assert_array_equal(data.step[here], np.arange(start, stop))
    for name, column in zip(FIELDS, columns, strict=True):
        read_back = getattr(data, name)[here]
        assert read_back.dtype == (bool if column.dtype == bool else np.float64)
        np.testing.assert_array_equal(
            read_back.astype(column.dtype), column[start:stop]
        )
    if leaves:
        np.testing.assert_array_equal(
            data.leaf_norms[here].astype(np.float32), leaf_norms[start:stop]
        )


def checked(body):
    """A line with its check, as docs/log.md has it; ``body`` lacks the last brace."""
    return f'{body},"crc":"{zlib.crc32(body.encode()):08x}"}}'


def lines(path):
    """The objects in a log, without their checks, which fit."""
    texts = path.read_text().splitlines()
    assert [checked(text[: text.rindex(",")]) for text in texts] == texts
    objects = [json.loads(text) for text in texts]
    return [{k: v for k, v in item.items() if k != "crc"} for item in objects]


def markers(path):
    return [line for line in lines(path)[1:] if "step" not in line]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "clip.jsonl"


# --- writing --------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [0, 1, 3])
def test_every_step_is_read_back_bit_for_bit(path, leaves):
    log = ClipLog(path)
    counts = [0, 1, 1, 8, 9, 16, 20, 27]
    written = [log.update(recorder(count, leaves=leaves)) for count in counts]
    assert written == [0, 1, 0, 7, 1, 7, 4, 7]
    data = read(path)
    assert_run(data, 0, 0, 27, leaves)
    assert len(data.step) == 27
    assert (data.missed, data.rewritten, data.torn) == ((), 0, 0)
    assert data.leaf_names == tuple(f"leaf{i}" for i in range(leaves))
    assert (data.leaf_norms is None) == (leaves == 0)
    assert markers(path) == []


def test_before_the_first_drain(path):
    assert repr(ClipLog(path)) == f"ClipLog('{path}'): nothing written"


def test_the_lines_are_short_and_strict_json(path):
    values = (1.2, np.inf, 0.1, 2.25)
    floats = [jnp.asarray([x, np.nan], jnp.float32) for x in values]
    flags = [jnp.array([1, 0], jnp.int8)] * 2 + [jnp.array([0, 1], jnp.int8)]
    leaves = {"w": jnp.array([3.0, jnp.inf], jnp.float32)}
    history = History(*floats, *flags, leaves)
    ClipLog(path).update(HistoryState(jnp.int32(2), history, ()))
    assert path.read_text().splitlines()[1:] == [
        checked(
            '{"step":0,"norm":1.2,"threshold":"inf","scale":0.1,"clipped":true,'
            '"skipped":false,"loss":2.25,"leaf_norms":[3.0]'
        ),
        checked(
            '{"step":1,"norm":"nan","threshold":"nan","scale":"nan","clipped":false,'
            '"skipped":true,"leaf_norms":["inf"]'
        ),
    ]


def test_float64_keeps_all_digits(path):
    with jax.enable_x64(True):
        state = recorder(8)
        norm = jnp.asarray(np.random.default_rng(0).normal(size=8))
        assert norm.dtype == jnp.float64
        state = state._replace(history=state.history._replace(history_norm=norm))
        log = ClipLog(path)
        log.update(state)
        assert log.update(state) == 0
    np.testing.assert_array_equal(read(path).norm, norm)


def test_the_first_line_says_what_run_it_is(path):
    log = ClipLog(
        path,
        params={"w": jnp.ones((3, 2)), "b": jnp.ones(2)},
        transform="clip_by_global_norm(1.0)",
        hyperparameters={
            "rate": np.float32(0.5),
            "max_norm": float("inf"),
            "betas": (0.9, jnp.float32(0.5)),
            "nested": {1: pathlib.PurePosixPath("a/b")},
        },
    )
    log.update(recorder(1, leaves=2))
    head = lines(path)[0]
    assert head == read(path).metadata
    device = jax.devices()[0]
    assert head["started"].endswith("+00:00")
    assert set(head["versions"]) == {"python", "jax", "optax", "optaxclip"}
    assert head["versions"]["optax"] == optax.__version__
    assert {k: v for k, v in head.items() if k not in ("started", "versions")} == {
        "optaxclip_log": 1,
        "device": {"platform": device.platform, "kind": device.device_kind},
        "process_count": 1,
        "transform": "clip_by_global_norm(1.0)",
        "hyperparameters": {
            "rate": 0.5,
            "max_norm": "inf",
            "betas": [0.9, 0.5],
            "nested": {"1": "a/b"},
        },
        "parameter_count": 8,
        "leaf_names": ["leaf0", "leaf1"],
    }
    ClipLog(path.parent / "bare.jsonl").update(recorder(1))
    bare = read(path.parent / "bare.jsonl").metadata
    assert (bare["transform"], bare["hyperparameters"]) == (None, {})
    assert (bare["parameter_count"], bare["leaf_names"]) == (None, [])


def test_a_drain_is_one_transfer(path, monkeypatch):
    state = recorder(8, leaves=3)
    log = ClipLog(path)
    transfers = []
    device_get = jax.device_get
    monkeypatch.setattr(
        jax, "device_get", lambda tree: transfers.append(tree) or device_get(tree)
    )
    with jax.transfer_guard_device_to_host("disallow"):  # which lets device_get pass
        log.update(state)
    (transferred,) = transfers
    assert len(jax.tree.leaves(transferred)) == 1 + 7 + 3
    assert_run(read(path), 0, 0, 8, leaves=3)


def test_a_run_and_its_log(path):
    tx = optaxclip.record_history(
        optaxclip.skip_nonfinite(
            optax.chain(optaxclip.clip_by_global_norm(6.5), optax.trace(0.9))
        ),
        length=4,
        leaf_norms=True,
    )
    params = {"a": {"w": jnp.array([3.0, 4.0])}, "b": jnp.array([7.2, 9.6])}

    @jax.jit
    def step(state, factor):
        updates = jax.tree.map(lambda x: x * factor, params)
        return tx.update(updates, state, params, loss=factor)[1]

    state, log = tx.init(params), ClipLog(path, params=params)
    factors = np.array([1, 0.1, np.nan, 10, 0.5, 2, np.inf, 0.25], np.float32)
    for i, factor in enumerate(factors):
        state = step(state, factor)
        if i % 3 == 2:
            log.update((state, None))
    log.update((state, None))
    data = read(path)
    good = np.isfinite(factors)
    np.testing.assert_array_equal(data.skipped, ~good)
    np.testing.assert_array_equal(data.clipped, good & (factors > 0.5))
    np.testing.assert_allclose(data.norm[good], 13 * factors[good], rtol=1e-6)
    np.testing.assert_array_equal(data.norm[~good], [np.nan, np.inf])
    assert set(data.threshold[good]) == {6.5}
    scale = np.where(good, np.minimum(1, 0.5 / factors), 0)
    np.testing.assert_allclose(data.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(data.loss.astype(np.float32), factors)
    assert data.leaf_names == ("a/w", "b")
    leaf_norms = factors[:, None] * [5, 12]
    np.testing.assert_allclose(data.leaf_norms[good], leaf_norms[good], rtol=1e-6)
    assert data.metadata["parameter_count"] == 4


# --- where the state is found ---------------------------------------------------------


class Wrapper(nnx.Module):
    """What an nnx.Optimizer does with a state: every array in a Variable."""

    def __init__(self, state):
        self.opt_state = nnx.data(jax.tree.map(nnx.Variable, state))


def stacked(state):
    return jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), state)


STATES = {
    "chain": lambda s: (optax.EmptyState(), s, optax.EmptyState()),
    "MultiSteps": lambda s: optax.MultiSteps(
        optax.GradientTransformation(lambda p: s, lambda u, t, p=None: (u, t)), 2
    ).init(jnp.zeros(2)),
    "Flax TrainState": lambda s: train_state.TrainState(
        step=0, apply_fn=None, params={}, tx=None, opt_state=(s,)
    ),
    "nnx": Wrapper,
    "vmap": stacked,
    "vmap of vmap": lambda s: stacked(stacked(s)),
    "pmap": lambda s: jax.pmap(lambda x: x, devices=jax.devices()[:2])(stacked(s)),
    "numpy, from a checkpoint": lambda s: jax.tree.map(np.asarray, s),
    "sharded": lambda s: jax.device_put(
        s,
        jax.tree.map(
            lambda x: jax.sharding.NamedSharding(
                jax.make_mesh((8,), ("data",)),
                jax.sharding.PartitionSpec(*["data"] * x.ndim),
            ),
            s,
        ),
    ),
}


@pytest.mark.parametrize("wrap", STATES.values(), ids=STATES)
def test_a_recorder_is_found_in(path, wrap):
    log = ClipLog(path)
    for count in (5, 12):
        log.update(wrap(recorder(count, leaves=2)))
    assert_run(read(path), 0, 0, 12, leaves=2)
    assert read(path).leaf_names == ("leaf0", "leaf1")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (optax.EmptyState(), r"must hold the state of one `record_history`, got 0 in "),
        ((recorder(1), recorder(1)), "got 2 in "),
    ],
)
def test_a_state_without_one_recorder(path, state, message):
    with pytest.raises(
        ValueError, match=r"`ClipLog.update\(opt_state=...\)`.*" + message
    ):
        ClipLog(path).update(state)


# --- missing steps --------------------------------------------------------------------


def test_steps_that_came_and_went_between_two_drains(path):
    log = ClipLog(path)
    log.update(recorder(4))
    message = r"steps 4 to 11 are missing .* remembers 8"
    with pytest.warns(UserWarning, match=message) as warned:
        log.update(recorder(20))
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only the first gap is told of
        log.update(recorder(29))
    assert markers(path) == [{"missed": [4, 11]}, {"missed": [20, 20]}]
    data = read(path)
    assert data.missed == ((4, 11), (20, 20))
    assert log.missed == 9
    for start, stop in [(0, 4), (12, 20), (21, 29)]:
        assert_run(data, 0, start, stop)
    assert len(data.step) == 29 - 9


def test_a_checkpoint_ahead_of_the_log_is_a_gap(path):
    ClipLog(path).update(recorder(8))
    log = ClipLog(path)
    with pytest.warns(UserWarning, match="steps 8 to 91"):
        assert log.update(recorder(100)) == 8
    assert read(path).missed == ((8, 91),)
    assert ClipLog(path).missed == 84


# --- resuming -------------------------------------------------------------------------


def test_reopening_goes_on(path):
    ClipLog(path, transform="first").update(recorder(6))
    before = path.read_bytes()
    log = ClipLog(path, transform="second")
    assert log.update(recorder(6)) == 0
    assert path.read_bytes() == before
    assert log.update(recorder(10)) == 4
    assert path.read_bytes().startswith(before)
    data = read(path)
    assert_run(data, 0, 0, 10)
    assert (data.rewritten, data.missed) == (0, ())
    assert data.metadata["transform"] == "first"
    assert [head["transform"] for head in data.metadata["resumed"]] == ["second"]


@pytest.mark.parametrize("reopen", [True, False])
@pytest.mark.parametrize("told", [True, False])  # an update right after restoring
def test_an_older_checkpoint_takes_later_rows_back(path, reopen, told):
    log = ClipLog(path)
    for count in range(0, 41, 8):
        log.update(recorder(count, length=16))
    before = path.read_bytes()
    log = ClipLog(path) if reopen else log
    if told:
        log.update(recorder(20, length=16))
        assert len(read(path).step) == 20
    # The run goes another way from step 20 on, and ends earlier.
    mixed = recorder(20, length=16)._replace(history_count=jnp.int32(24))
    new = recorder(24, length=16, run=1)
    place = np.arange(20, 24) % 16
    mixed = mixed._replace(
        history=jax.tree.map(
            lambda x, y: x.at[place].set(y[place]), mixed.history, new.history
        )
    )
    assert log.update(mixed) == 4
    assert path.read_bytes().startswith(before)
    assert {"rewound_to": 20} in markers(path)
    data = read(path)
    assert data.step.tolist() == list(range(24))
    assert_run(data, 0, 0, 20)
    assert_run(data, 1, 20, 24)
    assert (data.rewritten, data.missed) == (20, ())


def test_a_resumed_run_that_passed_the_end_before_its_first_drain(path):
    ClipLog(path).update(recorder(8))
    log = ClipLog(path)
    state = recorder(8, length=8, run=1)
    old = recorder(8, length=8)
    history = jax.tree.map(
        lambda x, y: jnp.concatenate([x[:5], y[5:]]), old.history, state.history
    )
    assert log.update(HistoryState(jnp.int32(8), history, ())) == 3
    assert {"rewound_to": 5} in markers(path)
    data = read(path)
    assert_run(data, 0, 0, 5)
    assert_run(data, 1, 5, 8)
    assert data.rewritten == 3


def test_far_behind_what_the_last_drain_remembered(path):
    log = ClipLog(path)
    for count in range(0, 101, 8):
        log.update(recorder(count))
    log.update(recorder(100))
    # Back to 50, and on in another way to 54, without a word.
    one, other = recorder(54), recorder(54, run=1)
    place = np.arange(50, 54) % 8
    history = jax.tree.map(
        lambda x, y: x.at[place].set(y[place]), one.history, other.history
    )
    assert log.update(one._replace(history=history)) == 4
    assert markers(path) == [{"rewound_to": 50}]
    data = read(path)
    assert_run(data, 0, 0, 50)
    assert_run(data, 1, 50, 54)
    assert (len(data.step), data.rewritten) == (54, 50)


def test_a_rewind_further_than_the_recorder_remembers_is_said_to_be_unsure(path):
    """Nobody can know which of the rows before step 44 the run has repeated."""
    log = ClipLog(path)
    for count in range(8, 49, 8):
        log.update(recorder(count))
    with pytest.warns(UserWarning, match="before step 44 .* repeated"):
        log.update(recorder(52, run=1))
    data = read(path)
    assert data.unsure_before == 44
    assert_run(data, 1, 44, 52)
    assert "before 44 may be" in repr(log)


def test_steps_that_were_missed_may_be_taken_back(path):
    log = ClipLog(path)
    log.update(recorder(8))
    with pytest.warns(UserWarning, match="steps 8 to 31 are missing"):
        log.update(recorder(40))
    log.update(recorder(36))
    assert (log.missed, read(path).missed) == (20, ((8, 27),))
    log.update(recorder(8))
    assert (log.missed, read(path).missed) == (0, ())


def test_a_checkpoint_from_a_gap_fills_it_as_far_as_it_remembers(path):
    log = ClipLog(path)
    log.update(recorder(8))
    with pytest.warns(UserWarning, match="steps 8 to 31 are missing"):
        log.update(recorder(40))
    assert log.update(recorder(20)) == 8
    assert (log.missed, read(path).missed) == (4, ((8, 11),))
    assert_run(read(path), 0, 12, 20)


def test_a_gap_at_the_start_is_filled_too(path):
    log = ClipLog(path)
    with pytest.warns(UserWarning, match="steps 0 to 31 are missing"):
        log.update(recorder(40))
    assert log.update(recorder(35)) == 8
    assert (log.missed, read(path).missed) == (27, ((0, 26),))


def test_the_same_steps_again_are_not_written_twice(path):
    ClipLog(path).update(recorder(8))
    log = ClipLog(path)
    log.update(recorder(5))  # restored
    log.update(recorder(8))  # and trained in the same way
    data = read(path)
    assert_run(data, 0, 0, 8)
    assert data.rewritten == 3


def test_a_run_from_the_start_takes_everything_back(path):
    ClipLog(path).update(recorder(8))
    ClipLog(path).update(recorder(6, run=1))
    data = read(path)
    assert_run(data, 1, 0, 6)
    assert (len(data.step), data.rewritten) == (6, 8)


def test_of_two_rows_of_a_step_the_later_counts(tmp_path):
    path = write(tmp_path, HEAD, row(0), row(1), row(0, norm=9.0))
    assert read(path).norm.tolist() == [9.0, 1.0]
    assert read(path).rewritten == 1


def test_a_recorder_with_other_leaves_is_refused(path):
    ClipLog(path).update(recorder(4, leaves=2))
    before = path.read_bytes()
    log = ClipLog(path)
    message = r"leaf norms of \['leaf0', 'leaf1'\], the recorder those of \[\]: start a"
    with pytest.warns(UserWarning, match=message):
        assert log.update(recorder(6)) == 0
    assert log.unwritten == 2
    with pytest.raises(ValueError, match=message):
        ClipLog(path, on_error="raise").update(recorder(6))
    assert path.read_bytes() == before


# --- crashes --------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 20, 60, 100_000])
def test_a_torn_last_line(path, cut):
    ClipLog(path).update(recorder(4))
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    torn = whole[: -min(cut, len(last) - 1)]
    path.write_bytes(torn)
    lost = 0 if cut == 1 else 1  # only the line's end was missing
    assert (len(read(path).step), read(path).torn) == (4 - lost, lost)
    assert ClipLog(path).update(recorder(7)) == 3 + lost
    data = read(path)
    assert_run(data, 0, 0, 7)
    assert (data.torn, data.rewritten, data.missed) == (lost, 0, ())


@pytest.mark.parametrize("keep", [0, 1, 10, 40])
def test_a_torn_first_line(path, keep):
    ClipLog(path).update(recorder(4))
    path.write_bytes(path.read_bytes()[:keep])
    ClipLog(path).update(recorder(4))
    assert_run(read(path), 0, 0, 4)
    assert read(path).torn == (keep > 0)


WRITER = """
import sys
import jax.numpy as jnp
from optaxclip import History, HistoryState
from optaxclip.audit import ClipLog, read

path, start, length = sys.argv[1], int(sys.argv[2]), 500
log = ClipLog(path)
for count in range(start, 10**9, 250):
    # One value fills a row: rows are told apart, and the lines are long.
    step = jnp.arange(length)
    value = (count - 1 - (count - 1 - step) % length).astype(jnp.float32)
    leaves = {f"leaf{i}": value for i in range(20)}
    yes = value >= 0
    history = History(value, value, value, value, yes, value > 0, value < 0, leaves)
    log.update(HistoryState(jnp.int32(count), history, ()))
    print(count, flush=True)
"""


def test_whatever_was_drained_survives_a_kill(path):
    random.seed(0)
    drained = 0
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(drained)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(random.randint(2, 40)):
            drained = int(child.stdout.readline())
        try:
            child.wait(random.uniform(0, 0.05))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split()
        assert child.returncode == -signal.SIGKILL
        drained = int(rest[-1]) if rest else drained
        data = read(path)
        assert len(data.step) >= drained > 0
        np.testing.assert_array_equal(data.step, np.arange(len(data.step)))
        np.testing.assert_array_equal(data.norm, data.step)
        np.testing.assert_array_equal(data.leaf_norms[:, 19], data.step)
        assert data.missed == ()


# --- errors of the file system --------------------------------------------------------


@contextlib.contextmanager
def full_disk(size):
    """The system lets no file grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 600])
def test_a_full_disk_does_not_end_training(path, size):
    log = ClipLog(path)
    with full_disk(size):
        with pytest.warns(UserWarning, match=r"cannot write .*clip.jsonl: .*too large"):
            assert log.update(recorder(3)) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert log.update(recorder(6)) == 0
        assert log.unwritten == 6
        with pytest.raises(OSError, match="too large"):
            ClipLog(path, on_error="raise").update(recorder(7))
    assert log.update(recorder(8)) == 8
    assert_run(read(path), 0, 0, 8)


def test_a_path_that_is_a_folder(tmp_path):
    message = r"cannot write .*Is a directory.*goes on"
    with pytest.warns(UserWarning, match=message) as warned:
        log = ClipLog(tmp_path)
    assert warned[0].filename == __file__
    assert log.update(recorder(3)) == 0
    assert log.unwritten == 3
    with pytest.raises(IsADirectoryError):
        ClipLog(tmp_path, on_error="raise")


def test_a_disk_that_was_full_for_a_while(path, monkeypatch):
    log = ClipLog(path)
    log.update(recorder(4))

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", partly_written)
        with pytest.warns(UserWarning, match="disk full"):
            assert log.update(recorder(8)) == 0
        assert log.update(recorder(14)) == 0
        assert log.unwritten == 10
    assert read(path).torn == 1
    with pytest.warns(UserWarning, match="steps 4 to 9 are missing"):
        assert log.update(recorder(18)) == 8
    assert (log.unwritten, log.missed) == (0, 6)
    data = read(path)
    assert (data.missed, data.torn, data.rewritten) == (((4, 9),), 0, 0)
    assert_run(data, 0, 0, 4)
    assert_run(data, 0, 10, 18)


def partly_written(path, mode):
    """Opens a file that takes a third of what it is given."""
    file = open(path, mode, buffering=0)  # noqa: SIM115 (`Full` closes it)
    write = file.write

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            file.close()

        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            write(data[: len(data) // 3])
            raise OSError("disk full")

    return Full()


def test_a_file_that_was_removed_meanwhile_begins_anew(path):
    log = ClipLog(path)
    log.update(recorder(4))
    path.unlink()
    path.parent.rmdir()
    assert log.update(recorder(6)) == 6
    assert_run(read(path), 0, 0, 6)


def test_a_log_without_its_file_can_still_be_shown(path):
    log = ClipLog(path)
    log.update(recorder(8))
    path.unlink()
    assert repr(log) == f"ClipLog({str(path)!r}): the file is gone"


def test_a_file_that_another_wrote_to_keeps_its_rows(path):
    log = ClipLog(path)
    log.update(recorder(4))
    ClipLog(path).update(recorder(6))
    log.update(recorder(9))
    data = read(path)
    assert_run(data, 0, 0, 9)
    assert data.rewritten == 0


def test_a_file_that_became_another_is_left_alone(path):
    log = ClipLog(path)
    log.update(recorder(4))
    path.write_text("mine\n")
    with pytest.warns(UserWarning, match="line 1: this is no optaxclip log"):
        log.update(recorder(6))
    log.update(recorder(8))
    assert path.read_text() == "mine\n"


FOREIGN = {
    "text": b"norms of a run\n1, 2, 3\n",
    "a line": b"no line end",
    "other JSON Lines": b'{"step":0,"norm":1.0}\n',
    "a list": b"[1, 2]\n",
    "an image": b"\x89PNG\r\n\x1a\n\x00\x00\xff",
    "a blank line": b"\n",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_file_that_is_no_log_is_never_appended_to(tmp_path, content, on_error):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"mine\.txt, line 1: this is no optaxclip log"
    ):
        ClipLog(path, on_error=on_error)
    assert path.read_bytes() == content


def test_a_bad_argument(path):
    with pytest.raises(ValueError, match=r'must be "warn" or "raise", got \'quiet\'\.'):
        ClipLog(path, on_error="quiet")


# --- what is no log, or damaged -------------------------------------------------------


def log_bytes(tmp_path):
    """A log of eight rows with a marker, in one of which a norm is infinite."""
    path = tmp_path / "whole.jsonl"
    ClipLog(path, transform="clip").update(recorder(5))
    ClipLog(path).update(recorder(8))
    return path.read_bytes()


NO_LOGS = {
    "CR for LF": lambda log: log.replace(b"\n", b"\r"),
    "CR LF": lambda log: log.replace(b"\n", b"\r\n"),
    "no line ends": lambda log: log.replace(b"\n", b""),
    "spaces for line ends": lambda log: log.replace(b"\n", b" "),
    "zeros for line ends": lambda log: log.replace(b"\n", b"\0"),
    "a byte order mark": lambda log: b"\xef\xbb\xbf" + log,
    "UTF-16": lambda log: log.decode().encode("utf-16"),
    "UTF-32": lambda log: log.decode().encode("utf-32"),
    "gzip": lambda log: gzip.compress(log),
    "whitespace": lambda log: b" \t \n",
    "spaces": lambda log: b"   ",
    "zeros": lambda log: b"\0" * 100,
    "a head of others": lambda log: b'{"optaxclip_log":1,"note":"mi',
    "a head with a tail": lambda log: log.splitlines()[0] + b"mine",
    "a damaged head": lambda log: log.splitlines()[0][:100] + b'"x',
    "half a head with letters": lambda log: log[:80] + "é".encode(),
    "a damaged last line": lambda log: log[:-9] + b"~" + log[-8:],
    "a tail": lambda log: log + b"mine",
    "a tail of JSON": lambda log: log + b'{"mine":"a li',
    "a tail behind the last row": lambda log: log[:-1] + b"mine",
    "a row that ends early": lambda log: log + b'{"step":8,"norm":1.0]',
}


@pytest.mark.parametrize("change", NO_LOGS.values(), ids=NO_LOGS)
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_what_the_log_did_not_write_stays_as_it_is(tmp_path, change, on_error):
    path, content = tmp_path / "mine", change(log_bytes(tmp_path))
    path.write_bytes(content)
    message = r"^`read\(path=...\)`: .*mine, line \d+: "
    with pytest.raises(ValueError, match=message):
        ClipLog(path, on_error=on_error)
    with pytest.raises(ValueError, match=message):
        read(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", NO_LOGS.values(), ids=NO_LOGS)
def test_a_log_that_became_no_log_stays_as_it_is(tmp_path, change):
    path = tmp_path / "clip.jsonl"
    log = ClipLog(path)
    log.update(recorder(4))
    content = change(log_bytes(tmp_path))
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="line "):
        assert log.update(recorder(6)) == 0
    assert log.update(recorder(9)) == 0
    assert path.read_bytes() == content


def test_a_whole_first_line_without_its_end_is_gone_on_with(path):
    ClipLog(path, transform="first").update(recorder(4))
    head = path.read_bytes().splitlines()[0]
    path.write_bytes(head)
    assert read(path).metadata["transform"] == "first"
    log = ClipLog(path, transform="second")
    assert log.update(recorder(4)) == 4
    assert path.read_bytes().startswith(head + b"\n")
    data = read(path)
    assert_run(data, 0, 0, 4)
    assert data.torn == 0
    assert [head["transform"] for head in data.metadata["resumed"]] == ["second"]


def test_every_beginning_of_a_log_is_gone_on_with(path):
    """Wherever a crash may have cut it: only the line that it cut is lost."""
    ClipLog(path).update(recorder(4))
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    near = {end + offset for end in ends for offset in (-2, -1, 0, 1, 2)}
    for length in sorted(near.union(range(0, len(whole), 7))):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert ClipLog(path).update(recorder(4)) >= 4 - lines
        assert path.read_bytes().startswith(whole[: whole[:length].rfind(b"\n") + 1])
        assert_run(read(path), 0, 0, 4)


@pytest.mark.parametrize("zeros", [1, 5000])
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_zeros_that_a_power_cut_left(path, cut, zeros):
    ClipLog(path).update(recorder(4))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut] + b"\0" * zeros)
    lost = cut > 1
    assert (len(read(path).step), read(path).torn) == (4 - lost, int(cut != 1))
    ClipLog(path).update(recorder(7))
    assert_run(read(path), 0, 0, 7)
    assert b"\0" not in path.read_bytes()


def test_what_others_wrote_behind_a_failed_write_is_kept(path, monkeypatch):
    log = ClipLog(path)
    log.update(recorder(4))
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", partly_written)
        with pytest.warns(UserWarning, match="disk full"):
            log.update(recorder(8))
    content = path.read_bytes() + b"\nmine\n"
    path.write_bytes(content)
    assert log.update(recorder(8)) == 0
    assert path.read_bytes() == content


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


SPECIAL = {
    "a FIFO": (make_fifo, "Not a regular file"),
    "a socket": (make_socket, "Not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "Not a regular file"),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
}


@pytest.mark.parametrize(("make", "message"), SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = pathlib.Path("special")
    make(path)
    with pytest.raises(OSError, match=message):
        read(path)
    with pytest.raises(OSError, match=message):
        ClipLog(path, on_error="raise")
    with pytest.warns(UserWarning, match=f"cannot write special: .*{message}"):
        log = ClipLog(path)
    assert log.update(recorder(3)) == 0
    assert log.unwritten == 3


@pytest.mark.parametrize(("make", "message"), SPECIAL.values(), ids=SPECIAL)
def test_a_log_that_became_no_file(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    path = pathlib.Path("clip.jsonl")
    log = ClipLog(path)
    path.unlink()
    make(path)
    with pytest.warns(UserWarning, match=message):
        assert log.update(recorder(3)) == 0


def differs(one, other):
    """Whether two logs tell different things of a run."""
    fields = [field.name for field in dataclasses.fields(LogData)]
    pairs = [(getattr(one, name), getattr(other, name)) for name in fields]
    return not all(np.array_equal(x, y, np.dtype(type(x)) == float) for x, y in pairs)


def test_no_damaged_byte_is_read_as_something_else(tmp_path):
    path, rng = tmp_path / "clip.jsonl", random.Random(0)
    log = ClipLog(path, transform="clip", hyperparameters={"rate": 0.1})
    log.update(recorder(5, leaves=2))
    with pytest.warns(UserWarning, match="missing"):
        log.update(recorder(20, leaves=2))
    ClipLog(path).update(recorder(16, leaves=2))
    whole, data = path.read_bytes(), read(path)
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    head_check = range(ends[0] - len(',"crc":"xxxxxxxx"}'), ends[0])
    places = [*ends, *head_check, *(rng.randrange(len(whole)) for _ in range(400))]
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] = rng.choice([b for b in range(256) if b != whole[place]])
        path.write_bytes(damaged)
        try:
            assert not differs(read(path), data)
        except ValueError as error:
            line = whole[:place].count(b"\n") + 1
            named = int(re.search(r", line (\d+): ", str(error))[1])
            assert line <= named <= line + (whole[place] == ord("\n"))
            refused += 1
    assert refused >= len(places) - 1  # the last line end may become a zero


def test_a_bit_that_flipped_is_named_by_its_line(path):
    ClipLog(path).update(recorder(4))
    damaged = path.read_bytes().replace(b'"step":2', b'"step":3')
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="line 4: damaged, its check does not fit"):
        read(path)
    with pytest.raises(ValueError, match="line 4: damaged"):
        ClipLog(path)
    assert path.read_bytes() == damaged


def without_checks(path):
    """Makes a log one of the old format."""
    path.write_text("".join(f"{json.dumps(item)}\n" for item in lines(path)))


def test_a_log_without_checks_is_read_and_gone_on_with(path):
    ClipLog(path).update(recorder(4))
    ClipLog(path).update(recorder(6))
    without_checks(path)
    old = path.read_bytes()
    assert_run(read(path), 0, 0, 6)
    ClipLog(path).update(recorder(9))
    ClipLog(path).update(recorder(12))
    assert path.read_bytes().startswith(old)
    data = read(path)
    assert_run(data, 0, 0, 12)
    assert len(data.metadata["resumed"]) == 3
    for line in path.read_bytes()[len(old) :].splitlines():
        assert checked(line.decode()[:-18]) == line.decode()


MIXED = {
    "a row that lost its check": ([3], 4, "damaged, it has no check"),
    "a head that lost its check": ([0], 1, "damaged, its check is missing or broken"),
    "checks from a row on": ([0, 1], 2, "damaged, its check is missing or broken"),
}


@pytest.mark.parametrize(("bare", "line", "message"), MIXED.values(), ids=MIXED)
def test_checks_begin_with_a_run_and_do_not_end(path, bare, line, message):
    ClipLog(path).update(recorder(5))
    texts = path.read_text().splitlines()
    for place in bare:
        texts[place] = texts[place][:-18] + "}"
    path.write_text("".join(f"{text}\n" for text in texts))
    with pytest.raises(ValueError, match=f"line {line}: {message}"):
        read(path)


def test_damage_far_down_a_log_with_checks_is_located(path, monkeypatch):
    monkeypatch.setattr(_lines, "_AT_ONCE", 3)
    ClipLog(path).update(recorder(8))
    assert_run(read(path), 0, 0, 8)
    text = path.read_text()
    path.write_text(text.replace('"step":6', '"step":7'))
    with pytest.raises(ValueError, match="line 8: damaged"):
        read(path)


# --- what a user tells of a run -------------------------------------------------------


class Broken:
    def __repr__(self):
        raise RuntimeError("no text")


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Config:
    rate: float = 0.1


def cycle():
    inner = {"rate": 0.1}
    inner["self"] = [inner, inner]
    return inner


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def wide(levels):
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


HARD = {
    "huge": 10**5000,
    "huge below 0": -(10**5000),
    "NaN": float("nan"),
    "infinite": [float("inf"), -np.inf],
    "numpy": np.float32(np.nan),
    "array": np.arange(6).reshape(2, 3),
    "large array": np.zeros(10**6),
    "jax": jnp.arange(3),
    "key": jax.random.key(0),
    "complex": 1j,
    "bytes": b"\xff",
    "enum": Color.RED,
    "integer enum": Level.LOW,
    "dataclass": Config(),
    "function": cycle,
    "broken": Broken(),
    "broken in a list": [Broken(), {"a": Broken()}],
    "broken as a key": {Broken(): 1, 1: 2, None: 3},
    "cycle": cycle(),
    "deep": deep(100_000),
    "wide": wide(60),
    "a long text": Config("x" * 10**6),
    "a set": {1},
    "surrogates": "\ud800",
    "transformation": optax.sgd(0.1),
}


@pytest.mark.parametrize("name", HARD)
def test_hyperparameters_that_json_cannot_hold_are_noted_as_text(path, name):
    log = ClipLog(path, hyperparameters={"before": 1, name: HARD[name], "behind": 2})
    assert log.update(recorder(4)) == 4
    noted = read(path).metadata["hyperparameters"]
    assert (noted["before"], noted["behind"]) == (1, 2)
    assert name in noted
    assert len(path.read_bytes().splitlines()[0]) < 1_000_000
    assert_run(read(path), 0, 0, 4)


def test_how_hyperparameters_are_noted(path):
    ClipLog(path, transform=Config(), hyperparameters=HARD).update(recorder(1))
    head = read(path).metadata
    noted = head["hyperparameters"]
    assert head["transform"] == str(Config())
    assert noted["huge"].startswith("0x")
    assert len(noted["huge"]) == len(noted["a long text"]) == 1000
    assert noted["infinite"] == ["inf", "-inf"]
    assert (noted["NaN"], noted["numpy"], noted["complex"]) == ("nan", "nan", "1j")
    assert (noted["enum"], noted["dataclass"]) == ("Color.RED", str(Config()))
    assert noted["broken as a key"] == {"<Broken>": 1, "1": 2, "None": 3}
    assert noted["broken in a list"] == ["<Broken>", {"a": "<Broken>"}]
    assert noted["cycle"]["rate"] == 0.1
    assert noted["cycle"]["self"] == ["<dict of 2>", "<dict of 2>"]
    assert noted["surrogates"] == "\ud800"


def test_a_hyperparameter_that_is_being_traced(path):
    @jax.jit
    def run(rate):
        ClipLog(path, hyperparameters={"rate": rate, "w": rate * jnp.ones(2)}).update(
            state
        )
        return rate

    state = recorder(2)
    run(0.1)
    assert "Trace" in read(path).metadata["hyperparameters"]["rate"]


def test_hyperparameters_that_are_no_dict(path):
    ClipLog(path, hyperparameters=Config()).update(recorder(1))
    assert read(path).metadata["hyperparameters"] == str(Config())


# --- several processes ----------------------------------------------------------------


def test_only_the_first_process_writes(path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "device_get", None)  # nothing is transferred either
    assert ClipLog(path).update(recorder(4)) == 0
    assert not path.parent.exists()


PROCESS = """
import sys
import jax
jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[3]))
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from optaxclip import History, HistoryState
from optaxclip.audit import ClipLog

mesh = jax.make_mesh((jax.device_count(),), ("data",))
replicated = NamedSharding(mesh, PartitionSpec())
def state(count):
    x = jnp.arange(8.0) + jax.process_count()
    history = History(x, x, x, x, x > 0, x > 3, x < 3, {"0": x})
    return HistoryState(jnp.int32(count), history, ())
path = sys.argv[1] + sys.argv[3]
log = ClipLog(path)
log.update(jax.jit(state, out_shardings=replicated)(4))
log.update(jax.pmap(lambda x: state(5))(jnp.arange(jax.local_device_count())))
stack = lambda: jax.vmap(lambda x: state(6))(jnp.arange(jax.device_count()))
stacked = jax.jit(stack, out_shardings=NamedSharding(mesh, PartitionSpec("data")))()
assert not stacked.history_count.is_fully_addressable
log.update(stacked)
print("done", jax.process_index(), jax.process_count())
"""


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "log"), port, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            },
            text=True,
        )
        for index in range(2)
    ]
    for index, child in enumerate(children):
        out, error = child.communicate(timeout=120)
        assert f"done {index} 2" in out, error
    data = read(tmp_path / "log0")
    assert data.norm.tolist() == [2, 3, 4, 5, 6, 7]
    assert data.metadata["process_count"] == 2
    assert not (tmp_path / "log1").exists()


# --- reading --------------------------------------------------------------------------

HEAD = '{"optaxclip_log": 1, "leaf_names": []}'


def row(step, **values):
    values = {"norm": 1.0, "threshold": "inf", "scale": 1.0} | values
    return json.dumps({"step": step, **values, "clipped": False, "skipped": False})


def write(tmp_path, *content):
    path = tmp_path / "clip.jsonl"
    path.write_text("".join(f"{line}\n" for line in content))
    return path


DAMAGED = {
    "empty": ([], 1, "the file is empty"),
    "a newer format": (
        ['{"optaxclip_log": 2}'],
        1,
        "the log has format 2, this reader knows 1",
    ),
    "a broken line": ([HEAD, row(0), row(1)[:20], row(2)], 3, "not JSON"),
    "a blank line": ([HEAD, row(0), "", row(2)], 3, "not JSON"),
    "two rows in a line": ([HEAD, f"{row(0)},{row(1)}", row(2)], 2, "not JSON"),
    "no norm": ([HEAD, row(0), '{"step":1}', row(2)], 3, "a row without 'norm'"),
    "a word": ([HEAD, row(0, norm="much"), row(1)], 2, "no row of a log"),
    "no object": ([HEAD, row(0), "17", row(1)], 3, "neither a row nor a"),
    "a list": ([HEAD, row(0), "[]", row(1)], 3, "neither a row nor a marker"),
    "null": ([HEAD, row(0), "null", row(1)], 3, "neither a row nor a marker: None"),
    "a list with a word": ([HEAD, '["step"]', row(1)], 2, "neither a row nor a"),
    "a text": ([HEAD, '"step"', row(1)], 2, "neither a row nor a marker"),
    "null at the end": ([HEAD, row(0), "null"], 3, "neither a row nor a marker"),
    "an unsure word": ([HEAD, '{"unsure_before":"x"}'], 2, "neither a row nor a"),
    "an odd gap": ([HEAD, '{"missed":3}', row(1)], 2, "neither a row nor a marker"),
    "a gap of three": ([HEAD, '{"missed":[1,2,3]}'], 2, "neither a row nor a marker"),
    "a torn list": ([HEAD, '{"torn":[]}', row(1)], 2, "neither a row nor a marker"),
    "resumed by a word": ([HEAD, '{"resumed":"x"}'], 2, "neither a row nor a marker"),
    "resumed too deep": (
        [HEAD, f'{{"resumed":{{"a":{"[" * 300}{"]" * 300}}}}}'],
        2,
        "neither a row nor a marker",
    ),
    "a rewind to the end of time": (
        [HEAD, row(0), f'{{"rewound_to":{10**30}}}'],
        3,
        "neither a row nor a marker",
    ),
    "a rewind to a truth": ([HEAD, '{"rewound_to":true}'], 2, "neither a row nor a"),
    "null for a number": ([HEAD, row(0, norm=None)], 2, "norm must be a number, got N"),
    "a truth for a number": ([HEAD, row(0, loss=True)], 2, "loss must be a number"),
    "a number in quotes": ([HEAD, row(0, norm="1.0")], 2, 'norm must be a number, "na'),
    "a huge number": ([HEAD, row(0, norm=10**400)], 2, "no row of a log"),
    "a number of many digits": ([HEAD, f'{{"step":{"1" * 5000}}}'], 2, "not JSON"),
    "a step below 0": ([HEAD, row(-1)], 2, "step must not be below 0, got -1"),
    "a truth for a step": ([HEAD, row(True)], 2, "step must be an integer, got True"),
    "a word for leaf norms": (
        ['{"optaxclip_log": 1, "leaf_names": ["a"]}', row(0, leaf_norms="x")],
        2,
        "leaf_norms must be a list, got 'x'",
    ),
    "a truth for the format": (['{"optaxclip_log":true}'], 1, "has format True"),
    "a long format": ([f'{{"optaxclip_log":"{"x" * 10**6}"}}'], 1, "has format 'xxxx"),
    "deep metadata": (
        [f'{{"optaxclip_log":1,"a":{"[" * 300}{"]" * 300}}}'],
        1,
        "it is nested too deeply",
    ),
    "a broken line at the end": ([HEAD, row(0), row(1)[:20]], 3, "not JSON"),
    "an unknown marker": ([HEAD, '{"x":1}', row(1)], 2, "neither a row nor a marker"),
    "a list for a number": (
        [HEAD, row(0), row(1, norm=[1.0])],
        3,
        r"norm must be a number, got \[1.0\]",
    ),
    "a list in a single row": ([HEAD, row(0, scale=[1, 1])], 2, "scale must be a"),
    "a huge step": ([HEAD, row(10**30), row(1)], 2, "no row of a log"),
    "half a step": ([HEAD, row(0), row(1.5)], 3, "step must be an integer, got 1.5"),
    "a word for a truth": (
        [HEAD, row(0), row(1).replace("false", '"false"')],
        3,
        "clipped must be true or false, got 'false'",
    ),
    "an infinite step": ([HEAD, '{"step":1e400}', row(1)], 2, "no row of a log"),
    "a rewind to nowhere": (
        [HEAD, row(0), '{"rewound_to":null}', row(1)],
        3,
        "neither a row nor a marker",
    ),
    "many brackets": ([HEAD, row(0), "[" * 100_000, row(1)], 3, "not JSON"),
    "leaf names": (
        ['{"optaxclip_log": 1, "leaf_names": 3}', row(0)],
        1,
        "leaf_names must be a list of strings, got 3",
    ),
    "leaf norms": (
        ['{"optaxclip_log": 1, "leaf_names": ["a", "b"]}', row(0, leaf_norms=[1.0])],
        2,
        "1 leaf norms, but 2 leaf names",
    ),
    "nested leaf norms": (
        ['{"optaxclip_log": 1, "leaf_names": ["a"]}', row(0, leaf_norms=[[1.0]])],
        2,
        r"leaf_norms must be a number, got \[1.0\]",
    ),
}


@pytest.mark.parametrize(("content", "line", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_located(tmp_path, content, line, reason):
    path = write(tmp_path, *content)
    message = rf"^`read\(path=...\)`: .*clip\.jsonl, line {line}: .*{reason}"
    with pytest.raises(ValueError, match=message):
        read(path)
    if content:
        with pytest.raises(ValueError, match=message):
            ClipLog(path)


def test_damage_far_down_is_located(tmp_path, monkeypatch):
    monkeypatch.setattr(_lines, "_AT_ONCE", 10)
    rows = [row(step) for step in range(95)]
    path = write(tmp_path, HEAD, *rows, '{"rewound_to":90}', row(90), '{"torn":1}')
    assert read(path).step.tolist() == list(range(91))
    assert (read(path).rewritten, read(path).torn) == (5, 1)
    path = write(tmp_path, HEAD, *rows[:57], "{", *rows[57:])
    with pytest.raises(ValueError, match="line 59: not JSON"):
        read(path)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_a_log_without_rows(tmp_path):
    data = read(write(tmp_path, HEAD))
    assert isinstance(data, LogData)
    assert [len(getattr(data, name)) for name in ("step", *FIELDS)] == [0] * 7
    assert (data.missed, data.leaf_norms, data.leaf_names) == ((), None, ())


def test_rows_without_leaf_norms_among_others(tmp_path):
    head = '{"optaxclip_log": 1, "leaf_names": ["a", "b"]}'
    path = write(tmp_path, head, row(0), row(1, leaf_norms=[1.0, "inf"]))
    np.testing.assert_array_equal(read(path).leaf_norms, [[np.nan] * 2, [1, np.inf]])


def test_to_pandas(path):
    pandas = pytest.importorskip("pandas")
    ClipLog(path).update(recorder(4, leaves=2))
    data = read(path)
    frame = data.to_pandas()
    assert list(frame) == [*FIELDS, "leaf_norm/leaf0", "leaf_norm/leaf1"]
    pandas.testing.assert_index_equal(
        frame.index, pandas.RangeIndex(4, name="step"), False
    )
    np.testing.assert_array_equal(frame["norm"], data.norm)
    np.testing.assert_array_equal(frame["leaf_norm/leaf1"], data.leaf_norms[:, 1])


def test_to_pandas_without_pandas(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"`LogData.to_pandas\(\)` needs pandas\."):
        read(write(tmp_path, HEAD)).to_pandas()


def test_leaves_keep_the_order_that_a_log_has(path):
    """Version 0.1.0 wrote them in another order than `drain` gives them."""
    log = ClipLog(path)
    log.update(recorder(3, leaves=2))
    head, *rows = path.read_text().splitlines()
    turned = json.loads(head) | {"leaf_names": ["leaf1", "leaf0"]}
    old = [json.loads(row) for row in rows]
    for row in old:
        row["leaf_norms"].reverse()
    lines = [{k: v for k, v in line.items() if k != "crc"} for line in (turned, *old)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    ClipLog(path).update(recorder(6, leaves=2))
    data = read(path)
    assert data.leaf_names == ("leaf1", "leaf0")
    _, leaf_norms = truth(0)
    np.testing.assert_array_equal(
        data.leaf_norms.astype(np.float32), leaf_norms[:6, ::-1]
    )
