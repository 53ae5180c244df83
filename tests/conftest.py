"""The strictest JAX there is, and eight devices, before anything imports it."""

import os

# XLA ends a process whose devices wait 40 s for each other: on a busy machine of two
# cores, eight of them may.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        # One thread a worker: to split a small program costs more than it gains.
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import atexit
import gc
import importlib
import itertools
import shutil
import tempfile
from pathlib import Path

# Workers share what they compile, as do programs that tests start: two in five programs
# are needed again. Set the first of these to a directory of your own, and the next run
# starts with what this one compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="optaxclip-tests")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import jaxlib.version
import pytest
from jax._src import compiler

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many objects and little garbage, of which most collections find none.
gc.set_threshold(50_000, 20, 100)

# Compiling takes as long as it takes, and a failure must repeat on every machine.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves the slow ones out
def pytest_collection_modifyitems(items):
    """Of a test marked `sample(n)`, n variants run by default; the others are slow."""
    marked = [item for item in items if item.get_closest_marker("sample")]
    for _, group in itertools.groupby(
        marked, lambda item: (item.path, item.originalname)
    ):
        variants = list(group)
        n, last = variants[0].get_closest_marker("sample").args[0], len(variants) - 1
        chosen = {(2 * i + 1) * (last + 1) // (2 * n) for i in range(n)}
        for i, item in enumerate(variants):
            if i not in chosen:
                item.add_marker(pytest.mark.slow)


MAPS, MOST, finished = Path("/proc/self/maps"), 30_000, itertools.count(1)


def pytest_runtest_teardown():
    """Drops compiled programs before there are too many.

    Each takes some twenty memory maps, of which Linux allows a process 65,530: XLA ends
    a process that wants more.
    """
    if next(finished) % 50 or not MAPS.exists():
        return
    if MAPS.read_bytes().count(b"\n") > MOST:
        jax.clear_caches()


get_compile_options = compiler.get_compile_options

# Where the optimized program is itself what is tested: its numbers and its cost.
OPTIMIZED = {
    "test_budget",
    "test_extremes",
    "test_measure",
    "test_norms",
    "test_parity",
    "test_quantile",
    "test_sharded_jit",  # equal to rounding
    "test_zscore",
}


@pytest.fixture(autouse=True, scope="module")
def compile_fast(request):
    """Most tests compile much and run little.

    JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment tests optimized programs alone.
    """
    fast = OPTIMIZED.isdisjoint({request.path.parent.name, request.path.stem})
    fast &= os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != "0"
    jax.config.update("jax_disable_most_optimizations", fast)
    with pytest.MonkeyPatch.context() as patch:
        if fast and jaxlib.version.__version_info__ < (0, 11):
            patch.setattr(compiler, "get_compile_options", without_mlir)
        yield fast
    jax.config.update("jax_disable_most_optimizations", False)


def without_mlir(*args, **kwargs):
    """Compiles as XLA for CPU did before it had MLIR: three times as fast."""
    options = get_compile_options(*args, **kwargs)
    options.env_option_overrides += [("xla_cpu_use_fusion_emitters", False)]
    return options


@pytest.fixture(autouse=True)
def loss_scale_is_known(monkeypatch):
    """Most tests of the loss scale need no loss, nor a warning that none was scaled."""
    module = importlib.import_module("optaxclip._transforms.scale_state")
    monkeypatch.setattr(module, "_is_known", True)
    return module
