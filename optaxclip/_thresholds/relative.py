"""The rule `relative`: a threshold in proportion to the norm of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._thresholds.constant import Threshold, as_rule
from optaxclip._thresholds.known import known

PyTree = Any


def relative(
    ratio: Threshold, floor: jax.typing.ArrayLike = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""A multiple of the norm of the parameters, measured like that of the gradients.

    .. math:: T = r \cdot \max(\|w\|, \epsilon)

    Args:
      ratio: The multiple :math:`r`: a number, an array or a schedule, as in
        :func:`optaxclip.constant`.
      floor: The least norm :math:`\epsilon` that parameters are taken to have, so that
        parameters which start at zero can change.

    Returns:
      A rule whose ``update`` needs the norms of the parameters, which
      :func:`optaxclip.clip_by` measures when it is given ``params``.

    Raises:
      ValueError: ``ratio`` or ``floor`` is a concrete negative number or NaN; or, at
        the update, ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> rule = optaxclip.relative(0.01, floor=1e-3)
      >>> norms, parameter_norms = jnp.float32(7.0), jnp.float32(5.0)
      >>> thresholds, _ = rule.update(norms, rule.init(norms), parameter_norms)
      >>> print(f"{thresholds:.3f}")
      0.050

    References:
      Brock et al., `High-Performance Large-Scale Image Recognition Without
      Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    _checks.threshold("relative", "ratio", ratio)
    _checks.non_negative("relative", "floor", floor)
    ratios = as_rule("relative", "ratio", ratio)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> Any:
        if params is None:
            raise ValueError(
                "`update(params=...)` must be given: this clip compares gradients with "
                "parameters. Call `update(updates, state, params)`."
            )
        ratio_of, state = ratios.update(updates, state, params, **extra_args)

        def threshold(ratio: jax.Array, size: jax.Array) -> jax.Array:
            return ratio * jnp.maximum(size, jnp.asarray(floor).astype(size.dtype))

        return jax.tree.map(threshold, ratio_of, params), state

    return known(optax.GradientTransformationExtraArgs(ratios.init, update))
