"""Which axes of a leaf belong to one unit, see :mod:`optaxclip.unit_axes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optaxclip._norms.gradients import path_name

Path = tuple[Any, ...]
Axes = tuple[int, ...]
Leaf = Any  # a `jax.Array` or a `jax.ShapeDtypeStruct`
AxisFunction = Callable[[Path, Leaf], Axes | int]
Axis = Any  # None, int, tuple of int, AxisFunction, or a prefix tree of these


def by_rank(path: Path, leaf: Leaf) -> Axes:
    """All axes of a vector, the first of a matrix, all but the last of a convolution.

    The convention of ``optax.adaptive_grad_clip``: axis 0 for rank 2 and 3 (dense
    layers; query, key and value of an attention), axes (0, 1, 2) for rank 4, axes
    (0, 1, 2, 3) for rank 5. A leaf with at most one axis longer than 1 is one unit.
    It is wrong for 1-D convolutions, stacked layers and the output projection of an
    attention (all rank 3), and wherever outputs come first.
    """
    if sum(length != 1 for length in leaf.shape) <= 1:
        return tuple(range(leaf.ndim))
    if leaf.ndim > 5:
        raise ValueError(
            "`unit_norm(axis=...)` must be given for leaves of more than 5 axes, "
            f"got None for the leaf '{path_name(path)}' of shape {leaf.shape}."
        )
    return (0,) if leaf.ndim <= 3 else tuple(range(leaf.ndim - 1))


def output_last(path: Path, leaf: Leaf) -> Axes:
    """All axes but the last: for dense layers, convolutions and attention outputs."""
    return tuple(range(leaf.ndim if leaf.ndim <= 1 else leaf.ndim - 1))


def output_first(path: Path, leaf: Leaf) -> Axes:
    """All axes but the first: for the weights of Equinox and PyTorch."""
    return tuple(range(0 if leaf.ndim <= 1 else 1, leaf.ndim))


def flax(path: Path, leaf: Leaf) -> Axes:
    """Kernels as Flax lays them out, told apart by the names of their layers.

    The kernels of ``query``, ``key`` and ``value`` are (inputs, heads, features), with
    one unit for each head and feature. All other kernels have their outputs last.
    """
    names = path_name(path).removesuffix("/value").split("/")
    if leaf.ndim == 3 and names[-2:-1] in (["query"], ["key"], ["value"]):
        return (0,)
    return output_last(path, leaf)


def stacked(axis: AxisFunction) -> AxisFunction:
    """Leaves with a leading axis of layers, each layer laid out as ``axis`` says.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import unit_axes, unit_norm
      >>> kernels = jnp.ones((3, 4, 2))  # (layers, inputs, outputs)
      >>> unit_norm(kernels, axis=unit_axes.stacked(unit_axes.output_last)).shape
      (3, 1, 2)
    """

    def of_each_layer(path: Path, leaf: Leaf) -> Axes:
        layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return tuple(i + 1 for i in _checked(axis(path, layer), path, layer))

    return of_each_layer


def resolve(axis: Axis, tree: Any) -> list[Axes]:
    """The axes of every leaf of ``tree``, in the order of its leaves."""
    opaque = jax.tree.map(lambda spec: lambda: spec, axis, is_leaf=_is_spec)
    specs = [spec() for spec in jax.tree.leaves(jax.tree.broadcast(opaque, tree))]
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    rows = zip(specs, paths_and_leaves, strict=True)
    return [_checked(_ask(spec, path, leaf), path, leaf) for spec, (path, leaf) in rows]


def _ask(spec: Any, path: Path, leaf: Leaf) -> Any:
    if spec is None:
        return by_rank(path, leaf)
    return spec(path, leaf) if callable(spec) else spec


def _checked(axes: Any, path: Path, leaf: Leaf) -> Axes:
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    if not all(isinstance(axis, int | np.integer) for axis in axes):
        raise ValueError(
            "`unit_norm(axis=...)` must be an integer, a tuple of integers or a "
            "function from a path and a leaf to these, got "
            f"{axes if len(axes) != 1 else axes[0]!r} for the leaf '{path_name(path)}'."
        )
    if not all(-leaf.ndim <= axis < leaf.ndim for axis in axes):
        raise ValueError(
            f"`unit_norm(axis=...)` must name axes of the leaf "
            f"'{path_name(path)}' of shape {leaf.shape}, got {axes}."
        )
    return tuple(int(axis) % leaf.ndim for axis in axes)


def _is_spec(x: Any) -> bool:
    is_axes = type(x) is tuple and all(isinstance(axis, int) for axis in x)
    is_function = callable(x) and jax.tree_util.all_leaves([x])  # and not a module
    return x is None or is_function or isinstance(x, int) or is_axes
