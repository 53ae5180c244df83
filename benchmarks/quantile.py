"""What an exact quantile of the last norms costs, against the size of the window.

Three ways to the same threshold: the rule `optaxclip.quantile`, which keeps the window
in order; `jnp.percentile` of a ring buffer, which sorts it at every step; and
`np.percentile` of a growing list on the host, as AutoClip's own code has it, the list
as long as the window. The first two as a donated call and as a step of one `lax.scan`,
which has no overhead of a call. A window holds only finite norms, as it does when full.

    python benchmarks/quantile.py
    python benchmarks/quantile.py --windows 1000,10000
"""

import functools
from collections.abc import Callable
from typing import Any

import _measure
import jax
import jax.numpy as jnp
import numpy as np
from _hlo import figures

import optaxclip

COLUMNS = {
    "window": "window",
    "name": "",
    "call": "donated call, µs",
    "ratio": "time ÷ optaxclip's",
    "scan": "step of a scan, µs",
    "scan_ratio": "time ÷ optaxclip's",
    "bytes": "bytes accessed ÷ window bytes",
}
Update = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def ring_percentile(norm: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    ring, slot = state
    threshold = jnp.percentile(ring, 95)
    return threshold, (ring.at[slot].set(norm), (slot + 1) % ring.shape[0])


def rules(window: int) -> dict[str, tuple[Update, Any]]:
    """Name -> an update and its state with a full window."""
    norms = jnp.asarray(np.random.default_rng(0).lognormal(size=window), jnp.float32)
    rule = optaxclip.quantile(0.95, window)
    full = rule.init(norms[0])._replace(
        quantile_ring=norms,
        quantile_sorted=jnp.sort(norms),
        quantile_count=jnp.int32(window),
    )
    return {
        "optaxclip.quantile": (rule.update, full),
        "jnp.percentile": (ring_percentile, (norms + 0, jnp.int32(0))),
    }


def call_of(program: Any, state: Any, norm: Any) -> Callable[[], Any]:
    def call() -> Any:
        nonlocal state
        result, state = program(norm, state)
        return result, state

    return call


def host_percentile(window: int) -> Callable[[], Any]:
    history = list(np.random.default_rng(0).lognormal(size=window))

    def call() -> Any:
        history.append(1.5)
        threshold = np.percentile(history, 95)
        history.pop()
        return threshold

    return call


def measure(window: int, options: Any) -> list[dict[str, Any]]:
    norm, steps = jnp.float32(1.5), options.steps
    donated = functools.partial(jax.jit, donate_argnums=1)
    calls, counts = {}, {}

    def scanned(update: Update, norms: jax.Array, state: Any) -> Any:
        def step(state: Any, norm: jax.Array) -> Any:
            threshold, state = update(norm, state)
            return state, threshold

        state, thresholds = jax.lax.scan(step, state, norms)
        return thresholds, state

    for name, (update, state) in rules(window).items():
        copy = jax.tree.map(jnp.copy, state)
        program = donated(update).lower(norm, state).compile()
        counts[name] = figures(program)
        calls[name, "call"] = call_of(program, state, norm)
        norms = jnp.linspace(0.5, 2.5, steps, dtype=jnp.float32)
        loop = donated(functools.partial(scanned, update)).lower(norms, copy).compile()
        calls[name, "scan"] = call_of(loop, copy, norms)
    calls["np.percentile", "call"] = host_percentile(window)
    times = _measure.interleave(calls, options.rounds)
    rows = []
    for name in ("optaxclip.quantile", "jnp.percentile", "np.percentile"):
        row = {"window": window, "name": name, **counts.get(name, {})}
        ours = "optaxclip.quantile"
        row["call"] = _measure.spread([1e6 * t for t in times[name, "call"]])
        row["ratio"] = _measure.ratio(times[name, "call"], times[ours, "call"])
        if name in counts:
            row["bytes"] = counts[name]["bytes_accessed"] / (4 * window)
            row["scan"] = _measure.spread(
                [1e6 * t / steps for t in times[name, "scan"]]
            )
            row["scan_ratio"] = _measure.ratio(times[name, "scan"], times[ours, "scan"])
        rows.append(row)
    return rows


def main() -> None:
    options = _measure.arguments(
        __doc__,
        windows=("100,1000,10000,100000", "100,1000", "sizes of the window"),
        steps=(50, 5, "steps of a scan"),
    )
    windows = [int(window) for window in options.windows.split(",")]
    rows = [row for window in windows for row in measure(window, options)]
    _measure.save(__doc__, options, [("One norm", rows, COLUMNS)])


if __name__ == "__main__":
    main()
