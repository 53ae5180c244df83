"""Which leaves of a tree are gradients, and how to set the others aside.

Clipping must neither count nor touch leaves that are not gradients: integers,
booleans, ``float0`` (the gradient of an integer), PRNG keys, and the fp8 statistics
that Flax keeps under ``_overwrite_with_gradient``, whose "gradient" is their next
value. ``None`` and ``optax.MaskedNode`` are no leaves at all in JAX.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any

_OVERWRITTEN = "_overwrite_with_gradient"


def path_name(path: tuple[Any, ...]) -> str:
    """Spells a key path as ``layer/0/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_gradient(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf is to be counted and clipped."""
    if any(getattr(entry, "key", None) == _OVERWRITTEN for entry in path):
        return False
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(dtype, jnp.inexact)


class Split(NamedTuple):
    """A tree in two: its gradients, and a way to put the rest back."""

    # As the tree, with `MaskedNode` where a leaf is no gradient, and with arrays in
    # place of the variables that Flax NNX wraps them in.
    gradients: PyTree
    restore: Callable[[PyTree], PyTree]  # undoes the split


def split(tree: PyTree) -> Split:
    """Separates the gradients of ``tree`` from its other leaves."""
    bare = unwrapped(tree)
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(bare)
    whole = jax.tree.structure(tree)  # the leaves of a tree and of it unwrapped pair up
    keep = [is_gradient(path, leaf) for path, leaf in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]

    def restore(gradients: PyTree) -> PyTree:
        new = iter(jax.tree.leaves(gradients))
        pairs = zip(leaves, keep, strict=True)
        return whole.unflatten([next(new) if k else leaf for leaf, k in pairs])

    only = [
        _array(leaf) if k else optax.MaskedNode()
        for leaf, k in zip(leaves, keep, strict=True)
    ]
    return Split(treedef.unflatten(only), restore)


def _array(leaf: Any) -> jax.Array:
    # `jnp.asarray` of JAX 0.10.0 makes a new array in a branch under `pmap`, of which
    # the kernel would not know that it has measured it.
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def unwrapped(tree: PyTree) -> PyTree:
    """The tree with arrays in place of the variables that Flax NNX wraps them in.

    A variable is a node with metadata. Its sharding fits the array, and no norm of it.
    """
    nnx = sys.modules.get("flax.nnx")  # whoever has variables has imported it
    if nnx is None:
        return tree

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    return jax.tree.map(
        lambda x: x.get_value() if is_variable(x) else x, tree, is_leaf=is_variable
    )


def accumulator(*dtypes: Any) -> Any:
    """The dtype in which statistics of these dtypes are kept: float32, or float64."""
    wide = any(jnp.finfo(dtype).dtype == jnp.float64 for dtype in dtypes)
    return jnp.float64 if wide else jnp.float32


def widen(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Casts a leaf to the accumulator ``dtype``, or to its complex counterpart."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        dtype = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return leaf.astype(dtype)


def scaled(leaf: jax.Array, scale: jax.Array) -> jax.Array:
    """A leaf times a real scale, in the scale's dtype or its complex counterpart."""
    wide = widen(leaf, scale.dtype)
    if jnp.iscomplexobj(leaf):
        return jax.lax.complex(wide.real * scale, wide.imag * scale)
    return wide * scale
