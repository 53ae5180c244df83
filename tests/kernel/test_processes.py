"""Two processes, each with half of the devices, train as one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from train_sharded import train

SCRIPT = pathlib.Path(__file__).with_name("train_sharded.py")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def start():
    """Starts a process; none outlives the test."""
    started = []

    def start(*arguments):
        environment = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
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


def test_two_processes_end_with_the_parameters_of_one(start, tmp_path):
    alone = train(jax.devices())
    port = free_port()
    files = [tmp_path / f"{index}.json" for index in range(2)]
    processes = [start(port, 2, index, file) for index, file in enumerate(files)]
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    results = [json.loads(file.read_text()) for file in files]
    for result in results:
        assert result["devices"] == 8
        assert result["clip_count"] == alone["clip_count"] > 0
        assert result["nonfinite_count"] == alone["nonfinite_count"] == 1
        assert result["thresholds"] == results[0]["thresholds"]  # bit for bit
        np.testing.assert_allclose(result["thresholds"], alone["thresholds"], rtol=1e-5)
        for name, values in alone["params"].items():
            np.testing.assert_allclose(
                result["params"][name], values, rtol=1e-5, atol=1e-7
            )
