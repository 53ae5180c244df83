"""Norms: functions from a tree of gradients to a prefix tree of norms.

All of them accumulate in float32 whatever the dtype of a leaf (float64 for float64
leaves), count complex numbers by modulus, and ignore leaves that are no gradients.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _euclidean, _gradients, unit_axes
from optaxclip._mesh import reduce_max, reduce_sum, varying_axes, whole_size

PyTree = Any
Ord = int | float


def global_norm(tree: PyTree, ord: Ord = 2) -> jax.Array:
    r"""The norm of all leaves together, as if they were one long vector.

    .. math:: \|g\|_2 = \sqrt{\sum_i |g_i|^2}, \quad
              \|g\|_1 = \sum_i |g_i|, \quad \|g\|_\infty = \max_i |g_i|

    Args:
      tree: Any pytree of arrays. Leaves that are no gradients are not counted.
      ord: 2, 1 or ``inf``.

    Returns:
      A float32 scalar (float64 if any leaf is float64). An empty tree has norm 0.
      The 2-norm is right from the smallest to the largest normal float32: where a
      square overflows or vanishes, the sum is taken again in a larger or smaller
      unit. Its derivative at zero is zero.

    Raises:
      ValueError: ``ord`` is none of 2, 1, ``inf``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tree = {"w": jnp.array([3.0, 0.0], jnp.bfloat16), "b": jnp.array(4.0)}
      >>> print(optaxclip.global_norm(tree), optaxclip.global_norm(tree, ord=1))
      5.0 7.0
    """
    _check_ord("global_norm", ord)
    leaves = jax.tree.leaves(_gradients.split(tree).gradients)
    if not leaves:
        return jnp.zeros((), jnp.float32)
    if ord == 2:
        return _euclidean.joint_norm(leaves)
    dtype = _gradients.accumulator(*(x.dtype for x in leaves))
    norms = [_norm(_gradients.widen(x, dtype), None, ord) for x in leaves]
    return functools.reduce(jnp.maximum if ord == math.inf else jnp.add, norms)


def leaf_norm(tree: PyTree, ord: Ord = 2) -> PyTree:
    """The norm of every leaf by itself.

    Args:
      tree: Any pytree of arrays.
      ord: 2, 1 or ``inf``, see :func:`global_norm`.

    Returns:
      A tree of float32 scalars (float64 for float64 leaves), with an
      ``optax.MaskedNode`` in place of each leaf that is no gradient. A leaf without
      elements has norm 0. A leaf all of whose elements are below 1e-19 may count
      as 0.

    Raises:
      ValueError: ``ord`` is none of 2, 1, ``inf``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> norms = optaxclip.leaf_norm({"w": jnp.array([3.0, 4.0]), "b": jnp.ones(4)})
      >>> print(norms["w"], norms["b"])
      5.0 2.0
    """
    _check_ord("leaf_norm", ord)
    gradients = _gradients.split(tree).gradients
    return _separate(gradients, [None] * len(jax.tree.leaves(gradients)), ord)


def unit_norm(tree: PyTree, axis: unit_axes.Axis = None, ord: Ord = 2) -> PyTree:
    """The norm of every unit: of the weights that feed one output.

    Args:
      tree: Any pytree of arrays.
      axis: The axes to sum over. ``None`` chooses by rank, see
        :func:`optaxclip.unit_axes.by_rank`; an int or a tuple of ints holds for every
        leaf; a function ``(path, leaf) -> axes`` (see :mod:`optaxclip.unit_axes`) or
        a prefix tree of any of these says it leaf by leaf.
      ord: 2, 1 or ``inf``, see :func:`global_norm`.

    Returns:
      As :func:`leaf_norm`, but each leaf keeps its rank: the summed axes have length
      1, so that a norm broadcasts against its leaf.

    Raises:
      ValueError: ``ord`` is none of 2, 1, ``inf``; a leaf lacks one of the axes; or
        ``axis`` is None and a leaf has more than 5 axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 2.0]])  # (inputs, outputs)
      >>> print(optaxclip.unit_norm({"kernel": kernel})["kernel"])
      [[5. 2.]]
    """
    _check_ord("unit_norm", ord)
    gradients = _gradients.split(tree).gradients
    shares = {a for x in jax.tree.leaves(gradients) for a in varying_axes(x)}
    if shares:
        raise ValueError(
            "`unit_norm(tree=...)` must hold whole leaves, got shares of them that "
            f"vary over the mesh axes {sorted(shares)}: within `shard_map` nothing "
            "says which units they belong to. Measure units under `jit` instead."
        )
    return _separate(gradients, unit_axes.resolve(axis, gradients), ord)


def leaf_rms(tree: PyTree) -> PyTree:
    r"""The root mean square of every leaf: its 2-norm over :math:`\sqrt{size}`.

    Args:
      tree: Any pytree of arrays.

    Returns:
      As :func:`leaf_norm`. A leaf without elements has a root mean square of 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> print(optaxclip.leaf_rms({"w": jnp.array([1.0, 7.0])})["w"])
      5.0
    """
    gradients = _gradients.split(tree).gradients
    norms = leaf_norm(gradients)
    return jax.tree.map(
        lambda n, x: n / math.sqrt(max(whole_size(x), 1)), norms, gradients
    )


def _check_ord(call: str, ord: Ord) -> None:
    if ord not in (1, 2, math.inf):
        raise ValueError(f"`{call}(ord=...)` must be 2, 1 or inf, got {ord!r}.")


def _separate(
    gradients: PyTree, axes: Sequence[tuple[int, ...] | None], ord: Ord
) -> PyTree:
    """One norm a leaf (axes None) or a unit (the axes to sum over)."""
    leaves, treedef = jax.tree.flatten(gradients)
    if ord == 2:
        return treedef.unflatten(_euclidean.separate_norms(leaves, axes))
    rows = zip(leaves, axes, strict=True)
    return treedef.unflatten([_norm(leaf, axis, ord) for leaf, axis in rows])


def _norm(leaf: jax.Array, axis: tuple[int, ...] | None, ord: Ord) -> jax.Array:
    """The 1- or max-norm of a leaf over ``axis``, or over all of it."""
    modulus = jnp.abs(_gradients.widen(leaf, _gradients.accumulator(leaf.dtype)))
    keepdims = axis is not None
    if ord == 1:
        return reduce_sum(jnp.sum(modulus, axis=axis, keepdims=keepdims))
    return reduce_max(jnp.max(modulus, axis=axis, keepdims=keepdims, initial=0))
