"""Norms by name: from what a norm returns to plain containers, and back.

A norm returns a tree of norms; the kernel keeps them in a dict by the path of each,
``layer/0/kernel``. So a state holds no node type of the parameters, which may carry
shardings that fit no norm, and it is known which norms a step left out.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._norms import GroupNorms, path_name
from optaxclip._show import shown_by_name
from optaxclip._thresholds import are_scalars_of_one_dtype

PyTree = Any
Separate = jax.Array | dict[str, jax.Array]  # norms one by one


class NamedNorms(NamedTuple):
    """The norms of leaves or subtrees in one array, as a state keeps them.

    Every array of a state costs time in each step and a record in each checkpoint, so
    there is one for all norms that are scalars of one dtype. Thresholds and scales are
    kept in the same way.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_leaf_norm(1.0)
      >>> grads = {"layer": {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> norms = state.clip_metrics.grad_norm
      >>> print(sorted(norms.norm_names), norms.norm_values)
      ['layer/b', 'layer/w'] [0.5 5. ]
    """

    norm_names: dict[str, tuple[()]]  #: the names as keys, with empty values
    norm_values: jax.Array  #: in the order of the sorted names

    def __repr__(self) -> str:
        return shown_by_name(sorted(self.norm_names), self.norm_values)


Norms = Separate | NamedNorms  # norms as states keep them


def stacked(norms: Separate) -> Norms:
    """Norms as states keep them: in one array, if they are scalars of one dtype."""
    if not isinstance(norms, Mapping) or not are_scalars_of_one_dtype(norms.values()):
        return norms
    values = jnp.stack([norms[name] for name in sorted(norms)])
    # The barrier keeps XLA from unrolling what reads the array into a chain over its
    # elements, slow to compile.
    values = jax.lax.optimization_barrier(values)
    return NamedNorms(dict.fromkeys(sorted(norms), ()), values)


def computed_once(norms: Separate) -> Separate:
    """Keeps XLA from computing numbers with names again wherever they are read."""
    if not isinstance(norms, Mapping):
        return norms
    return {name: jax.lax.optimization_barrier(norm) for name, norm in norms.items()}


def unstacked(kept: Norms) -> Separate:
    """Norms by name, from what a state keeps."""
    if not isinstance(kept, NamedNorms):
        return kept
    values = jnp.unstack(kept.norm_values)
    return dict(zip(sorted(kept.norm_names), values, strict=True))


def shapes_of(kept: Norms) -> Separate:
    """The shapes and dtypes of norms by name, from what a state keeps."""
    if not isinstance(kept, NamedNorms):
        return kept
    scalar: Any = jax.ShapeDtypeStruct((), kept.norm_values.dtype)
    shapes: dict[str, Any] = dict.fromkeys(sorted(kept.norm_names), scalar)
    return shapes


class Named(NamedTuple):
    """Norms by name, and a way back to the tree that they came from."""

    norms: Separate  # one array if it has no path; of shape (0,) if there is none
    place: Callable[[Separate], PyTree]  # any numbers by these names (or more) -> tree


def named(tree: PyTree, known: Separate | tuple[()] = ()) -> Named:
    """The norms in a tree by their paths, spelled as the ``known`` ones are."""
    if isinstance(tree, GroupNorms) and tree:

        def hold(values: Separate) -> PyTree:
            assert isinstance(values, dict)
            return tree.holding(values)

        return Named(dict(tree), hold)
    paths_and_norms, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path for path, _ in paths_and_norms]
    if not paths:
        return Named(jnp.zeros((0,), jnp.float32), lambda _: tree)
    if paths == [()]:
        return Named(tree, lambda norm: norm)
    names = unique([paths])
    if isinstance(known, Mapping):  # a step with fewer leaves may spell them otherwise
        full = [jax.tree_util.keystr(path) for path in paths]
        names = [f if f in known else n for n, f in zip(names, full, strict=True)]
    norms = {name: norm for name, (_, norm) in zip(names, paths_and_norms, strict=True)}

    def place(values: Separate) -> PyTree:
        assert isinstance(values, dict)
        return treedef.unflatten([values[name] for name in names])

    return Named({name: norms[name] for name in sorted(norms)}, place)


def by_name(norms: Separate) -> dict[str, jax.Array]:
    """The norms as a dict: a single one has the empty name."""
    if isinstance(norms, Mapping):
        return dict(norms)
    return {"": norms} if norms.size else {}


def unique(spellings: list[list[tuple[Any, ...]]]) -> list[str]:
    """Names of paths, by the first spelling in which no two names are the same."""
    for paths in spellings:
        names = [path_name(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [jax.tree_util.keystr(path) for path in spellings[-1]]
