"""SPAM's clip of elements against their own second moment."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel import ClipState, all_of, clip_by, count_if
from optaxclip._norms import AxisName, accumulator, leaf_norm, scaled, split, widen
from optaxclip._show import chosen, default, shown
from optaxclip._thresholds import Number, like, no_bound
from optaxclip.contrib._names import names_of
from optaxclip.contrib._weight import weight

PyTree = Any


class CoordinateState(NamedTuple):
    """State of :func:`clip_coordinate_spikes`."""

    coordinate_count: jax.Array  #: steps with finite gradients, int32
    coordinate_moments: dict[str, jax.Array]  #: of each leaf, before their correction
    clip_state: ClipState  #: what was clipped, for :func:`optaxclip.metrics`

    __repr__ = shown


def clip_coordinate_spikes(
    factor: Number = 5000.0,
    decay: Number = 0.999,
    warmup: int = default(20),
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SPAM's clip: cuts each element that is far above its own root mean square.

    .. math::

        |g_i| > \sqrt{\theta \hat v_i} &\;\Rightarrow\;
        g_i \leftarrow \mathrm{sign}(g_i) \sqrt{\theta \hat v_i} \\
        v_i &\leftarrow \beta v_i + (1 - \beta) g_i^2, \qquad
        \hat v_i = v_i / (1 - \beta^t)

    The clipped element is what is recorded. With the defaults an element may be 71
    times its root mean square. Two things differ from the published code. There, an
    element whose first gradients are 0 (the row of a rare word) has the bound 0 and
    gets no update until the moments are reset; here, an element with :math:`v_i = 0`
    passes. And :math:`v` is corrected for its start, so that the bound does not depend
    on how long ago that was. Resetting Adam's moments, the other part of SPAM, is left
    out.

    It changes the direction of the gradient. It keeps a float32 tree of the size of the
    gradients, and reads and writes such trees many times where a clip by norm reads the
    gradients once.

    On the two tasks of the study that it was run on (``docs/choosing.md``), it is at
    most 59.8% worse than the best of nine constants, and nowhere better than
    :func:`optaxclip.clip_by_percentile`. Of a batch that is 1,000 times too large it
    leaves elements of 71 times their usual size.

    Args:
      factor: :math:`\theta > 0`.
      decay: :math:`\beta` in [0, 1).
      warmup: How many steps to record before anything is clipped, at least 1.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`CoordinateState`; dtypes are kept. In the metrics,
      the norm of a leaf is its largest :math:`|g_i| / \sqrt{\theta \hat v_i}` (0 in the
      warm-up), the threshold is 1, and the scale is that of the element which was cut
      most. Elements whose usual size is below 1e-18 or above 1e17 pass, because their
      squares do not fit float32. A step with NaN or infinity is not recorded; once
      there is a bound, infinite real elements become it, and NaN stays NaN.

    Raises:
      ValueError: ``factor`` is not positive, ``decay`` outside [0, 1), or ``warmup``
        not an integer of at least 1; or, in ``update``, the updates have leaves that
        the parameters given to ``init`` did not have.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip import contrib
      >>> tx = contrib.clip_coordinate_spikes(factor=100.0, warmup=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for grad in [[1.0, 0.0], [-1.0, 0.0], [1000.0, 2.0]]:
      ...     updates, state = tx.update(jnp.array(grad), state)
      >>> print(updates)
      [10.  2.]

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025
    """
    call = "clip_coordinate_spikes"
    _checks.check(call, "factor", factor, lambda x: x > 0, "positive")
    _checks.check(call, "decay", decay, lambda x: (x >= 0) & (x < 1), "in [0, 1)")
    warmup = chosen(warmup)
    _checks.count(call, "warmup", warmup)
    largest = functools.partial(leaf_norm, ord=math.inf)

    def clip(norm: Any) -> optax.GradientTransformationExtraArgs:
        return clip_by(norm, 1.0, apply=_measured_only, axis_name=axis_name)

    def init(params: PyTree) -> CoordinateState:
        gradients = split(params).gradients
        zeros = [
            jnp.zeros_like(x.real, accumulator(x.dtype))
            for x in jax.tree.leaves(gradients)
        ]
        return CoordinateState(
            coordinate_count=jnp.zeros((), jnp.int32),
            coordinate_moments=dict(zip(names_of(gradients), zeros, strict=True)),
            clip_state=cast(ClipState, clip(largest).init(params)),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, CoordinateState]:
        del params
        count, moments, clip_state = state
        gradients, restore = split(updates)
        leaves, treedef = jax.tree.flatten(gradients)
        names = names_of(gradients, moments)
        moduli = [
            jnp.abs(widen(x, moments[n].dtype))
            for x, n in zip(leaves, names, strict=True)
        ]
        bounds = [
            _bound(moments[n], count, factor, decay, count >= warmup) for n in names
        ]

        def norm(tree: PyTree, **along: Any) -> PyTree:
            del tree
            ratios = map(_ratio, moduli, bounds)
            return largest(treedef.unflatten(ratios), **along)

        _, measured = clip(norm).update(updates, clip_state, **extra_args)
        measured = cast(ClipState, measured)
        finite = all_of(jnp.isfinite, measured.clip_metrics.grad_norm)
        new = dict(moments)
        for name, modulus, bound in zip(names, moduli, bounds, strict=True):
            modulus = jax.lax.stop_gradient(modulus)  # of the memory, too
            square = jnp.minimum(
                jnp.minimum(modulus, bound) ** 2, no_bound(bound.dtype)
            )
            moved = moments[name] + like(1 - decay, bound) * (square - moments[name])
            new[name] = jnp.where(finite, moved, moments[name])
        cut = treedef.unflatten(map(_cut, leaves, moduli, bounds))
        return restore(cut), CoordinateState(count_if(finite, count), new, measured)

    return optax.GradientTransformationExtraArgs(init, update)


def _measured_only(threshold: jax.Array, scale: jax.Array) -> Any:
    del threshold, scale
    return lambda leaf: leaf


def _bound(
    moment: jax.Array, count: jax.Array, factor: Number, decay: Number, ready: jax.Array
) -> jax.Array:
    past = weight(decay, jnp.maximum(count, 1), moment)
    most = no_bound(moment.dtype)
    root = jnp.sqrt(moment * (like(factor, moment) / past))
    return jnp.where(ready & (moment > 0), jnp.minimum(root, most), most)


def _ratio(modulus: jax.Array, bound: jax.Array) -> jax.Array:
    bounded = bound < no_bound(bound.dtype)
    return jnp.where(bounded | ~jnp.isfinite(modulus), modulus / bound, 0)


def _cut(leaf: jax.Array, modulus: jax.Array, bound: jax.Array) -> jax.Array:
    beyond = modulus > bound
    if jnp.iscomplexobj(leaf):
        cut = scaled(leaf, bound / jnp.where(beyond, modulus, 1))
    else:
        cut = jnp.clip(widen(leaf, bound.dtype), -bound, bound)
    return jnp.where(beyond, cut.astype(leaf.dtype), leaf)
