"""AdamW behind every clip and skip, and the donated step they are compared in."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import optaxclip

PyTree = Any


class Entry(NamedTuple):
    make: Callable[[], Any]  # an optimizer, or a `guarded_step`
    against: str | None = None  # what to compare it with, mostly optax's


def _behind(make_clip: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: optax.chain(make_clip(), optax.adamw(1e-3))


def _global() -> Any:
    return optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adamw(1e-3))


def _never_ready(inner: Any) -> Any:
    # Equal norms, as a benchmark has them, deviate by nothing, and rounding alone
    # would make them spikes; a rule that still waits for norms does the same work.
    return optaxclip.skip_spikes(inner, window=4096, min_count=4096)


CLIPS = {
    "optax.clip": lambda: optax.clip(1.0),
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "optax.clip_by_block_rms": lambda: optax.clip_by_block_rms(1.0),
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "clip_by_value": lambda: optaxclip.clip_by_value(1.0),
    "clip_by_global_norm": lambda: optaxclip.clip_by_global_norm(1.0),
    "clip_by_leaf_norm": lambda: optaxclip.clip_by_leaf_norm(1.0),
    "clip_by_block_rms": lambda: optaxclip.clip_by_block_rms(1.0),
    "adaptive_grad_clip": lambda: optaxclip.adaptive_grad_clip(0.1),
    "clip_by_percentile": lambda: optaxclip.clip_by_percentile(),
    "autoclip": lambda: optaxclip.autoclip(10),
    "zclip": lambda: optaxclip.zclip(),
    "adagc": lambda: optaxclip.adagc(),
}

# The nearest that optax has; it has nothing adaptive, nor a norm of every leaf.
COUNTERPARTS = {
    "clip_by_value": "optax.clip",
    "clip_by_leaf_norm": "optax.clip_by_block_rms",
    "clip_by_block_rms": "optax.clip_by_block_rms",
    "adaptive_grad_clip": "optax.adaptive_grad_clip",
    "adagc": "optax.clip_by_block_rms",
    "skip_nonfinite": "optax.apply_if_finite",
    "skip_spikes": "optax.apply_if_finite",
    "guarded_step": "optax.apply_if_finite",
    "record_history": "clip_by_global_norm",  # the same without the record
}

# Around clip_by_global_norm and AdamW.
WRAPPERS = {
    "optax.apply_if_finite": lambda: optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 5
    ),
    "skip_nonfinite": lambda: optaxclip.skip_nonfinite(_global()),
    "skip_spikes": lambda: _never_ready(_global()),
    "guarded_step": lambda: optaxclip.guarded_step(_global()),
    "record_history": lambda: optaxclip.record_history(_global()),
}


def entries() -> dict[str, Entry]:
    """Name -> optimizer, in the order of the tables: optax's before ours."""
    # AdamW twice: the second is a control, its ratio to the first is the noise.
    table = dict.fromkeys(("adamw", "adamw again"), Entry(lambda: optax.adamw(1e-3)))
    for name, make in {**{n: _behind(c) for n, c in CLIPS.items()}, **WRAPPERS}.items():
        theirs = name.startswith("optax.")
        nearest = COUNTERPARTS.get(name, "optax.clip_by_global_norm")
        table[name] = Entry(make, None if theirs else nearest)
    return table


def choose(only: str) -> dict[str, Entry]:
    """The entries named in ``only`` ("all", or names), and what they are beside."""
    table = entries()
    if only == "all":
        return table
    chosen = {"adamw", "adamw again"}
    for name in only.split(","):
        if name not in table:
            raise SystemExit(f"--only: {name!r} is not among {', '.join(table)}")
        beside: str | None = name
        while beside:
            chosen.add(beside)
            beside = table[beside].against
    return {name: entry for name, entry in table.items() if name in chosen}


class Step(NamedTuple):
    """A step whose moments are apart from the rest of the state.

    The parameters and moments of one optimizer then fit every other one on the same
    tree: all of them can be timed in turn on one set of buffers.
    """

    init: Callable[[PyTree], Any]  # params -> (moments, rest)
    step: Callable[..., Any]  # grads, params, moments, rest -> the last three


def make_step(optimizer: Any) -> Step:
    def init(params: PyTree) -> Any:
        return _split(optimizer.init(params))[:2]

    def step(grads: PyTree, params: PyTree, moments: Any, rest: Any) -> Any:
        _, _, treedef, is_moment = _split(jax.eval_shape(optimizer.init, params))
        moments, rest = iter(moments), iter(rest)
        leaves = [next(moments if moment else rest) for moment in is_moment]
        state = treedef.unflatten(leaves)
        if isinstance(optimizer, optaxclip.GuardedStep):
            params, state = optimizer.step(grads, params, state)
        else:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, *_split(state)[:2]

    return Step(init, step)


def _split(state: PyTree) -> Any:
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    is_moment = [
        any(getattr(key, "name", None) in ("mu", "nu") for key in path)
        for path, _ in paths_and_leaves
    ]
    pairs = [
        (leaf, m) for (_, leaf), m in zip(paths_and_leaves, is_moment, strict=True)
    ]
    moments = [leaf for leaf, moment in pairs if moment]
    rest = [leaf for leaf, moment in pairs if not moment]
    return moments, rest, treedef, is_moment


def compile_step(
    optimizer: Any, grads: PyTree, params: PyTree, state: Any = None
) -> Any:
    """The step compiled for arrays of these shapes and shardings, its state donated."""
    init, step = make_step(optimizer)
    moments, rest = state or jax.eval_shape(init, params)
    donated = functools.partial(jax.jit, donate_argnums=(1, 2, 3))
    return donated(step).lower(grads, params, moments, rest).compile()
