"""Clipping inside a model: what flows back through one value."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _checks
from optaxclip._kernel import clamp, clip_scale, rescale
from optaxclip._norms import (
    AxisName,
    as_told,
    global_norm,
    split,
    unit_norm,
    varying_axes,
)

PyTree = Any


def clip_cotangent(
    x: PyTree,
    max_norm: jax.typing.ArrayLike | None = None,
    *,
    max_value: jax.typing.ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    axis_name: AxisName = None,
) -> PyTree:
    r"""Returns ``x`` and clips the gradient that flows back through it.

    .. math:: y = x, \quad
              \bar x = \bar y \cdot \min(1, c / \|\bar y\|_2)

    Here :math:`\bar y` is the derivative of the loss by the value. In a recurrent
    network, call it on the hidden state in each step of the ``scan``: the gradient is
    then clipped at each step back through time, before the steps before it multiply it
    further. In a deep network, one bad token or example cannot reach the layers below.

    Args:
      x: Any pytree of arrays, such as an activation or a hidden state.
      max_norm: The largest norm :math:`c \ge 0`: a number or an array, traced or not,
        that broadcasts against the norms of every array in ``x``. Its own gradient
        is 0.
      max_value: Instead of a norm, the largest value :math:`v \ge 0` of an element,
        :math:`\bar x_i = \min(\max(\bar y_i, -v), v)`, which broadcasts against every
        array in ``x``. Complex elements are cut by modulus, an infinite real one
        becomes :math:`\pm v`.
      axis: For ``max_norm``, the axes to sum over. None, the default, takes one norm
        over everything in ``x``. With -1, every vector along the last axis is clipped
        by itself: for an activation of shape (batch, time, features), every token of
        every example. With ``(1, 2)``, every example.
      axis_name: For ``max_norm`` under ``shard_map`` or ``pmap``: the mesh axes over
        which the elements of one norm are split, as a name, a tuple of names, or a
        prefix tree of these. With None, the default, the norm over everything in an
        ``x`` that varies over mesh axes is taken over all its shards; with ``axis``,
        such an ``x`` is refused. With ``()``, every device measures what it holds.
        That is right for a clip by example, by ``axis`` or by ``vmap``, where the
        devices share a batch.

    Returns:
      ``x``, unchanged. Norms are float32 (float64 for float64 arrays), and the gradient
      is rounded once, to its own dtype. Below the threshold it keeps its bits. A norm
      of 0 gives zeros. NaN stays NaN, and with an infinite norm infinite elements
      become NaN and the others 0. Under ``vmap``, every example has its own norm.

      *Higher derivatives.* The clip belongs to the first derivative, so both reverse
      mode and forward mode (``jax.hessian``) over reverse mode differentiate the
      clipped gradient. Forward mode alone (``jax.jvp``, ``jax.jacfwd``) raises JAX's
      ``TypeError`` for functions with a custom reverse rule.

    Raises:
      ValueError: not one of ``max_norm`` and ``max_value`` is given, or it is negative
        or not a number, as far as it is concrete, or does not broadcast against the
        norms or the elements; ``x`` lacks one of the axes; ``axis`` or ``axis_name`` is
        given with ``max_value``; or, when the gradient is taken, ``axis_name`` does not
        fit ``x``, or is None where ``axis`` is given and ``x`` varies over mesh axes.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> def loss(x, bound):
      ...     return 50 * jnp.sum(optaxclip.clip_cotangent(x, bound) ** 2)
      >>> print(jax.grad(loss)(jnp.array([3.0, 4.0]), 1.0))
      [0.6 0.8]
      >>> def cut(x):
      ...     return 50 * jnp.sum(optaxclip.clip_cotangent(x, max_value=1.0) ** 2)
      >>> print(jax.grad(cut)(jnp.array([3.0, 0.004])))
      [1.  0.4]

    References:
      Graves, `Generating sequences with recurrent neural networks
      <https://arxiv.org/abs/1308.0850>`_, 2013, which clips the derivatives at each
      time step of an LSTM, element by element
    """
    given = {"max_norm": max_norm, "max_value": max_value}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            "`clip_cotangent` must be given one of `max_norm` and `max_value`, got "
            f"{' and '.join(given) or 'neither'}."
        )
    ((name, bound),) = given.items()
    _checks.non_negative("clip_cotangent", name, bound)
    bound = jnp.asarray(float(bound) if isinstance(bound, int) else bound)
    if not jnp.issubdtype(bound.dtype, jnp.floating):
        bound = bound.astype(float)
    if name == "max_value":
        if axis is not None or axis_name is not None:
            raise ValueError(
                "`clip_cotangent(max_value=...)` cuts each element by itself, so it "
                "takes no `axis` and no `axis_name`. Did you mean `max_norm`?"
            )
        _check_shapes(name, bound, [jnp.shape(leaf) for leaf in jax.tree.leaves(x)])
        return _identity(_by_value, x, bound)
    _check_shapes(name, bound, _shapes_of_norms(x, axis))
    return _identity(functools.partial(_by_norm, axis, axis_name), x, bound)


def _shapes_of_norms(x: PyTree, axis: Any) -> list[tuple[int, ...]]:
    if axis is None:
        return [()]
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not all(isinstance(a, int) and not isinstance(a, bool) for a in axes):
        rule = "None, an integer or a tuple of integers"
        _checks.refused("clip_cotangent", "axis", rule, axis)
    shapes = []
    for leaf in jax.tree.leaves(x):
        rank, shape = jnp.ndim(leaf), list(jnp.shape(leaf))
        for a in axes:
            if not -rank <= a < rank:
                rule = f"axes of an array of shape {jnp.shape(leaf)}"
                _checks.refused("clip_cotangent", "axis", rule, axis)
            shape[a] = 1
        shapes.append(tuple(shape))
    return shapes


def _check_shapes(name: str, bound: jax.Array, shapes: list[tuple[int, ...]]) -> None:
    of = "the norms" if name == "max_norm" else "the elements"
    for shape in shapes if bound.ndim else ():
        if not _checks.broadcasts(bound.shape, shape):
            rule = f"of a shape that broadcasts to that of {of}, {shape}"
            _checks.refused("clip_cotangent", name, rule, bound.shape)


def _by_norm(
    axis: Any, axis_name: AxisName, gradients: PyTree, bound: jax.Array
) -> PyTree:
    def clip(n: jax.Array, under: PyTree) -> PyTree:
        threshold = jnp.broadcast_to(bound.astype(n.dtype), n.shape)
        return jax.tree.map(rescale(threshold, clip_scale(n, threshold)), under)

    with contextlib.nullcontext() if axis_name is None else as_told():
        if axis is None:
            norms = global_norm(gradients, axis_name=axis_name)
        else:
            norms = _unit_norms(gradients, axis, axis_name)
    return jax.tree.map(clip, norms, gradients)


def _unit_norms(gradients: PyTree, axis: Any, axis_name: AxisName) -> PyTree:
    varying = {name for x in jax.tree.leaves(gradients) for name in varying_axes(x)}
    if axis_name is None and varying:
        raise ValueError(
            "`clip_cotangent(axis_name=...)` must be given if `axis` is and `x` varies "
            f"over mesh axes (here {sorted(varying)}), got None. Pass () if each "
            "device holds whole units, such as the examples of its part of a batch. If "
            "the axes that are summed are split over mesh axes, pass their names."
        )
    return unit_norm(gradients, axis, axis_name=axis_name)


def _by_value(gradients: PyTree, bound: jax.Array) -> PyTree:
    def cut(leaf: jax.Array) -> jax.Array:
        fits = jnp.broadcast_to(bound, leaf.shape) if bound.ndim else bound
        return clamp(fits, jnp.zeros(()))(leaf)  # scale 0: some elements are beyond

    return jax.tree.map(cut, gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(clip: Any, x: PyTree, bound: jax.Array) -> PyTree:
    del clip, bound
    return x


def _forward(clip: Any, x: PyTree, bound: jax.Array) -> tuple[PyTree, jax.Array]:
    del clip
    return x, bound


def _backward(clip: Any, bound: jax.Array, cotangent: PyTree) -> tuple[PyTree, Any]:
    gradients, restore = split(cotangent)
    bound = jnp.asarray(bound)
    return restore(clip(gradients, bound)), jnp.zeros_like(bound)


_identity.defvjp(_forward, _backward)
