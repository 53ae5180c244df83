"""What clips and skips cost on a TPU, read from programs compiled without one.

Compiled, not timed: the compiler for TPU (`libtpu`, from PyPI) runs on any Linux
machine and gives the finished program, of which this counts the bytes that go to and
from main memory (HBM), the temporary memory, fusions and all-reduces. Needs an
environment of its own, 1 GB large, since JAX would take a `libtpu` for a TPU:

    python3 -m venv .venv-tpu && .venv-tpu/bin/pip install libtpu .
    .venv-tpu/bin/python benchmarks/tpu_compile.py
    .venv-tpu/bin/python benchmarks/tpu_compile.py --parameters 20000000

On four chips parameters and moments are sharded, each leaf along its longest axis, and
gradients likewise. HBM bytes are those of one chip; a leaf that the compiler fetches
into the vector memory ahead of its use is counted once, which XLA's "bytes accessed"
counts twice. AdamW alone moves 7 times the gradients: it reads 4 arrays, writes 3.
"""

import importlib.metadata
import os
from typing import Any

# Before JAX is imported: no TPU is looked for, and the compiler is told of one.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so none is contended for
}

import _measure
from _deviceless import measure
from jax.experimental import topologies


def compare(doc: str, options: Any, **how: Any) -> None:
    """Prints and saves a table for each topology and dtype that the options name."""
    tables = []
    for name in options.topologies.split(","):
        topology = topologies.get_topology_desc(topology_name=name, platform="tpu")
        for dtype in options.dtypes.split(","):
            tables.append(measure(topology.devices, dtype, options, **how))
    libtpu = importlib.metadata.version("libtpu")
    _measure.save(doc, options, tables, device="tpu", libtpu=libtpu)


def main() -> None:
    options = _measure.arguments(
        __doc__,
        parameters=(100_000_000, 2_000_000, "how many parameters"),
        topologies=("v5e:1x1,v5e:2x2", "v5e:1x1", "topologies to compile for"),
        dtypes=("float32,bfloat16", "float32", "of parameters and gradients"),
        only=("all", "clip_by_global_norm", "optimizers, beside their references"),
    )
    compare(__doc__, options)


if __name__ == "__main__":
    main()
