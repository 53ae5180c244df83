"""Clipping inside a model: what flows back through one value."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _checks
from optaxclip._kernel import clip_scale, rescale
from optaxclip._norms import AxisName, global_norm, split, unit_norm

PyTree = Any


def clip_cotangent(
    x: PyTree,
    max_norm: jax.typing.ArrayLike,
    *,
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
        that broadcasts against the norms. Its own gradient is 0.
      axis: The axes to sum over. None, the default, takes one norm over everything in
        ``x``. With -1, every vector along the last axis is clipped by itself: for an
        activation of shape (batch, time, features), every token of every example. With
        ``(1, 2)``, every example.
      axis_name: As in :func:`optaxclip.global_norm`.

    Returns:
      ``x``, unchanged. Norms are float32 (float64 for float64 arrays), and the gradient
      is rounded once, to its own dtype. Below the threshold it keeps its bits. A norm
      of 0 gives zeros; NaN stays NaN. Under ``vmap``, every example has its own norm.
      Under ``shard_map``, an ``x`` that is sharded is measured over all its shards;
      with ``axis``, ``x`` must be whole.

      *Higher derivatives.* The clip belongs to the first derivative, so reverse mode
      over reverse mode differentiates the clipped gradient. Forward mode (``jax.jvp``,
      ``jax.hessian``) raises JAX's ``TypeError`` for functions with a custom reverse
      rule.

    Raises:
      ValueError: ``max_norm`` is negative or not a number, as far as it is concrete;
        or, when the gradient is taken, as :func:`optaxclip.unit_norm`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> def loss(x, bound):
      ...     return 50 * jnp.sum(optaxclip.clip_cotangent(x, bound) ** 2)
      >>> print(jax.grad(loss)(jnp.array([3.0, 4.0]), 1.0))
      [0.6 0.8]

    References:
      Graves, `Generating sequences with recurrent neural networks
      <https://arxiv.org/abs/1308.0850>`_, 2013, which clips the derivatives at each
      time step of an LSTM, element by element
    """
    _checks.non_negative("clip_cotangent", "max_norm", max_norm)
    if axis is None:
        norm = functools.partial(global_norm, axis_name=axis_name)
    else:
        norm = functools.partial(unit_norm, axis=axis, axis_name=axis_name)
    bound = jnp.asarray(float(max_norm) if isinstance(max_norm, int) else max_norm)
    return _identity(norm, x, bound)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(norm: Any, x: PyTree, bound: jax.Array) -> PyTree:
    del norm, bound
    return x


def _forward(norm: Any, x: PyTree, bound: jax.Array) -> tuple[PyTree, jax.Array]:
    del norm
    return x, bound


def _backward(norm: Any, bound: jax.Array, cotangent: PyTree) -> tuple[PyTree, Any]:
    gradients, restore = split(cotangent)
    bound = jnp.asarray(bound)
    norms = norm(gradients)

    def clip(n: jax.Array, under: PyTree) -> PyTree:
        threshold = jnp.broadcast_to(bound.astype(n.dtype), n.shape)
        return jax.tree.map(rescale(threshold, clip_scale(n, threshold)), under)

    clipped = jax.tree.map(clip, norms, gradients)
    return restore(clipped), jnp.zeros_like(bound)


_identity.defvjp(_forward, _backward)
