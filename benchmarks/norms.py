"""How fast and how exact `global_norm` is.

Ours, optax's and `jnp.linalg.norm` of the raveled tree, beside three plain reductions
that read the same buffers once each. The fastest of these is what the machine and the
compiler can read; a norm is at best as fast. The error is relative to NumPy in float64.

    python benchmarks/norms.py
    python benchmarks/norms.py --parameters 300000000 --dtypes bfloat16
"""

import functools
from collections.abc import Callable
from typing import Any

import _measure
import _trees
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _hlo import figures
from jax.flatten_util import ravel_pytree

import optaxclip

NORMS: dict[str, Callable[[Any], Any]] = {
    "optaxclip.global_norm": optaxclip.global_norm,
    "optax.tree.norm": optax.tree.norm,
    "jnp.linalg.norm": lambda tree: jnp.linalg.norm(ravel_pytree(tree)[0]),
}
COLUMNS = {
    "name": "",
    "bandwidth": "GB/s",
    "share": "of the fastest read",
    "ratio": "time ÷ optax's",
    "bytes": "bytes moved ÷ gradient bytes",
    "temp": "temporary ÷ gradient bytes",
    "error": "relative error",
}


def exact_norm(tree: Any) -> float:
    leaves = (np.asarray(x).astype(np.float64).ravel() for x in jax.tree.leaves(tree))
    return float(np.sqrt(sum(np.dot(x, x) for x in leaves)))


def trees(options: Any, dtype: Any) -> dict[str, Any]:
    return {
        "few large leaves": _trees.gpt_like(options.parameters, dtype),
        f"{options.leaves:,} small leaves": _trees.small_leaves(
            options.parameters, dtype, options.leaves
        ),
    }


def measure(options: Any, kind: str, dtype: str) -> Any:
    shapes = trees(options, jnp.dtype(dtype))[kind]
    tree, size = _trees.fill(shapes), _trees.nbytes(shapes)
    functions = {**_trees.READS, **NORMS}
    programs = {name: jax.jit(f).lower(tree).compile() for name, f in functions.items()}
    calls = {name: functools.partial(f, tree) for name, f in programs.items()}
    times = _measure.interleave(calls, options.rounds)
    reader = _measure.fastest(times, list(_trees.READS))
    exact = exact_norm(tree)
    rows = []
    for name, program in programs.items():
        counts = figures(program)
        is_norm = name in NORMS
        row = {
            "name": name if is_norm else f"read: {name}",
            "bandwidth": _measure.spread([size / t / 1e9 for t in times[name]]),
            "share": _measure.ratio(times[reader], times[name]),
            "seconds": _measure.spread(times[name]),
            "bytes": counts["bytes_moved"] / size,
            "temp": counts["temp_bytes"] / size,
            **counts,
        }
        if is_norm:
            row["ratio"] = _measure.ratio(times[name], times["optax.tree.norm"])
            row["error"] = abs(float(calls[name]()) / exact - 1)
        rows.append(row)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    return f"{dtype}, {kind}: {count:,} elements; fastest read: {reader}", rows, COLUMNS


def main() -> None:
    options = _measure.arguments(
        __doc__,
        parameters=(100_000_000, 50_000, "elements of the tree"),
        leaves=(1000, 20, "how many small leaves"),
        dtypes=("float32,bfloat16,float16,float64", "float32,float64", "to measure"),
    )
    tables = []
    for dtype in options.dtypes.split(","):
        with jax.enable_x64(dtype == "float64"):
            kinds = trees(options, jnp.dtype(dtype))
            tables += [measure(options, kind, dtype) for kind in kinds]
    _measure.save(__doc__, options, tables)


if __name__ == "__main__":
    main()
