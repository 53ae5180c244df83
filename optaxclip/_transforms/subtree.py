"""The clip of every subtree by its own norm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax

from optaxclip import _checks
from optaxclip._kernel import clip_by
from optaxclip._norms import AxisName, subtree_norm
from optaxclip._show import chosen, default
from optaxclip._thresholds import Rule, Threshold, as_rule, rule_by_name


def clip_by_subtree_norm(
    max_norm: Threshold | Rule | Mapping[str, Any],
    depth: int = default(1),
    *,
    group: Callable[[str], str] | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every subtree, such as a layer, down to a 2-norm.

    .. math:: g_k \leftarrow g_k \cdot \min(1, c_k / \|g_k\|_2)
              \quad\text{for every group } k \text{ of leaves}

    A layer that explodes shrinks by itself, with its kernel and bias in proportion, and
    the other layers keep their size.

    Args:
      max_norm: The largest norm :math:`c \ge 0`: a number, an array of shape (), a
        schedule ``step -> number``, or a dict from names of groups to these. Groups
        that the dict does not name are not clipped, unless :func:`optaxclip.by_name`
        sets a default.
      depth: As in :func:`optaxclip.subtree_norm`: 1 is a norm for each child of the
        root.
      group: As in :func:`optaxclip.subtree_norm`: a function from the path of a leaf to
        the name of its group.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`, whose metrics hold one norm
      for each group; dtypes are kept. Each group is treated by its norm as
      :func:`optaxclip.clip_by` says. For a threshold that adapts, give
      :func:`optaxclip.clip_by_percentile` the norm :func:`optaxclip.subtree_norm`.

    Raises:
      ValueError: ``max_norm`` is a concrete negative number or NaN; in ``init``, it
        names a group that does not exist; and as :func:`optaxclip.subtree_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> layer = {"kernel": jnp.array([6.0, 0.0]), "bias": jnp.array(8.0)}
      >>> grads = {"layer_1": layer, "layer_2": {"kernel": jnp.array([0.5, 0.0])}}
      >>> tx = optaxclip.clip_by_subtree_norm(1.0)
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["layer_1"]["kernel"], updates["layer_2"]["kernel"])
      [0.6 0. ] [0.5 0. ]
    """
    call = "clip_by_subtree_norm"
    depth = chosen(depth)
    _checks.count(call, "depth", depth)
    if isinstance(max_norm, Mapping):
        rule = rule_by_name(call, "max_norm", max_norm)
    else:
        rule = as_rule(call, "max_norm", max_norm)
    norm = functools.partial(subtree_norm, depth=depth, group=group)
    with _checks.made(call, threshold="max_norm"):
        return clip_by(norm, rule, axis_name=axis_name)
