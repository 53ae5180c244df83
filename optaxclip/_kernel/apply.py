"""How a threshold is applied to the leaves under a norm."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optaxclip._norms import scaled, widen
from optaxclip._thresholds import no_bound

Leaf = jax.Array
Apply = Callable[[jax.Array, jax.Array], Callable[[Leaf], Leaf]]
Scale = Callable[[jax.Array, jax.Array], jax.Array]


def rescale(threshold: jax.Array, scale: jax.Array) -> Callable[[Leaf], Leaf]:
    r"""Multiplies by the scale: norm clipping.

    .. math:: g \leftarrow s \cdot g, \quad s = \min(1, T / \|g\|)

    The direction is kept. A leaf is multiplied in float32 (or wider) and rounded once,
    so its norm afterwards is at most the threshold to within that rounding.

    Args:
      threshold: Not used; :func:`clamp` needs it.
      scale: A scalar, or an array that broadcasts against the leaves.

    Returns:
      A function from a leaf to the clipped leaf. For scale 1 it returns the same bits.
    """
    del threshold
    return _times(scale, scale >= 1)


def clamp(threshold: jax.Array, scale: jax.Array) -> Callable[[Leaf], Leaf]:
    r"""Cuts every element at the threshold: value clipping.

    .. math:: g_i \leftarrow \min(\max(g_i, -T), T)

    Meant for the max-norm: the scale in the metrics is then the smallest by which any
    element is multiplied. Complex elements are cut by modulus. An infinite real element
    becomes :math:`\pm T`, an infinite complex one NaN; NaN stays NaN.

    Args:
      threshold: A scalar, or an array that broadcasts against the leaves.
      scale: 1 if no element is beyond the threshold; then the leaf stays as it is.

    Returns:
      A function from a leaf to the clipped leaf.
    """
    within = scale >= 1

    def clip(leaf: Leaf) -> Leaf:
        if jnp.iscomplexobj(leaf):
            modulus = jnp.abs(leaf)
            bound = threshold.astype(modulus.dtype)
            return rescale(bound, clip_scale(modulus, bound))(leaf)
        # 8-bit floats cannot hold every bound, and some of them no infinity.
        wide = widen(leaf, threshold.dtype) if leaf.itemsize == 1 else leaf
        bound = threshold.astype(wide.dtype)
        cut = jnp.clip(wide, -bound, bound).astype(leaf.dtype)
        return jnp.where(within, leaf, cut)

    return clip


class Scaling:
    r"""Multiplies by a scale of your own, a function of the norm and its threshold.

    .. math:: g \leftarrow s(n, T) \cdot g

    :func:`rescale` is the same with :math:`s = \min(1, T / n)`. The metrics hold this
    scale, which may be above 1.

    Args:
      scale: A function ``(norm, threshold) -> scale`` of arrays of one shape. A
        threshold may be infinite; to leave a leaf as it is, bit for bit, return 1.

    Returns:
      What :func:`clip_by` takes as ``apply``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> @optaxclip.Scaling
      ... def halve(norm, threshold):
      ...     return jnp.where(norm > threshold, 0.5, 1.0)
      >>> tx = optaxclip.clip_by(optaxclip.global_norm, 1.0, apply=halve)
      >>> grads = jnp.array([3.0, 4.0])
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates)
      [1.5 2. ]
    """

    def __init__(self, scale: Scale) -> None:
        functools.update_wrapper(self, scale)
        self.scale = scale

    def __call__(
        self, threshold: jax.Array, scale: jax.Array
    ) -> Callable[[Leaf], Leaf]:
        del threshold
        return _times(scale, scale == 1)

    def __repr__(self) -> str:
        return getattr(self.scale, "__name__", repr(self.scale))


@Scaling
def normalize(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    r"""Scales to the threshold, from above and from below.

    .. math:: g \leftarrow g \cdot T / \|g\|

    The direction is kept. The scale in the metrics is above 1 where a norm was below
    its threshold; ``clip_count`` counts only updates with a norm above it.

    ==========================  ====================================================
    norm                        result
    ==========================  ====================================================
    0                           zeros: there is no direction to scale up
    any, infinite threshold     the updates, bit for bit
    at the threshold            the updates, bit for bit
    above 0, threshold 0        zeros
    scale would be infinite     multiplied by the largest finite number
    infinite                    as :func:`rescale` does
    NaN                         NaN in every leaf under this norm
    ==========================  ====================================================

    Elements can grow up to the threshold, so it must fit the dtype of the leaves: 65504
    is the largest number of float16. A norm below 1e-18 counts as constant in a
    derivative, because its inverse square is infinite.

    Pass it as ``apply`` to :func:`clip_by`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by(optaxclip.global_norm, 1.0, apply=optaxclip.normalize)
      >>> grads = jnp.array([0.3, 0.4])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates, optaxclip.metrics(state)["clip_scale"], state.clip_count)
      [0.6 0.8] 2.0 0
    """
    most = no_bound(norm.dtype)
    as_is = (norm == 0) | (norm == threshold) | (threshold >= most)
    size = jnp.where(norm > 1e-18, norm, jax.lax.stop_gradient(norm))
    ratio = threshold / jnp.where(as_is, 1, size)
    return jnp.where(as_is, 1, jnp.where(ratio > most, most, ratio))


def scale_of(apply: Apply) -> Scale:
    """The scale that an ``apply`` multiplies by, from a norm and its threshold."""
    return apply.scale if isinstance(apply, Scaling) else clip_scale


def clip_scale(norm: jax.Array, threshold: jax.Array) -> jax.Array:
    """min(1, threshold / norm), 1 for 0 / 0, with finite derivatives everywhere."""
    within = norm <= threshold
    return jnp.where(within, 1, threshold / jnp.where(within, 1, norm))


def _times(scale: jax.Array, as_is: jax.Array) -> Callable[[Leaf], Leaf]:
    def clip(leaf: Leaf) -> Leaf:
        return jnp.where(as_is, leaf, scaled(leaf, scale).astype(leaf.dtype))

    return clip
