"""How long a step of AdamW takes to trace, lower and compile behind a clip.

Trees of 10 to 3,000 leaves of 64 x 64. Every measurement runs in a process of its own,
one at a time, with the persistent compilation cache off, so that none finds anything in
a cache; a function of another shape is compiled first, which loads the compiler. The
time of processors is that of all three steps and all threads: on a busy machine it says
more than the clock.

    python benchmarks/compile.py
    python benchmarks/compile.py --leaves 1000 --only adamw,clip_by_leaf_norm
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import optax
from _hlo import figures
from _optimizers import entries, make_step

import optaxclip

SIDE = 64
CHOSEN = (
    "adamw,optax.clip_by_global_norm,clip_by_global_norm,clip_by_percentile,"
    "optax.clip_by_block_rms,clip_by_leaf_norm,clip_by_percentile(leaf)"
)
COLUMNS = {
    "leaves": "leaves",
    "name": "",
    "trace": "trace, s",
    "lower": "lower, s",
    "compile": "compile, s",
    "processor": "of processors, s",
    "lowered": "operations before",
    "instructions": "instructions after",
    "ratio": "of processors ÷ optax's",
}
AGAINST = {
    "clip_by_global_norm": "optax.clip_by_global_norm",
    "clip_by_percentile": "optax.clip_by_global_norm",
    "clip_by_leaf_norm": "optax.clip_by_block_rms",
    "clip_by_percentile(leaf)": "optax.clip_by_block_rms",
}


def optimizer(name: str) -> Any:
    if name == "clip_by_percentile(leaf)":
        clip = optaxclip.clip_by_percentile(95, 100, norm=optaxclip.leaf_norm)
        return optax.chain(clip, optax.adamw(1e-3))
    return entries()[name].make()


def compile_once(name: str, leaves: int) -> dict[str, Any]:
    """The times of one compilation; meant to be the first of its process."""
    jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(3)).compile()
    leaf = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
    params = {f"leaf_{i}": leaf for i in range(leaves)}
    init, step = make_step(optimizer(name))
    state = jax.eval_shape(init, params)
    jitted = jax.jit(step, donate_argnums=(1, 2, 3))
    busy, ends = time.process_time(), [time.perf_counter()]
    traced = jitted.trace(params, params, *state)
    ends.append(time.perf_counter())
    lowered = traced.lower()
    ends.append(time.perf_counter())
    compiled = lowered.compile()
    ends.append(time.perf_counter())
    busy = time.process_time() - busy
    spans = [later - start for start, later in itertools.pairwise(ends)]
    times = dict(zip(("trace", "lower", "compile"), spans, strict=True))
    operations = lowered.as_text().count(" = ")
    return {**times, "processor": busy, "lowered": operations, **figures(compiled)}


def in_new_process(name: str, leaves: int) -> dict[str, Any]:
    here = Path(__file__).resolve()
    code = (
        f"import sys; sys.path[:0] = [{str(here.parent)!r}]; import compile, json;"
        f"print('RESULT', json.dumps(compile.compile_once({name!r}, {leaves})))"
    )
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.split("RESULT", 1)[1])


def main() -> None:
    options = _measure.arguments(
        __doc__,
        leaves=("10,100,1000", "10", "numbers of leaves; 3000 takes minutes a row"),
        only=(CHOSEN, "optax.clip_by_global_norm,clip_by_global_norm", "optimizers"),
    )
    rows: list[dict[str, Any]] = []
    for leaves in map(int, options.leaves.split(",")):
        found: dict[str, float] = {}
        for name in options.only.split(","):
            row = {"leaves": leaves, "name": name, **in_new_process(name, leaves)}
            found[name] = row["processor"]
            if (against := AGAINST.get(name)) in found:
                row["ratio"] = found[name] / found[against]
            print(f"{leaves} leaves, {name}: {found[name]:.1f} s", file=sys.stderr)
            rows.append(row)
    _measure.save(__doc__, options, [("One step", rows, COLUMNS)])


if __name__ == "__main__":
    main()
