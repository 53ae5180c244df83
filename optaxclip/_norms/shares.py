"""Which mesh axes split a leaf into shares, and reductions over these axes.

Under ``shard_map`` the type of an array says over which axes it varies. Under ``pmap``,
``vmap`` and ``shard_map(check_vma=False)`` no type does, and ``axis_name`` has to.
"""

import contextlib
import contextvars
import functools
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._norms.gradients import path_name

PyTree = Any
AxisName = Any  # a name, a tuple of names, or a prefix tree of these and None
MeshAxes = tuple[str, ...]

_initialising = contextvars.ContextVar("initialising", default=False)
_warned = contextvars.ContextVar("warned", default=False)
_as_whole = contextvars.ContextVar("as_whole", default=False)
_as_told = contextvars.ContextVar("as_told", default=False)


def initialising() -> contextlib.AbstractContextManager[None]:
    """Inside it leaves count as whole: ``init`` needs only shapes, and no map."""
    return _within(_initialising)


def warned() -> contextlib.AbstractContextManager[None]:
    """Inside it there is no warning: measuring the gradients has already given it."""
    return _within(_warned)


@contextlib.contextmanager
def taken_as_whole() -> Iterator[None]:
    """Inside it, a transformation has taken all leaves as whole, and has warned of it.

    Shares are an error there: a norm of shares inside a skip would wait for devices
    that skip the step.
    """
    with _within(_warned), _within(_as_whole):
        yield


def as_told() -> contextlib.AbstractContextManager[None]:
    """Inside it ``axis_name`` alone says over which axes to sum, and no type does."""
    return _within(_as_told)


def refuse_shares(call: str, shares: Sequence[MeshAxes]) -> None:
    """Refuses shares of leaves, unless ``axis_name`` alone has told of them."""
    if any(shares) and not _as_told.get():
        raise ValueError(
            f"`{call}(tree=...)` must hold whole leaves, got shares of them over the "
            f"mesh axes {sorted({axis for axes in shares for axis in axes})}: nothing "
            "says which units they belong to. Measure units under `jit` instead."
        )


def shares_of(call: str, gradients: PyTree, axis_name: AxisName) -> list[MeshAxes]:
    """For each leaf, the axes over which devices hold different shares of it."""
    _refuse_unreduced(call, gradients)
    if _as_told.get():
        return [tuple(sorted(axes)) for axes in _told(call, gradients, axis_name)]
    leaves, checked = jax.tree.leaves(gradients), _checked_axes()
    told: list[set[str]] = [set()] * len(leaves)
    if axis_name is None and not _initialising.get():
        _warn_of({*jax.sharding.get_abstract_mesh().manual_axes} - checked)
    elif not _initialising.get():
        told = [{*axes} - checked for axes in _told(call, gradients, axis_name)]
    if _as_whole.get() and any(told):
        raise ValueError(
            f"`{call}(axis_name=...)` must be () within a transformation that treats "
            f"the same leaves as whole, got {axis_name!r}: give the skip, loss scale "
            "or recorder around it this `axis_name`, too."
        )
    return [
        tuple(sorted({*varying_axes(x)} | axes))
        for x, axes in zip(leaves, told, strict=True)
    ]


def varying_axes(x: jax.Array) -> MeshAxes:
    """The manual mesh axes over which ``x`` is known, from its type, to differ."""
    return tuple(sorted(jax.typeof(x).manual_axis_type.varying))


def same_on_all_devices(argument: str, value: Any) -> jax.Array:
    """A scalar as an array; refuses one whose type says that it varies over devices."""
    if jnp.shape(value):
        raise ValueError(
            f"`update({argument}=...)` must be a scalar, got the shape "
            f"{jnp.shape(value)}."
        )
    if axes := varying_axes(jnp.asarray(value)):
        raise ValueError(
            f"`update({argument}=...)` must be the same on all devices, got one that "
            f"varies over the mesh axes {list(axes)}: apply `jax.lax.pmean` first."
        )
    return jnp.asarray(value)


def whole_size(x: jax.Array, axes: MeshAxes) -> int:
    """The number of elements of ``x`` on all devices that hold shares of it."""
    return x.size * math.prod(lax.axis_size(axis) for axis in axes)


def reduce_sum(x: jax.Array, axes: MeshAxes) -> jax.Array:
    """Sums over the devices that hold different shares of ``x``."""
    return lax.psum(x, axes) if axes else x


def reduce_max(x: jax.Array, axes: MeshAxes) -> jax.Array:
    """The maximum over the devices that hold different shares of ``x``."""
    return lax.pmax(x, axes) if axes else x


def reduce_totals(
    values: Sequence[Sequence[jax.Array]],
    shares: Sequence[Sequence[MeshAxes]],
    total: Callable[[list[jax.Array]], jax.Array],
) -> list[jax.Array]:
    """The total of each group of values; one reduction for all of the same axes."""
    parts: dict[MeshAxes, dict[int, list[jax.Array]]] = {}
    for group, row in enumerate(zip(values, shares, strict=True)):
        for value, axes in zip(*row, strict=True):
            parts.setdefault(axes, {}).setdefault(group, []).append(value)
    totals: list[list[jax.Array]] = [[] for _ in values]
    for axes, groups in parts.items():
        of_groups = [total(group) for group in groups.values()]
        if axes and len(of_groups) > 1:
            of_groups = list(reduce_sum(jnp.stack(of_groups), axes))
        elif axes:
            of_groups = [reduce_sum(of_groups[0], axes)]
        for group, x in zip(groups, of_groups, strict=True):
            totals[group].append(x)
    return [functools.reduce(operator.add, group) for group in totals]


def _checked_axes() -> set[str]:
    """The manual mesh axes for which the type of an array says if it varies."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    return {axis for axis in axes if varying_axes(lax.axis_index(axis))}


def _warn_of(blind: set[str]) -> None:
    if blind and not _warned.get():
        warnings.warn(
            "`axis_name=` is missing: nothing shows which gradients are split over the "
            f"axes {sorted(blind)} (`pmap`, or `shard_map` with `check_vma=False`), so "
            "all are treated as whole. That is right if every device holds the same "
            "gradients, averaged over the devices: say so with `axis_name=()`. If not, "
            "name the axes over which they are split.",
            stacklevel=depth_of_caller(),
        )


def depth_of_caller() -> int:
    """The ``stacklevel`` of the code that called the optimizer, to warn there."""
    depth, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("optaxclip", "optax", "flax", "jax", "contextlib"):
            break
    return depth - 1


def _told(call: str, gradients: PyTree, axis_name: AxisName) -> list[MeshAxes]:
    """The entry of the prefix tree ``axis_name`` for each leaf, as a tuple."""
    told: list[MeshAxes] = []

    def spread(entry: Any, under: PyTree) -> None:
        if not _is_entry(entry):
            raise ValueError(f"{entry!r} is none of them.")
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        told.extend([axes] * len(jax.tree.leaves(under)))

    try:
        jax.tree.map(spread, axis_name, gradients, is_leaf=_is_entry)
    except ValueError as error:
        raise ValueError(
            f"`{call}(axis_name=...)` must be a name, a tuple of names or a prefix "
            f"tree of these and None for the gradients, got {axis_name!r}: {error}"
        ) from error
    for axis in {axis for axes in told for axis in axes}:
        _check_bound(call, axis)
    return told


def _is_entry(entry: Any) -> bool:
    is_names = type(entry) is tuple and all(isinstance(name, str) for name in entry)
    return entry is None or isinstance(entry, str) or is_names


def _check_bound(call: str, axis: str) -> None:
    try:
        lax.axis_size(axis)
    except NameError as error:
        raise ValueError(
            f"`{call}(axis_name=...)` must name axes of the `pmap`, `shard_map` or "
            f"`vmap` that it runs in, got {axis!r}."
        ) from error


def _refuse_unreduced(call: str, gradients: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        of = jax.typeof(leaf)
        axes = {*of.sharding.spec.unreduced} | {*of.manual_axis_type.unreduced}
        if axes:
            raise ValueError(
                f"`{call}(tree=...)` must hold reduced leaves, got "
                f"{path_name(path)!r} of type {of}, still to be summed over the "
                f"mesh axes {sorted(axes)}: apply `jax.reshard` (under `shard_map`, "
                "`jax.lax.psum`) to it first."
            )


@contextlib.contextmanager
def _within(flag: contextvars.ContextVar[bool]) -> Iterator[None]:
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)
