"""What do the clips of `optaxclip.contrib` add to a step of AdamW? Read, not timed.

One donated step on a GPT-like tree in float32, compiled for this machine: bytes that it
moves and temporary memory beyond AdamW alone, and what the state of the clip holds, all
in units of the gradients.

    python benchmarks/contrib_bytes.py                 # 15 M parameters, minutes
    python benchmarks/contrib_bytes.py --only clippy
"""

from __future__ import annotations

from typing import Any

import _measure
import _trees
import jax
import jax.numpy as jnp
import optax
from _hlo import figures
from _optimizers import compile_step

import optaxclip
from optaxclip import contrib

BEHIND = ("clippy",)  # these bound updates: they stand behind the optimizer
CLIPS = {
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "clip_by_global_norm": lambda: optaxclip.clip_by_global_norm(1.0),
    "clip_by_subtree_norm": lambda: optaxclip.clip_by_subtree_norm(1.0, depth=2),
    "normalize": lambda: optaxclip.clip_by(
        optaxclip.global_norm, 1.0, apply=optaxclip.normalize
    ),
    "smooth_clip": lambda: contrib.smooth_clip(1.0),
    "limit_growth": lambda: contrib.limit_growth(),
    "sketched_quantile": lambda: optaxclip.clip_by(
        optaxclip.global_norm, contrib.sketched_quantile(0.5)
    ),
    "adagn": lambda: contrib.adagn(),
    "clippy": lambda: contrib.clippy(),
    "clip_coordinate_spikes": lambda: contrib.clip_coordinate_spikes(),
    "with_error_feedback": lambda: contrib.with_error_feedback(
        optaxclip.clip_by_global_norm(1.0)
    ),
}
COLUMNS = {
    "name": "",
    "bytes": "bytes beyond AdamW ÷ gradient bytes",
    "temp": "temporary ÷ gradient bytes",
    "state": "state ÷ gradient bytes",
}


def row(name: str, params: Any, base: float) -> dict[str, Any]:
    clip, adamw = CLIPS[name](), optax.adamw(1e-3)
    chain = optax.chain(*((adamw, clip) if name in BEHIND else (clip, adamw)))
    counted = figures(compile_step(chain, params, params))
    gradients = _trees.nbytes(params)
    return {
        "name": name,
        "bytes": (counted["bytes_moved"] - base) / gradients,
        "temp": counted["temp_bytes"] / gradients,
        "state": _trees.nbytes(jax.eval_shape(clip.init, params)) / gradients,
    }


def main() -> None:
    options = _measure.arguments(
        __doc__,
        parameters=(21_000_000, 500_000, "how many parameters"),
        only=(",".join(CLIPS), "optax.clip_by_global_norm,smooth_clip", "clips"),
    )
    params = _trees.gpt_like(options.parameters, jnp.float32)
    alone = figures(compile_step(optax.adamw(1e-3), params, params))["bytes_moved"]
    rows = [row(name, params, alone) for name in options.only.split(",")]
    leaves = jax.tree.leaves(params)
    count = sum(x.size for x in leaves)
    title = f"float32: {count:,} parameters in {len(leaves):,} leaves"
    _measure.save(__doc__, options, [(title, rows, COLUMNS)])


if __name__ == "__main__":
    main()
