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
import sys

# Before JAX is imported: no TPU is looked for, and the compiler is told of one.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so none is contended for
}

from typing import Any

import _measure
import _trees
import jax
import jax.numpy as jnp
import numpy as np
from _hlo import figures
from _optimizers import choose, compile_step, make_step
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

COLUMNS = {
    "name": "",
    "hbm": "HBM bytes ÷ gradient bytes",
    "beyond": "beyond AdamW",
    "temp": "temporary ÷ gradient bytes",
    "fusions": "fusions",
    "all_reduces": "all-reduces",
    "copies": "other collectives",
    "against": "beside",
    "more": "HBM bytes beyond its",
}


def sharded(shapes: Any, mesh: Mesh, least_axes: int = 1) -> Any:
    """Leaves of so many axes spread over all chips along the longest; others whole."""

    def place(x: Any) -> Any:
        axes: list[Any] = [None] * len(x.shape)
        if len(x.shape) >= least_axes and max(x.shape) % mesh.size == 0:
            axes[int(np.argmax(x.shape))] = "chips"
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)


def measure(topology: str, dtype: str, options: Any) -> Any:
    chips = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(chips), ("chips",))
    shapes = sharded(_trees.gpt_like(options.parameters, jnp.dtype(dtype)), mesh)
    grad_bytes = _trees.nbytes(shapes) / len(chips)
    entries = choose(options.only)
    del entries["adamw again"]
    rows: dict[str, dict[str, Any]] = {}
    for name, (make, against) in entries.items():
        print(topology, dtype, name, file=sys.stderr)
        moments, rest = jax.eval_shape(make_step(make()).init, shapes)
        # Windows of past norms are the same on all chips; norms of units are spread.
        state = sharded(moments, mesh), sharded(rest, mesh, least_axes=2)
        program = compile_step(make(), shapes, shapes, state)
        counts = figures(program)
        others = dict(counts["collectives"])
        all_reduces = others.pop("all-reduce", {"count": 0})["count"]
        moved = counts["bytes_moved"] / grad_bytes
        rows[name] = {
            "name": name,
            "hbm": moved,
            "beyond": moved - (rows["adamw"]["hbm"] if rows else moved),
            "temp": counts["temp_bytes"] / grad_bytes,
            "all_reduces": all_reduces,
            "copies": sum(entry["count"] for entry in others.values()),
            "against": against,
            "more": moved - rows[against]["hbm"] if against else None,
            **counts,
        }
    size = sum(x.size for x in jax.tree.leaves(shapes))
    kind = f"{len(chips)} x {chips[0].device_kind}"
    title = f"{kind} ({topology}), {dtype}, {size:,} parameters: compiled, not timed"
    return title, list(rows.values()), COLUMNS


def main() -> None:
    options = _measure.arguments(
        __doc__,
        parameters=(100_000_000, 2_000_000, "how many parameters"),
        topologies=("v5e:1x1,v5e:2x2", "v5e:1x1", "topologies to compile for"),
        dtypes=("float32,bfloat16", "float32", "of parameters and gradients"),
        only=("all", "clip_by_global_norm", "optimizers, beside their references"),
    )
    tables = [
        measure(topology, dtype, options)
        for topology in options.topologies.split(",")
        for dtype in options.dtypes.split(",")
    ]
    libtpu = importlib.metadata.version("libtpu")
    _measure.save(__doc__, options, tables, device="tpu", libtpu=libtpu)


if __name__ == "__main__":
    main()
