"""Two processes, each with half of the devices, train as one process does."""

import os
import pathlib
import pickle
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from cases import assert_same_bits
from train_sharded import train

import optaxclip

SCRIPT = pathlib.Path(__file__).with_name("train_sharded.py")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def start(compile_fast):
    """Starts a process; none outlives the test."""
    started = []

    def start(*arguments):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
        environment = os.environ | {
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            # As in this process: it must come to the same bits.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(compile_fast),
        }
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def assert_same_steps(actual, expected):
    for i, pair in enumerate(zip(actual, expected, strict=True)):
        try:
            assert_same_bits(*pair)
        except AssertionError as error:
            error.add_note(f"at step {i}")
            raise


@pytest.mark.slow
def test_two_processes_train_as_one(start, tmp_path):
    port = free_port()
    files = [tmp_path / f"{index}.pickle" for index in range(2)]
    processes = [start(port, 2, index, file) for index, file in enumerate(files)]
    alone = train(jax.devices(), "exact")  # on as many devices as both have
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    both = [pickle.loads(file.read_bytes()) for file in files]

    reports = [optaxclip.metrics(state) for _, state in alone]
    skipped = [int(report["skip_nonfinite_count"]) for report in reports]
    assert skipped == [0] * 30 + [1] * 30
    clipped = np.diff([int(report["clip_count"]) for report in reports])
    assert 10 < clipped.sum() < 30

    # Where no sum is rounded, nothing may depend on who computes what.
    for run in both:
        assert_same_steps(run["exact"], alone)
    # Where the order of a sum matters, one process takes another than two. These grow
    # apart, at a pace that is the model's, but the two must stay of one mind.
    first, second = (run["real"] for run in both)
    assert optaxclip.metrics(first[-1][1])["clip_count"] > 0
    assert_same_steps(first, second)
