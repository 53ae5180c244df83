"""Norms: functions from a tree of gradients to a prefix tree of norms.

All of them accumulate in float32 whatever the dtype of a leaf (float64 for float64
leaves), count complex numbers by modulus, and ignore leaves that are not gradients.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._norms import euclidean
from optaxclip._norms.gradients import accumulator, split, widen
from optaxclip._norms.maximum import largest
from optaxclip._norms.shares import (
    AxisName,
    MeshAxes,
    reduce_sum,
    reduce_totals,
    refuse_shares,
    shares_of,
    whole_size,
)
from optaxclip._norms.unit_axes import Axis, resolve

PyTree = Any
Ord = int | float


def global_norm(tree: PyTree, ord: Ord = 2, *, axis_name: AxisName = None) -> jax.Array:
    r"""The norm of all leaves together, as if they were one long vector.

    .. math:: \|g\|_2 = \sqrt{\sum_i |g_i|^2}, \quad
              \|g\|_1 = \sum_i |g_i|, \quad \|g\|_\infty = \max_i |g_i|

    Args:
      tree: Any pytree of arrays. Leaves that are not gradients are not counted.
      ord: 2, 1 or ``inf``.
      axis_name: Which leaves are sharded. Needed only under ``pmap``, ``vmap`` and
        ``shard_map(check_vma=False)``, where JAX's types cannot tell. The name of the
        axis over which leaves are sharded, a tuple of names, or a prefix tree of these
        with None for leaves that are whole. ``()`` says that all leaves are whole and
        the same on every device, as after a mean over the devices. None, the default,
        also takes all leaves as whole, and warns where that may be wrong.

    Returns:
      A float32 scalar (float64 if any leaf is float64). An empty tree has norm 0.
      The 2-norm is correct from the smallest to the largest normal float32, although
      squares overflow above 1.8e19 and vanish below 1e-19. Its derivative at zero is
      zero. If leaves are sharded, it is the norm of the whole
      leaves.

    Raises:
      ValueError: ``ord`` is not 2, 1 or ``inf``; ``axis_name`` does not fit the tree
        or names an axis that does not exist; or a leaf is unreduced.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tree = {"w": jnp.array([3.0, 0.0], jnp.bfloat16), "b": jnp.array(4.0)}
      >>> print(optaxclip.global_norm(tree), optaxclip.global_norm(tree, ord=1))
      5.0 7.0
    """
    check_ord("global_norm", ord)
    gradients = split(tree).gradients
    leaves = jax.tree.leaves(gradients)
    shares = shares_of("global_norm", gradients, axis_name)
    if not leaves:
        return jnp.zeros((), jnp.float32)
    return joint(leaves, (0,) * len(leaves), shares, ord)[0]


def leaf_norm(tree: PyTree, ord: Ord = 2, *, axis_name: AxisName = None) -> PyTree:
    """The norm of every leaf by itself.

    Args:
      tree: Any pytree of arrays.
      ord: 2, 1 or ``inf``, see :func:`global_norm`.
      axis_name: As in :func:`global_norm`.

    Returns:
      A tree of float32 scalars (float64 for float64 leaves), with an
      ``optax.MaskedNode`` in place of each leaf that is not a gradient. A leaf without
      elements has norm 0.

    Raises:
      ValueError: as :func:`global_norm` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> norms = optaxclip.leaf_norm({"w": jnp.array([3.0, 4.0]), "b": jnp.ones(4)})
      >>> print(norms["w"], norms["b"])
      5.0 2.0
    """
    check_ord("leaf_norm", ord)
    gradients = split(tree).gradients
    leaves = jax.tree.leaves(gradients)
    shares = shares_of("leaf_norm", gradients, axis_name)
    return _separate(gradients, [None] * len(leaves), shares, ord)


def unit_norm(
    tree: PyTree,
    axis: Axis = None,
    ord: Ord = 2,
    *,
    axis_name: AxisName = None,
) -> PyTree:
    """The norm of every unit: of the weights that feed one output.

    Args:
      tree: Any pytree of arrays.
      axis: The axes to sum over. ``None`` chooses by rank, see
        :func:`optaxclip.unit_axes.by_rank`. An int or a tuple of ints applies to every
        leaf. A function ``(path, leaf) -> axes`` (see :mod:`optaxclip.unit_axes`) or
        a prefix tree of any of these sets the axes leaf by leaf.
      ord: 2, 1 or ``inf``, see :func:`global_norm`.
      axis_name: As in :func:`global_norm`; leaves must be whole, so ``()`` or None.

    Returns:
      As :func:`leaf_norm`, but each leaf keeps its rank: the summed axes have length
      1, so that a norm broadcasts against its leaf. On a single CPU device, in a leaf
      of 16,384 elements or more, a unit whose elements are all below 1e-19 has norm 0,
      because their squares vanish, unless those of all units of the leaf vanish.

    Raises:
      ValueError: as :func:`global_norm` does; a leaf lacks one of the axes; ``axis``
        is None and a leaf has more than 5 axes; or a leaf is sharded under
        ``shard_map`` or ``pmap`` (under ``jit`` leaves may have any sharding).

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 2.0]])  # (inputs, outputs)
      >>> print(optaxclip.unit_norm({"kernel": kernel})["kernel"])
      [[5. 2.]]
    """
    check_ord("unit_norm", ord)
    gradients = split(tree).gradients
    shares = shares_of("unit_norm", gradients, axis_name)
    refuse_shares("unit_norm", shares)
    return _separate(gradients, resolve(axis, gradients), shares, ord)


def leaf_rms(tree: PyTree, *, axis_name: AxisName = None) -> PyTree:
    r"""The root mean square of every leaf.

    .. math:: \mathrm{RMS}(g) = \|g\|_2 / \sqrt{\mathrm{size}(g)}

    Args:
      tree: Any pytree of arrays.
      axis_name: As in :func:`global_norm`.

    Returns:
      As :func:`leaf_norm`. The root mean square of a leaf without elements is 0. It is
      infinite if the norm of the leaf does not fit float32.

    Raises:
      ValueError: as :func:`global_norm` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> print(optaxclip.leaf_rms({"w": jnp.array([1.0, 7.0])})["w"])
      5.0
    """
    gradients = split(tree).gradients
    leaves = jax.tree.leaves(gradients)
    shares = shares_of("leaf_rms", gradients, axis_name)
    norms = _separate(gradients, [None] * len(leaves), shares, 2)
    sizes = [whole_size(x, axes) for x, axes in zip(leaves, shares, strict=True)]
    roots = [math.sqrt(max(size, 1)) for size in sizes]
    return jax.tree.map(
        lambda norm, root: norm / root,
        norms,
        jax.tree.unflatten(jax.tree.structure(norms), roots),
    )


def joint(
    leaves: Sequence[jax.Array],
    groups: tuple[int, ...],
    shares: Sequence[MeshAxes],
    ord: Ord,
) -> list[jax.Array]:
    """One norm for each group of leaves."""
    if ord == 2:
        return euclidean.group_norms(leaves, groups, shares)
    members = euclidean.Groups(groups).members
    dtypes = [accumulator(*group) for group in members([x.dtype for x in leaves])]
    moduli = [
        jnp.abs(widen(x, dtypes[group]))
        for x, group in zip(leaves, groups, strict=True)
    ]
    if ord == 1:
        sums = [jnp.sum(x) for x in moduli]
        return reduce_totals(members(sums), members(shares), _sequential_sum)
    tops = [largest(x, None, on) for x, on in zip(moduli, shares, strict=True)]
    return [functools.reduce(jnp.maximum, group) for group in members(tops)]


def _sequential_sum(values: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, values)


def along(norm: Any, axis_name: AxisName) -> Any:
    """The norm with ``axis_name`` bound to it, or the norm itself if that is None."""
    return norm if axis_name is None else functools.partial(norm, axis_name=axis_name)


def check_ord(call: str, ord: Ord) -> None:
    """Refuses an order that is not 1, 2 or infinity."""
    if np.ndim(ord) or ord not in (1, 2, math.inf):
        raise ValueError(f"`{call}(ord=...)` must be 2, 1 or inf, got {ord!r}.")


def _separate(
    gradients: PyTree,
    axes: Sequence[tuple[int, ...] | None],
    shares: Sequence[MeshAxes],
    ord: Ord,
) -> PyTree:
    """One norm for each leaf (axes None) or unit (the axes to sum over)."""
    leaves, treedef = jax.tree.flatten(gradients)
    if ord == 2:
        return treedef.unflatten(euclidean.separate_norms(leaves, axes, shares))
    rows = zip(leaves, axes, shares, strict=True)
    return treedef.unflatten([_norm(*row, ord) for row in rows])


def _norm(
    leaf: jax.Array, axis: tuple[int, ...] | None, share: MeshAxes, ord: Ord
) -> jax.Array:
    """The 1- or max-norm of a leaf over ``axis``, or over all of it."""
    modulus = jnp.abs(widen(leaf, accumulator(leaf.dtype)))
    if ord == math.inf:
        return largest(modulus, axis, share)
    total = jnp.sum(modulus, axis=axis, keepdims=axis is not None)
    return reduce_sum(total, share)
