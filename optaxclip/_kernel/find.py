"""Finding the states of this package in the state of an optimizer, and naming them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from optaxclip._kernel.names import unique
from optaxclip._norms import unwrapped

PyTree = Any

_UNREAD = ("rule_state", "skip_rule_state", "inner_state")  # large, and not scalars


def named(opt_state: PyTree, kind: type) -> dict[str, Any]:
    """Every state of a kind, by the prefix of its metrics."""
    found = list(find(opt_state, kind))
    if len(found) == 1:
        return {"": plain(found[0][1])}
    paths = [path for path, _ in found]
    names = unique([[_places(path) for path in paths], paths])
    return {f"{n}/": plain(state) for n, (_, state) in zip(names, found, strict=True)}


def find(
    tree: PyTree, kind: type, at: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every state of a kind and the path to it, including those inside another one."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, kind)
    )
    for path, node in nodes:
        if isinstance(node, kind):
            yield at + path, node
            inner = getattr(node, "inner_state", ())
            inside = jax.tree_util.GetAttrKey("inner_state")
            yield from find(inner, kind, (*at, *path, inside))


def kinds(tree: PyTree, most: int = 10) -> str:
    """The kinds of states in a tree, for messages: ``TraceState, EmptyState``."""
    found: list[str] = []

    def look(node: Any) -> None:
        if hasattr(node, "_fields"):
            found.append(type(node).__name__)
        inside = node.values() if isinstance(node, Mapping) else node
        if isinstance(inside, tuple | list) or isinstance(node, Mapping):
            for child in inside:
                look(child)

    look(tree)
    kind = type(tree).__name__
    article = "an" if kind[0] in "AEIOUaeiou" else "a"
    names = list(dict.fromkeys(found)) or [f"{article} {kind}"]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def plain(state: Any) -> Any:
    """A state with arrays in place of the variables that Flax NNX wraps them in."""
    fields = {name: () for name in _UNREAD if hasattr(state, name)}
    return unwrapped(state._replace(**fields))


def _places(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path without the attributes that wrappers add."""
    return tuple(e for e in path if not isinstance(e, jax.tree_util.GetAttrKey))
