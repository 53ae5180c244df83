"""Error feedback: what a clip cuts off is added to the next gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._norms import AxisName, accumulator, global_norm, split, widen
from optaxclip._show import shown
from optaxclip.contrib._names import names_of

PyTree = Any


class FeedbackState(NamedTuple):
    """State of :func:`with_error_feedback`."""

    feedback_error: dict[str, jax.Array]  #: what is still to be added, of each leaf
    inner_state: PyTree  #: of the clip

    __repr__ = shown


def with_error_feedback(
    clip: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds what a clip cuts off to the next gradient, so that nothing is lost.

    .. math:: u_t = \mathrm{clip}(g_t + e_t), \qquad e_{t+1} = g_t + e_t - u_t

    The updates of all steps and what is left sum to the gradients, so the bias of a
    clip does not add up as long as what is left stays bounded (U-Clip; Clip21 has a
    variant for each worker). Rounding to the dtype of a leaf is fed back, too.

    It is the wrong tool against spikes: a spike is not cut off, but paid out at the
    threshold. One of 1,000 times the threshold fills 1,000 updates when the
    other gradients are 0.

    On the two tasks of the study that it was run on (``docs/choosing.md``), it is at
    most 55.1% worse than the best of nine constants, and nowhere better than
    :func:`optaxclip.clip_by_percentile`. That is worse than no clip where batches are
    1,000 times too large.

    Args:
      clip: Any clip of gradients, with a memory or without.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`FeedbackState`; dtypes are kept. It keeps a float32
      tree of the size of the gradients (float64 for float64 leaves), and the clip sees
      gradients in these dtypes. In a step where the norm of gradients and errors
      together is not finite, or above 5e36 in float32, the clip gets the gradients
      alone, and the errors stay as they were.

    Raises:
      ValueError: ``clip`` is no transformation; or, in ``update``, the updates have
        leaves that the parameters given to ``init`` did not have.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> clip = optaxclip.clip_by_global_norm(1.0)
      >>> tx = optaxclip.contrib.with_error_feedback(clip)
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in [0.5, 3.0, 0.0, -0.5, 0.0]:
      ...     updates, state = tx.update(jnp.array([grad]), state)
      ...     print(updates[0], state.feedback_error[""][0])
      0.5 0.0
      1.0 2.0
      1.0 1.0
      0.5 0.0
      0.0 0.0

    References:
      Elesedy and Hutter, `U-Clip: On-Average Unbiased Stochastic Gradient Clipping
      <https://arxiv.org/abs/2302.02971>`_, 2023

      Khirirat et al., `Clip21: Error Feedback for Gradient Clipping
      <https://arxiv.org/abs/2305.18929>`_, 2023
    """
    _checks.transformation("with_error_feedback", "clip", clip)
    inner = optax.with_extra_args_support(clip)

    def init(params: PyTree) -> FeedbackState:
        gradients = split(params).gradients
        zeros = [
            jnp.zeros_like(widen(x, accumulator(x.dtype)))
            for x in jax.tree.leaves(gradients)
        ]
        names = dict(zip(names_of(gradients), zeros, strict=True))
        return FeedbackState(names, inner.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, FeedbackState]:
        errors, inner_state = state
        gradients, restore = split(updates)
        leaves, treedef = jax.tree.flatten(gradients)
        names = names_of(gradients, errors)
        wide = [widen(x, accumulator(x.dtype)) for x in leaves]
        sums = [x + errors[name] for x, name in zip(wide, names, strict=True)]
        norm = global_norm(treedef.unflatten(sums), axis_name=axis_name)
        # A clip makes 0 of what is nearly infinite: such an error would stay.
        fits = norm < 2.0**-6 * jnp.finfo(norm.dtype).max
        sums = [jnp.where(fits, *row) for row in zip(sums, wide, strict=True)]
        clipped, inner_state = inner.update(
            restore(treedef.unflatten(sums)), inner_state, params, **extra_args
        )
        sent = jax.tree.leaves(split(clipped).gradients)
        sent = [_narrowed(x, leaf.dtype) for x, leaf in zip(sent, leaves, strict=True)]
        new = dict(errors)
        for name, total, part in zip(names, sums, sent, strict=True):
            left = total - part.astype(total.dtype)
            new[name] = jnp.where(fits, left, errors[name])
        return restore(treedef.unflatten(sent)), FeedbackState(new, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts to a dtype. Finite numbers stay finite; what is cut off is fed back."""
    if jnp.iscomplexobj(x):  # which was not widened
        return x.astype(dtype)
    most = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x).astype(dtype)
