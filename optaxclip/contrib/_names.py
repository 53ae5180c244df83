"""Leaves by name, as states keep them."""

from collections.abc import Mapping
from typing import Any

import jax

from optaxclip._kernel import unique

PyTree = Any


def names_of(tree: PyTree, known: Mapping[str, Any] | None = None) -> list[str]:
    """The names of the leaves of a tree, refused if they are not among those known."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = unique([paths]) if paths else []
    if known is not None and (new := sorted(set(names) - known.keys())):
        raise ValueError(
            "`update(updates=...)` must have the tree structure of the parameters "
            f"given to `init`, got leaves {new} that `init` did not see."
        )
    return names
