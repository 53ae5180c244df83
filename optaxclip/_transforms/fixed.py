"""Clips with a fixed threshold: one to three lines of code each."""

from __future__ import annotations

import functools
import math

import jax
import optax

from optaxclip import _checks
from optaxclip._kernel import clamp, clip_by
from optaxclip._norms import (
    Axis,
    AxisName,
    global_norm,
    leaf_norm,
    leaf_rms,
    unit_norm,
)
from optaxclip._thresholds import Threshold, constant, relative


def clip_by_value(
    max_value: Threshold | None = None,
    *,
    max_delta: Threshold | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Cuts every element at plus and minus a value.

    .. math:: g_i \leftarrow \min(\max(g_i, -v), v)

    This changes the direction of the update. The norm that the metrics report is the
    largest absolute value of all elements. In terms of the kernel, this is
    ``clip_by(max_norm, constant(v), apply=clamp)``, where ``max_norm`` is
    :func:`optaxclip.global_norm` with ``ord=inf``.

    Args:
      max_value: The value :math:`v \ge 0`: a number, an array of shape () or a
        schedule ``step -> number``.
      max_delta: The name that ``optax.clip`` has for ``max_value``.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`; dtypes are kept. Complex
      elements are cut by modulus, infinite real ones become :math:`\pm v`, NaN stays
      NaN.

    Raises:
      ValueError: ``max_value`` is a concrete negative number or NaN, or missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_value(1.0)
      >>> grads = {"w": jnp.array([0.5, -3.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"])
      [ 0.5 -1. ]
    """
    given = {"max_value": max_value, "max_delta": max_delta}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            "`clip_by_value` must be given one of `max_value` and `max_delta`, got "
            f"{' and '.join(given) or 'neither'}."
        )
    ((name, max_value),) = given.items()
    _checks.threshold("clip_by_value", name, max_value)
    max_norm = functools.partial(global_norm, ord=math.inf)
    return clip_by(max_norm, constant(max_value), apply=clamp, axis_name=axis_name)


def clip_by_global_norm(
    max_norm: Threshold, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the whole update down to a global 2-norm.

    .. math:: g \leftarrow g \cdot \min(1, c / \|g\|_2)

    The same as ``optax.clip_by_global_norm``, but with the norm in float32. With
    ``max_norm=inf`` it changes nothing and only measures.

    Args:
      max_norm: The largest norm :math:`c \ge 0`: a number, an array of shape () or a
        schedule ``step -> number``.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`; dtypes are kept. For norms
      that are 0, infinite or NaN see :func:`optaxclip.clip_by`.

    Raises:
      ValueError: ``max_norm`` is a concrete negative number or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([300.0], jnp.float16)}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], optaxclip.metrics(state)["grad_norm"])
      [1.] 300.0

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013
    """
    _checks.threshold("clip_by_global_norm", "max_norm", max_norm)
    return clip_by(global_norm, constant(max_norm), axis_name=axis_name)


def clip_by_leaf_norm(
    max_norm: Threshold, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every leaf by itself down to a 2-norm.

    .. math:: g_l \leftarrow g_l \cdot \min(1, c / \|g_l\|_2)
              \quad\text{for every leaf } l

    It keeps the direction of each leaf, but not the direction of the whole update.

    Args:
      max_norm: The largest norm :math:`c \ge 0` of a leaf: a number, an array of shape
        () or a schedule ``step -> number``.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`, whose metrics hold one norm
      for each leaf; dtypes are kept. :func:`optaxclip.clip_by` says what
      happens to a leaf whose norm is 0, infinite or NaN.

    Raises:
      ValueError: ``max_norm`` is a concrete negative number or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_leaf_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], updates["b"])
      [0.6 0.8] [0.5]
    """
    _checks.threshold("clip_by_leaf_norm", "max_norm", max_norm)
    return clip_by(leaf_norm, constant(max_norm), axis_name=axis_name)


def clip_by_block_rms(
    threshold: Threshold, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scales every leaf by itself down to a root mean square.

    .. math:: g_l \leftarrow g_l / \max(1, \mathrm{RMS}(g_l) / d), \quad
              \mathrm{RMS}(g_l) = \|g_l\|_2 / \sqrt{\mathrm{size}_l}

    The same as ``optax.clip_by_block_rms``. After a preconditioner, with
    ``threshold=1``, it is the update clipping of Adafactor.

    Args:
      threshold: The largest root mean square :math:`d \ge 0` of a leaf: a number, an
        array of shape () or a schedule ``step -> number``.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`, whose metrics hold one root
      mean square for each leaf; dtypes are kept.

    Raises:
      ValueError: ``threshold`` is a concrete negative number or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.clip_by_block_rms(1.0)
      >>> grads = {"w": jnp.array([1.0, 7.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"])
      [0.2 1.4]

    References:
      Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    _checks.threshold("clip_by_block_rms", "threshold", threshold)
    return clip_by(leaf_rms, constant(threshold), axis_name=axis_name)


def adaptive_grad_clip(
    clipping: Threshold,
    eps: jax.typing.ArrayLike = 1e-3,
    axis: Axis = None,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Limits the gradient of every unit in proportion to the unit's weights (AGC).

    .. math:: g_u \leftarrow g_u \cdot \min\!\left(1,
              \frac{\lambda \max(\|w_u\|_2, \epsilon)}{\|g_u\|_2}\right)
              \quad\text{for every unit } u

    The same as ``optax.adaptive_grad_clip``, but for any rank. The authors exempt the
    last dense layer; wrap the clip in ``optax.masked`` to do so.

    Args:
      clipping: The ratio :math:`\lambda \ge 0`: a number, an array of shape () or a
        schedule ``step -> number``. The authors use 0.01 to 0.16, less for larger
        batches.
      eps: The smallest norm :math:`\epsilon \ge 0` that the weights of a unit count
        with, so that weights that start at zero can grow.
      axis: The axes that make up a unit, see :func:`optaxclip.unit_norm`. The default
        goes by rank, as in optax. Set it for Equinox and PyTorch layouts, 1-D
        convolutions, attention and stacked layers: :mod:`optaxclip.unit_axes` has a
        function for each. ``optax.inject_hyperparams`` needs it in its ``static_args``.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`, whose metrics hold one norm
      for each unit; dtypes are kept. Its ``update`` needs ``params``.

    Raises:
      ValueError: ``clipping`` or ``eps`` is a concrete negative number or NaN; a leaf
        lacks an axis, or has more than 5 axes and ``axis`` is None; or, in ``update``,
        ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optaxclip
      >>> tx = optaxclip.adaptive_grad_clip(0.1)
      >>> params = {"kernel": jnp.array([[3.0, 0.1], [4.0, 0.0]])}  # inputs, outputs
      >>> grads = {"kernel": jnp.array([[1.0, 1.0], [0.0, 0.0]])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"])
      [[0.5  0.01]
       [0.   0.  ]]

    References:
      Brock et al., `High-Performance Large-Scale Image Recognition Without
      Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    _checks.threshold("adaptive_grad_clip", "clipping", clipping)
    _checks.non_negative("adaptive_grad_clip", "eps", eps)
    norm = functools.partial(unit_norm, axis=axis)
    return clip_by(norm, relative(clipping, floor=eps), axis_name=axis_name)
