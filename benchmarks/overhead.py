"""What a clip or a skip adds to a step of AdamW.

One donated step on a GPT-like tree: AdamW alone, behind each clip of optaxclip and of
optax, and under their skips. Every program is timed in every round, all on one set of
parameters and moments, which is handed from program to program, so that memory is
needed once; each program keeps the rest of its state.

    python benchmarks/overhead.py                          # 30 M parameters, float32
    python benchmarks/overhead.py --parameters 1000000000  # needs 20 bytes a parameter
    python benchmarks/overhead.py --dtypes float32,bfloat16,mixed
    python benchmarks/overhead.py --tree small --only clip_by_global_norm

"limit" is AdamW and one more read of the gradients, at the bandwidth that the fastest
of three plain reductions reached in the same rounds. "adamw again" is the same program
as "adamw": its distance from 1 is the noise.
"""

from typing import Any

import _measure
import _trees
import jax
import jax.numpy as jnp
from _hlo import figures
from _optimizers import choose, compile_step, make_step

TREES = {
    "gpt": _trees.gpt_like,
    "small": lambda parameters, dtype: _trees.small_leaves(parameters, dtype, 1000),
}
# name -> dtypes of parameters and gradients
DTYPES = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "mixed": (jnp.float32, jnp.bfloat16),
}
COLUMNS = {
    "name": "",
    "bytes": "bytes beyond AdamW ÷ gradient bytes",
    "temp": "temporary ÷ gradient bytes",
    "time": "time ÷ AdamW",
    "against": "beside",
    "ratio": "time ÷ its",
}


class Buffers:
    """The one set of parameters and moments that all programs work on in turn."""

    def __init__(self, grads: Any, params: Any, moments: Any) -> None:
        self.grads, self.params, self.moments = grads, params, moments

    def call(self, program: Any, rest: Any) -> Any:
        def step() -> Any:
            nonlocal rest
            results = program(self.grads, self.params, self.moments, rest)
            self.params, self.moments, rest = results
            return results

        return step


def measure(options: Any, dtype: str) -> tuple[str, list[dict[str, Any]], Any]:
    of_params, of_grads = DTYPES[dtype]
    shapes = TREES[options.tree](options.parameters, of_params)
    grad_shapes = _trees.cast(shapes, of_grads)
    grad_bytes = _trees.nbytes(grad_shapes)
    needed = 3 * _trees.nbytes(shapes) + 2 * grad_bytes
    if needed > 0.9 * _measure.memory():
        raise SystemExit(f"--parameters: {needed / 2**30:.1f} GiB of memory are needed")
    entries = choose(options.only)
    programs = {
        name: compile_step(entry.make(), grad_shapes, shapes)
        for name, entry in entries.items()
    }
    read = {n: jax.jit(f).lower(grad_shapes).compile() for n, f in _trees.READS.items()}

    params, grads = _trees.fill(shapes), _trees.fill(grad_shapes)
    init = make_step(entries["adamw"].make()).init
    buffers = Buffers(grads, params, _trees.zeros(jax.eval_shape(init, params)[0]))
    calls = {n: lambda program=program: program(grads) for n, program in read.items()}
    for name, program in programs.items():
        # Without the moments of a state, what is left of it is small.
        rest_of = make_step(entries[name].make()).init
        rest = jax.jit(lambda p, rest_of=rest_of: rest_of(p)[1])(params)
        calls[name] = buffers.call(program, rest)
    del params
    times = _measure.interleave(calls, options.rounds)
    costs = {name: figures(program) for name, program in programs.items()}
    return summary(dtype, shapes, grad_bytes, entries, times, costs)


def summary(
    dtype: str, shapes: Any, grad_bytes: int, entries: Any, times: Any, costs: Any
) -> tuple[str, list[dict[str, Any]], Any]:
    reader = _measure.fastest(times, list(_trees.READS))
    adamw, read = times["adamw"], times[reader]
    limit = [a + r for a, r in zip(adamw, read, strict=True)]
    rows: list[dict[str, Any]] = [
        {
            "name": "limit",
            "bytes": 1.0,
            "temp": 0.0,
            "time": _measure.ratio(limit, adamw),
        }
    ]
    base = costs["adamw"]["bytes_moved"]
    for name, (_, against) in entries.items():
        row = {
            "name": name,
            "bytes": (costs[name]["bytes_moved"] - base) / grad_bytes,
            "temp": costs[name]["temp_bytes"] / grad_bytes,
            "time": _measure.ratio(times[name], adamw),
            "seconds": _measure.spread(times[name]),
            **costs[name],
        }
        if against:
            ratio = _measure.ratio(times[name], times[against])
            row |= {"against": against, "ratio": ratio}
        rows.append(row)
    leaves = jax.tree.leaves(shapes)
    milliseconds = 1e3 * _measure.spread(adamw)["median"]
    bandwidth = grad_bytes / _measure.spread(read)["median"] / 1e9
    title = (
        f"{dtype}: {sum(x.size for x in leaves):,} parameters in {len(leaves):,} "
        f"leaves, AdamW {milliseconds:.1f} ms, read ({reader}) {bandwidth:.1f} GB/s"
    )
    return title, rows, COLUMNS


def main() -> None:
    options = _measure.arguments(
        __doc__,
        parameters=(30_000_000, 50_000, "how many parameters"),
        tree=("gpt", "gpt", "gpt: few large leaves; small: 1,000 equal ones"),
        dtypes=("float32", "float32", f"of {','.join(DTYPES)}"),
        only=("all", "clip_by_global_norm", "optimizers, beside their references"),
    )
    dtypes = options.dtypes.split(",")
    _measure.save(__doc__, options, [measure(options, dtype) for dtype in dtypes])


if __name__ == "__main__":
    main()
