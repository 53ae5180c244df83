"""The strictest JAX there is, and eight devices, before anything imports it."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import importlib

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling takes as long as it takes, and a failure must repeat on every machine.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def loss_scale_is_known(monkeypatch):
    """Most tests of the loss scale need no loss, nor a warning that none was scaled."""
    module = importlib.import_module("optaxclip._transforms.scale_state")
    monkeypatch.setattr(module, "_is_known", True)
    return module
