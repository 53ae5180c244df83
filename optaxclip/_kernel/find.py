"""Finding the states of this package in the state of an optimizer, and naming them."""

from collections.abc import Iterator
from typing import Any

import jax

from optaxclip._norms import path_name

PyTree = Any

_UNREAD = ("rule_state", "skip_rule_state", "inner_state")  # large, and not scalars


def named(opt_state: PyTree, kind: type) -> dict[str, Any]:
    """Every state of a kind, by its prefix."""
    found = list(find(opt_state, kind))
    if len(found) == 1:
        return {"": plain(found[0][1])}
    paths = [path for path, _ in found]
    names = unique([[_places(path) for path in paths], paths])
    return {f"{n}/": plain(state) for n, (_, state) in zip(names, found, strict=True)}


def unique(spellings: list[list[tuple[Any, ...]]]) -> list[str]:
    """The first spelling of some paths in which no two have the same name."""
    for paths in spellings:
        names = [path_name(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [jax.tree_util.keystr(path) for path in spellings[-1]]


def find(
    tree: PyTree, kind: type, at: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every state of a kind with the path to it, those inside another one too."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, kind)
    )
    for path, node in nodes:
        if isinstance(node, kind):
            yield at + path, node
            inner = getattr(node, "inner_state", ())
            inside = jax.tree_util.GetAttrKey("inner_state")
            yield from find(inner, kind, (*at, *path, inside))


def plain(state: Any) -> Any:
    """A state with arrays in place of the variables that Flax NNX wraps them in."""

    def is_variable(node: Any) -> bool:
        return hasattr(node, "get_value")

    fields = state._replace(**{name: () for name in _UNREAD if hasattr(state, name)})
    return jax.tree.map(
        lambda x: x.get_value() if is_variable(x) else x, fields, is_leaf=is_variable
    )


def _places(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path without the attributes that wrappers add."""
    return tuple(e for e in path if not isinstance(e, jax.tree_util.GetAttrKey))
