"""Checks of the state that an update is given: its type and its sizes."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from optaxclip._norms import path_name

PyTree = Any
State = TypeVar("State")


def own(kind: type[State], state: Any) -> State:
    """The state, if it is of this kind, with JAX arrays in place of NumPy's.

    Its ``inner_state`` is left as it is; the inner transformation checks that.
    """
    if not isinstance(state, kind):
        raise ValueError(
            f"`update(state=...)` must be a {kind.__name__}, as `init` makes it, got "
            f"{_shortened(state)}: call `init(params)` once before the first update. "
            "`optaxclip.migrate_state` takes a checkpoint that was made with another "
            "optimizer (with Optax's clips, for instance) or restored as dicts."
        )
    fields = state._asdict()  # type: ignore[attr-defined]  # all kinds are NamedTuples
    inner = {name: fields.pop(name) for name in ("inner_state",) if name in fields}
    return kind(**jax.tree.map(jnp.asarray, fields), **inner)


def check_sizes(
    field: str, state: PyTree, init: Callable[..., PyTree], *args: PyTree
) -> None:
    """Refuses a state with arrays of other shapes than ``init(*args)`` makes."""
    made, got = _shapes(jax.eval_shape(init, *args)), _shapes(state)
    differences = [
        f"{field}/{name} of shape {got.get(name)} in place of {made.get(name)}"
        for name in sorted(made.keys() | got.keys())
        if made.get(name) != got.get(name)
    ]
    if differences:
        more = len(differences) - 3
        raise ValueError(
            "`update(state=...)` must have the sizes that `init` makes, got "
            + ", ".join(differences[:3])
            + (f" and {more} more" if more > 0 else "")
            + ": was it saved with another `window`, `warmup`, `length` or rule? "
            "Use the same values again, or let `optaxclip.migrate_state` reset the "
            "parts that changed."
        )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): jnp.shape(leaf) for path, leaf in paths_and_leaves}


def _shortened(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
