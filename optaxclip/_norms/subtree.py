"""The norm of every subtree: one for each group of leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from optaxclip._norms.gradients import split
from optaxclip._norms.groups import GroupNorms, groups_of
from optaxclip._norms.shares import AxisName, shares_of
from optaxclip._norms.tree import Ord, check_ord, joint

PyTree = Any


def subtree_norm(
    tree: PyTree,
    depth: int = 1,
    ord: Ord = 2,
    *,
    group: Callable[[str], str] | None = None,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    r"""The norm of every subtree, such as a layer: of all leaves in it together.

    .. math:: n_k = \Big( \sum_{l \in k} \|g_l\|_2^2 \Big)^{1/2}
              \quad\text{for every group } k \text{ of leaves } l

    Args:
      tree: Any pytree of arrays.
      depth: Leaves whose paths have the same first ``depth`` entries are a group. With
        1, the default, that is a norm for each child of the root: for each layer, if
        the parameters are a dict of layers. A leaf less deep is a group by itself.
      ord: 2, 1 or ``inf``, see :func:`global_norm`.
      group: A function from the path of a leaf, such as ``"layer_1/dense/kernel"``, to
        the name of its group, used instead of ``depth``. It may join leaves that lie
        apart: ``lambda path: path.split("/")[-1]`` joins all kernels, and all biases.
      axis_name: As in :func:`global_norm`.

    Returns:
      A dict from the name of each group to its norm, a float32 scalar (float64 if a
      leaf of the group is float64). By ``depth``, the name is the path of the subtree,
      such as ``"layers/0"``. Leaves that are not gradients are not counted, and a group
      without gradients is not in the dict. To JAX, the dict is a type of its own,
      which remembers the groups: ``dict(norms)`` makes a plain one, to be combined with
      other dicts in ``jax.tree.map``, ``scan`` or ``cond``.

    Raises:
      ValueError: as :func:`global_norm` does; ``depth`` is not a positive integer; or
        ``group`` returns something other than a string.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> layer = {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array(4.0)}
      >>> tree = {"layer_1": layer, "layer_2": {"kernel": jnp.array([1.0, 0.0])}}
      >>> norms = optaxclip.subtree_norm(tree)
      >>> print(norms["layer_1"], norms["layer_2"])
      5.0 1.0
      >>> norms = optaxclip.subtree_norm(tree, group=lambda path: path.split("/")[-1])
      >>> print(sorted(norms))
      ['bias', 'kernel']

    References:
      Shoeybi et al., `Megatron-LM <https://arxiv.org/abs/1909.08053>`_, 2019; its code
      clips by norms of groups of parameters.
    """
    check_ord("subtree_norm", ord)
    gradients = split(tree).gradients
    leaves, treedef = jax.tree.flatten(gradients)
    shares = shares_of("subtree_norm", gradients, axis_name)
    names = groups_of(gradients, depth, group)
    order = {name: i for i, name in enumerate(sorted(set(names)))}
    groups = tuple(order[name] for name in names)
    norms = joint(leaves, groups, shares, ord) if leaves else []
    return GroupNorms(zip(order, norms, strict=True), names, treedef)
