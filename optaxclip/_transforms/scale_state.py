"""The state of a loss scale, and reading what to multiply the loss by."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax

from optaxclip._kernel import find
from optaxclip._norms import depth_of_caller
from optaxclip._show import shown

PyTree = Any

# Whether somebody asked for the scale in this process, or was told to.
_is_known = False


class LossScaleState(NamedTuple):
    """State of :func:`dynamic_loss_scale`. Counters never wrap around."""

    loss_scale: jax.Array  #: what to multiply the next loss by; float32
    steps_since_overflow: jax.Array  #: steps made since the last overflow; int32
    overflow_count: jax.Array  #: steps skipped since the start; int32
    inner_state: PyTree  #: as the last step that was made left it

    __repr__ = shown


def loss_scale(opt_state: PyTree) -> jax.Array:
    """What to multiply the loss by, before its gradient is taken.

    Args:
      opt_state: The state of :func:`dynamic_loss_scale`, or any pytree that holds it:
        of a chain, a Flax ``TrainState``, an ``nnx.Optimizer``.

    Returns:
      A float32 scalar, on device. Cast the loss to float32 before you multiply, because
      a scale above 65,504 does not fit float16.

    Raises:
      ValueError: the state holds no loss scale, or several.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optaxclip.dynamic_loss_scale(optax.sgd(0.1), init_scale=1024.0)
      >>> print(optaxclip.loss_scale(tx.init(jnp.zeros(2))))
      1024.0
    """
    opt_state = getattr(opt_state, "opt_state", opt_state)
    found = [state for _, state in find.find(opt_state, LossScaleState)]
    if len(found) != 1:
        raise ValueError(
            "`loss_scale(opt_state=...)` must hold the state of one "
            f"`dynamic_loss_scale`, got {len(found)} in {find.kinds(opt_state)}."
        )
    global _is_known
    _is_known = True
    return find.plain(found[0]).loss_scale


def warn_if_unknown() -> None:
    """Warns once where a loss can't have been multiplied: nobody asked by what."""
    global _is_known
    if not _is_known:
        _is_known = True
        warnings.warn(
            "`dynamic_loss_scale` divides the gradients by the loss scale, but nothing "
            "has called `optaxclip.loss_scale` yet. If the loss was not multiplied, "
            "the gradients come out too small by that factor. Take the gradients of "
            "`optaxclip.loss_scale(opt_state) * loss`.",
            stacklevel=depth_of_caller(),
        )
