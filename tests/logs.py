"""Logs of made-up runs, written by hand in the format of the audit."""

import json
import math

import numpy as np

from optaxclip import quantile
from optaxclip.audit import replay

LEAVES = (
    "embed/embedding",
    *(
        f"decoder/layers_{layer}/{name}"
        for layer in range(3)
        for name in ("attention/kernel", "mlp/kernel", "norm/scale")
    ),
    "final_norm/scale",
    "lm_head/kernel",
)


def number(value):
    """A number as the log has it."""
    return float(value) if math.isfinite(value) else str(float(value))


def first_line(leaf_names=(), **changes):
    return {
        "optaxclip_log": 1,
        "started": "2026-03-01T09:30:00+00:00",
        "versions": {"optaxclip": "0.1.0", "jax": "0.12.0", "python": "3.13.1"},
        "device": {"platform": "tpu", "kind": "TPU v5e"},
        "process_count": 8,
        "transform": "skip_nonfinite(chain(clip_by_percentile(95, 1000), adamw))",
        "hyperparameters": {"learning_rate": 3e-4, "batch": 512, "dtype": "bfloat16"},
        "parameter_count": 124_439_808,
        "leaf_names": list(leaf_names),
        **changes,
    }


def row(step, norm, threshold=1.0, **more):
    """One step of a clip: scale and flags follow from norm and threshold."""
    finite = math.isfinite(norm)
    scale = norm if math.isnan(norm) else 1.0 if norm <= threshold else threshold / norm
    return {
        "step": step,
        "norm": number(norm),
        "threshold": number(threshold),
        "scale": number(scale),
        "clipped": finite and scale < 1,
        "skipped": not finite,
        **more,
    }


def write(path, rows, **changes):
    """Writes a log; returns its path."""
    lines = [first_line(**changes), *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def long_run(path, steps=20_000, seed=0):
    """A run with a noisy start, a drift, spikes, and steps of NaN, of 12 leaves."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps) / steps
    level = 0.8 + 6 * np.exp(-60 * t) + 1.6 / (1 + np.exp(-(t - 0.7) * 40))
    shares = rng.dirichlet(np.full(len(LEAVES), 3.0)) * np.exp(
        0.3 * rng.standard_normal((steps, len(LEAVES)))
    )
    shares[:, 0] += 0.9 * np.clip(t - 0.65, 0, 0.2) * 5  # the embedding takes over
    norms = level * np.exp(0.22 * rng.standard_normal(steps))
    spikes = rng.choice(np.arange(steps // 20, steps), steps // 1000, replace=False)
    norms[spikes] *= 10 ** rng.uniform(0.8, 2.5, len(spikes))
    shares[spikes, -1] += 20
    bad = np.r_[steps // 4, steps // 2 + np.arange(3), (9 * steps) // 10]
    leaves = norms[:, None] * np.sqrt(shares / shares.sum(axis=1, keepdims=True))
    norms[bad], leaves[bad, 3] = np.nan, np.nan
    norms[bad[-1]] = leaves[bad[-1], 3] = np.inf
    losses = 2.4 + 7 * np.exp(-25 * t) + 0.06 * rng.standard_normal(steps)
    losses[spikes] += rng.uniform(0.2, 1.5, len(spikes))
    losses[bad] = np.nan
    thresholds = replay(quantile(0.95, 1000), norms).thresholds
    rows = (
        row(
            i,
            float(f"{norms[i]:.6g}"),
            float(thresholds[i]),
            loss=number(round(losses[i], 4)),
            leaf_norms=[number(float(f"{x:.5g}")) for x in leaves[i]],
        )
        for i in range(steps)
    )
    return write(path, rows, leaf_names=LEAVES)


def no_alternatives(data):
    """In place of a page's replays, which take most of its time."""
    del data
    return {"table": None, "suggestions": None}
