"""What clips and skips cost on a GPU, read from programs compiled without one.

Compiled, not timed: JAX's plugin for CUDA compiles for an NVIDIA H100 on any Linux
machine, with no GPU and no driver. Counted are the bytes that go to and from main
memory (HBM), temporary memory, fusions (a kernel each), all-reduces, and how a step is
launched: a step that is one CUDA graph costs the host one launch; where a loop or a
conditional is left out of the graphs, the host waits in the middle of every step for
the device to decide. Needs an environment of its own, 1.3 GB large:

    python3 -m venv .venv-gpu && .venv-gpu/bin/pip install .
    .venv-gpu/bin/pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt \\
        nvidia-cuda-nvcc nvidia-nvvm
    .venv-gpu/bin/python benchmarks/gpu_compile.py
    .venv-gpu/bin/python benchmarks/gpu_compile.py --parameters 20000000
    XLA_FLAGS=--xla_gpu_enable_command_buffer=+COLLECTIVES \\
        .venv-gpu/bin/python benchmarks/gpu_compile.py --devices 4

By default XLA leaves collectives out of CUDA graphs; the flag takes them in.
With no GPU at hand nothing is tuned by timing. These steps are sums and elementwise
arithmetic, for which the compiler would not time anything.
"""

import importlib.metadata
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Before JAX is imported: no GPU is looked for, and how steps are launched is written.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
os.environ.setdefault("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] += f" --xla_dump_to={tempfile.mkdtemp()}"

import _measure
from _deviceless import measure
from jax.experimental import topologies

# What XLA's `h100_sxm.txtpb` says, but for the rates of arithmetic.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  runtime_version: "13.2.0"
  dnn_version: "9.23.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
FLAGS, _, dump = os.environ["XLA_FLAGS"].partition(" --xla_dump_to=")
DUMP = Path(dump)
COLUMNS = {"graphs": "CUDA graphs", "waits": "waits of the host"}


def launches(program: Any) -> dict[str, int]:
    """The CUDA graphs, and the loops and conditionals between them, last compiled."""
    written = sorted(DUMP.glob("*thunk_sequence*.txt"), key=_when)
    counts = {"graphs": 0, "waits": 0}
    for line in written[-1].read_text().splitlines():
        if not (found := re.match(r"\d+: (k\w+)", line)):
            continue
        if found[1] == "kCommandBuffer":
            counts["graphs"] += 1
        elif found[1] in ("kWhile", "kConditional"):
            counts["waits"] += 1
    for file in filter(Path.is_file, DUMP.iterdir()):  # a program for CPU has a folder
        file.unlink()
    return counts


def _when(file: Path) -> tuple[int, bool]:
    return file.stat().st_mtime_ns, "after" in file.name


def main() -> None:
    options = _measure.arguments(
        __doc__,
        parameters=(100_000_000, 2_000_000, "how many parameters"),
        devices=("1,4", "1", "numbers of GPUs to compile for"),
        dtypes=("float32,bfloat16", "float32", "of parameters and gradients"),
        only=("all", "clip_by_global_norm", "optimizers, beside their references"),
    )
    tables = []
    for count in options.devices.split(","):
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology=f"1x1x{count}"
        )
        for dtype in options.dtypes.split(","):
            tables.append(measure(topology.devices, dtype, options, launches, COLUMNS))
    shutil.rmtree(DUMP)
    also = {
        "device": "gpu",
        "jax_cuda13_plugin": importlib.metadata.version("jax-cuda13-plugin"),
        "xla_flags": FLAGS,
    }
    _measure.save(__doc__, options, tables, **also)


if __name__ == "__main__":
    main()
