"""Steps compiled for devices that are not there, and what their programs hold."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import _trees
import jax
import jax.numpy as jnp
import numpy as np
from _hlo import figures
from _optimizers import Entry, choose, compile_step, make_step
from jax.sharding import Mesh, NamedSharding, PartitionSpec

COLUMNS = {
    "name": "",
    "moved": "HBM bytes ÷ gradient bytes",
    "beyond": "beyond AdamW",
    "temp": "temporary ÷ gradient bytes",
    "fusions": "fusions",
    "all_reduces": "all-reduces",
    "copies": "other collectives",
}
AGAINST = {"against": "beside", "more": "HBM bytes beyond its"}


def measure(
    chips: Sequence[Any],
    dtype: str,
    options: Any,
    also: Callable[[Any], dict[str, Any]] = lambda program: {},
    columns: dict[str, str] | None = None,
    entries: dict[str, Entry] | None = None,
) -> Any:
    """A table of optimizers; ``also`` reads further ``columns`` from a program.

    The first of ``entries`` is AdamW alone; without them, ``options.only`` chooses.
    """
    mesh = Mesh(np.array(chips), ("chips",))
    shapes = _sharded(_trees.gpt_like(options.parameters, jnp.dtype(dtype)), mesh)
    grad_bytes = _trees.nbytes(shapes) / len(chips)
    if entries is None:
        entries = choose(options.only)
        del entries["adamw again"]
    kind = f"{len(chips)} x {chips[0].device_kind}"
    rows: dict[str, dict[str, Any]] = {}
    for name, (make, against) in entries.items():
        print(kind, dtype, name, file=sys.stderr)
        moments, rest = jax.eval_shape(make_step(make()).init, shapes)
        # Windows of past norms are the same on all chips; norms of units are spread.
        state = _sharded(moments, mesh), _sharded(rest, mesh, least_axes=2)
        program = compile_step(make(), shapes, shapes, state)
        counts = figures(program)
        others = dict(counts["collectives"])
        all_reduces = others.pop("all-reduce", {"count": 0})["count"]
        moved = counts["bytes_moved"] / grad_bytes
        rows[name] = {
            **counts,
            **also(program),
            "name": name,
            "moved": moved,
            "beyond": moved - (rows["adamw"]["moved"] if rows else moved),
            "temp": counts["temp_bytes"] / grad_bytes,
            "all_reduces": all_reduces,
            "copies": sum(entry["count"] for entry in others.values()),
            "against": against,
            "more": moved - rows[against]["moved"] if against else None,
        }
    size = sum(x.size for x in jax.tree.leaves(shapes))
    title = f"{kind}, {dtype}, {size:,} parameters: compiled, not timed"
    return title, list(rows.values()), {**COLUMNS, **(columns or {}), **AGAINST}


def _sharded(shapes: Any, mesh: Mesh, least_axes: int = 1) -> Any:
    """Leaves of so many axes spread over all chips along the longest; others whole."""

    def place(x: Any) -> Any:
        axes: list[Any] = [None] * len(x.shape)
        if len(x.shape) >= least_axes and max(x.shape) % mesh.size == 0:
            axes[int(np.argmax(x.shape))] = "chips"
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)
