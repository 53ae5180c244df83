"""Groups of leaves that share a norm: subtrees, or leaves that lie apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from optaxclip import _checks
from optaxclip._norms.gradients import path_name

PyTree = Any


@jax.tree_util.register_pytree_with_keys_class
class GroupNorms(dict[str, jax.Array]):
    """Norms by the names of groups, which knows the group of every leaf.

    A pytree like the dict that it is, and no prefix of the tree that was measured:
    :meth:`spread` makes one of it.
    """

    def __init__(
        self,
        norms: Iterable[tuple[str, jax.Array]],
        groups: Sequence[str],
        treedef: Any,  # a `PyTreeDef`, which JAX exports as no type
    ) -> None:
        super().__init__(norms)
        self._groups, self._treedef = tuple(groups), treedef

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        """Pickled as a plain dict, because a ``PyTreeDef`` cannot be."""
        return dict, (dict(self),)

    def holding(self, values: Mapping[str, Any]) -> GroupNorms:
        """Other values for the same groups."""
        pairs = ((name, values[name]) for name in self)
        return GroupNorms(pairs, self._groups, self._treedef)

    def spread(self) -> PyTree:
        """The value of its group for every leaf, in the tree that was measured."""
        return self._treedef.unflatten([self[name] for name in self._groups])

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """The norms in the order of their names."""
        keys = sorted(self)
        children = [(jax.tree_util.DictKey(key), self[key]) for key in keys]
        return children, (tuple(keys), self._groups, self._treedef)

    @classmethod
    def tree_unflatten(cls, auxiliary: Any, children: Iterable[Any]) -> GroupNorms:
        """The inverse of :meth:`tree_flatten_with_keys`."""
        keys, groups, treedef = auxiliary
        return cls(zip(keys, children, strict=True), groups, treedef)


def groups_of(
    gradients: PyTree, depth: int, group: Callable[[str], str] | None
) -> list[str]:
    """The name of the group of every leaf."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(gradients)[0]]
    if group is not None:
        _checks.function("subtree_norm", "group", group, "from a path to a name")
        return [_named(group, path_name(path)) for path in paths]
    _checks.count("subtree_norm", "depth", depth)
    prefixes = [path[:depth] for path in paths]
    names = {prefix: path_name(prefix) for prefix in prefixes}
    if len(set(names.values())) < len(names):  # a key with a slash, say
        names = {prefix: jax.tree_util.keystr(prefix) for prefix in names}
    return [names[prefix] for prefix in prefixes]


def _named(group: Callable[[str], str], path: str) -> str:
    name = group(path)
    if not isinstance(name, str):
        raise ValueError(
            "`subtree_norm(group=...)` must return the name of a group, a string, got "
            f"{name!r} for the leaf {path!r}."
        )
    return name


def prefix_of(norms: PyTree) -> PyTree:
    """Norms, or values in their place, as a prefix tree of the gradients."""
    return norms.spread() if isinstance(norms, GroupNorms) else norms
