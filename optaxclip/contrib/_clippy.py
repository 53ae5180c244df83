"""Clippy: updates in proportion to parameters, element by element."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip import _checks
from optaxclip._kernel import clip_by
from optaxclip._norms import AxisName, accumulator, leaf_norm, path_name, split, widen
from optaxclip._thresholds import Number

PyTree = Any


def clippy(
    relative: Number = 0.5, absolute: Number = 1e-2, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks a leaf until no element moves its parameter by too large a share.

    .. math:: u_l \leftarrow u_l \cdot \min\left(1, \min_i \frac{\lambda_r |w_i| +
              \lambda_a}{|u_i|}\right) \quad\text{for every leaf } l

    It bounds updates, so it goes behind the optimizer and its learning rate, as the
    last part of a chain. The term that the paper adds for Adagrad's accumulator is left
    out; its code has it switched off.

    A single element can shrink its whole leaf: where parameters start at 0, updates of
    the leaf are at most :math:`\lambda_a` (1e-7 by default in the published code, which
    stalls such leaves). So the smallest parameters decide, not the largest updates.

    On the two tasks of the study that it was run on (``docs/choosing.md``), it is at
    most 34.7% worse than the best of nine constants, and nowhere better than
    :func:`optaxclip.clip_by_percentile`. Behind AdamW, whose updates are bounded, it
    does no more against a batch that is 1,000 times too large than no clip; behind SGD
    it keeps a recurrent network from exploding.

    Args:
      relative: :math:`\lambda_r \ge 0`, the largest relative change of a parameter.
      absolute: :math:`\lambda_a \ge 0`, what a parameter of 0 may change by.
      axis_name: As in :func:`optaxclip.clip_by`.

    Returns:
      A transformation with :class:`optaxclip.ClipState`; dtypes are kept. Its
      ``update`` needs ``params``. In the metrics, the norm of a leaf is its largest
      :math:`|u_i| / (\lambda_r |w_i| + \lambda_a)` and the threshold is 1. Where both
      terms are 0 and the update is not, the leaf becomes zeros, and counts as not
      finite.

    Raises:
      ValueError: ``relative`` or ``absolute`` is a concrete negative number or NaN; or,
        in ``update``, ``params`` is missing, as a whole or for some update.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optaxclip import contrib
      >>> tx = optax.chain(optax.sgd(1.0), contrib.clippy(relative=0.5, absolute=0.0))
      >>> params = {"w": jnp.array([4.0, 1.0])}
      >>> grads = {"w": jnp.array([1.0, 2.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates["w"])
      [-0.25 -0.5 ]

    References:
      Tang et al., `Improving Training Stability for Multitask Ranking Models in
      Recommender Systems <https://arxiv.org/abs/2302.09178>`_, 2023
    """
    _checks.non_negative("clippy", "relative", relative)
    _checks.non_negative("clippy", "absolute", absolute)
    largest = functools.partial(leaf_norm, ord=math.inf)

    def shares(updates: PyTree, params: PyTree) -> PyTree:
        """Updates in units of what their parameters allow."""
        known = jax.tree_util.tree_leaves_with_path(split(params).gradients)
        parameters = {jax.tree_util.keystr(path): leaf for path, leaf in known}

        def share(path: Any, update: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path)
            if name not in parameters:
                raise ValueError(
                    "`update(params=...)` must hold the parameters of all updates, got "
                    f"none at {path_name(path)!r}."
                )
            dtype = accumulator(update.dtype)
            size = jnp.abs(widen(parameters[name], dtype)).astype(dtype)
            terms = [jnp.asarray(x).astype(dtype) for x in (relative, absolute)]
            modulus = jnp.abs(widen(update, dtype))
            allowed = terms[0] * size + terms[1]
            still = modulus == 0  # 0 / 0 would make its derivative NaN
            return jnp.where(still, 0, modulus / jnp.where(still, 1, allowed))

        return jax.tree_util.tree_map_with_path(share, updates)

    def init(params: PyTree) -> Any:
        return clip_by(largest, 1.0, axis_name=axis_name).init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(
                "`update(params=...)` must be given: `clippy` compares updates with "
                "parameters. Call `update(updates, state, params)`."
            )

        def norm(tree: PyTree, **along: Any) -> PyTree:
            return largest(shares(tree, params), **along)

        clip = clip_by(norm, 1.0, axis_name=axis_name)
        return clip.update(updates, state, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
