r"""What the rules that remember norms share.

A norm beyond the bound of its rule is *outlying*. What it is clipped to (the
*response*) and what is remembered in its place (the *record*) are two independent
choices, each one of these functions ``(norm, mean, bound) -> value``, applied element
by element where ``norm > bound``:

====================  ==============================================================
function              an outlying norm becomes
====================  ==============================================================
:func:`at_bound`      the bound
:func:`at_mean`       the mean
:func:`reciprocal`    the nearer to the mean, the further out it is (ZClip)
:func:`unchanged`     itself: not clipped, or remembered raw
====================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip._thresholds.known import known

PyTree = Any
Number = jax.typing.ArrayLike
Outlying = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def at_bound(norm: jax.Array, mean: jax.Array, bound: jax.Array) -> jax.Array:
    """The bound, however far beyond it the norm is."""
    del norm, mean
    return bound


def at_mean(
    norm: jax.Array, mean: jax.Array, bound: jax.Array, eps: float = 0.0
) -> jax.Array:
    """The mean; a norm at most ``eps`` beyond the bound is left as it is."""
    return jnp.where(norm > bound + eps, mean, norm)


def reciprocal(
    norm: jax.Array,
    mean: jax.Array,
    bound: jax.Array,
    eps: float = 0.0,
    factor: float = 1.0,
) -> jax.Array:
    r"""Between bound and mean: the larger the norm, the nearer to the mean.

    .. math:: \mu + \frac{(b - \mu)^2}{n - \mu}

    With :math:`b = \mu + z^* \sigma` and :math:`z = (n - \mu) / \sigma` this is ZClip's
    :math:`\mu + z^{*2} \sigma / z`. ``eps`` and ``factor`` are those of the published
    code, see :func:`optaxclip.zscore`; there ``eps`` is :math:`10^{-6} z^*`.
    """
    reach = bound - mean + eps
    within = norm - mean <= reach
    ratio = reach / jnp.where(within, 1, norm - mean)
    return jnp.where(within, norm, factor * (mean + (bound - mean) * ratio))


def unchanged(norm: jax.Array, mean: jax.Array, bound: jax.Array) -> jax.Array:
    """The norm itself."""
    del mean, bound
    return norm


def where_outlying(
    outlying: Outlying,
    norm: jax.Array,
    mean: jax.Array,
    bound: jax.Array,
    otherwise: jax.Array,
) -> jax.Array:
    """``outlying(...)`` of the norms beyond their bound, ``otherwise`` elsewhere."""
    return jnp.where(norm > bound, outlying(norm, mean, bound), otherwise)


def per_norm(
    state_type: Any,
    init_one: Callable[[jax.Array], Any],
    update_one: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
) -> optax.GradientTransformation:
    """A rule from its functions for one norm; each state field is a tree of norms.

    Several scalars of one dtype are one array to these functions, so that a program and
    a state do not grow with their number: each state field is one array, too, whose
    last axis has the norms in the order of their names.
    """

    def gather(treedef: Any, states: list[Any]) -> Any:
        empty = [()] * len(state_type._fields)
        fields = zip(*states, strict=True) if states else empty
        return state_type(*(treedef.unflatten(field) for field in fields))

    def init(params: PyTree) -> Any:
        norms, treedef = _joined(params)
        return gather(treedef, [init_one(jnp.asarray(norm)) for norm in norms])

    def update(updates: PyTree, state: Any, params: PyTree = None) -> Any:
        del params
        norms, treedef = _joined(updates)
        fields = [treedef.flatten_up_to(field) for field in state]
        parts = [state_type(*part) for part in zip(*fields, strict=True)]
        results = [
            update_one(jnp.asarray(norm), part)
            for norm, part in zip(norms, parts, strict=True)
        ]
        thresholds = treedef.unflatten([threshold for threshold, _ in results])
        new = gather(treedef, [new for _, new in results])
        return _parted_like(updates, thresholds), new

    return known(optax.GradientTransformation(init, update))


def elementwise(function: Callable[[jax.Array], jax.Array], values: PyTree) -> PyTree:
    """The function of every array; of several scalars of one dtype at once."""
    joined, treedef = _joined(values)
    return _parted_like(values, treedef.unflatten([function(x) for x in joined]))


def are_scalars_of_one_dtype(arrays: Collection[jax.Array]) -> bool:
    """Whether several arrays can be one array with one axis."""
    dtypes = {jnp.result_type(x) for x in arrays}
    return len(arrays) > 1 and len(dtypes) == 1 and not any(map(jnp.ndim, arrays))


def _joined(norms: PyTree) -> tuple[list[jax.Array], Any]:
    """The leaves, or one array of them, and the structure to put results into."""
    leaves, treedef = jax.tree.flatten(norms)
    if are_scalars_of_one_dtype(leaves):
        return [_whole(jnp.stack(leaves))], jax.tree.structure(0)
    return leaves, treedef


def _parted_like(norms: PyTree, thresholds: PyTree) -> PyTree:
    """One threshold for each norm, from what a joined rule returns."""
    leaves, treedef = jax.tree.flatten(norms)
    if not are_scalars_of_one_dtype(leaves):
        return thresholds
    return treedef.unflatten(jnp.unstack(_whole(thresholds)))


def _whole(values: jax.Array) -> jax.Array:
    """The same array, which XLA computes once, and not for each use of an element.

    Else each element would be a program as long as a rule, or as the list of norms. On
    CPUs, JAX before 0.11 drops barriers too early; a sorted array it does compute once.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(values, cpu=_sorted, default=barrier)


def _sorted(values: jax.Array) -> jax.Array:
    return jax.lax.sort((jnp.arange(len(values)), values), num_keys=1)[1]


def no_bound(dtype: Any) -> float:
    """The largest finite number of a dtype, which stands in a state for "no bound".

    Rules return infinity; but wrappers that mix states arithmetically make NaN of one
    in a state, and ``jax_debug_infs`` refuses it.
    """
    return float(jnp.finfo(dtype).max)


def like(value: Number, norm: jax.Array) -> jax.Array:
    """A number in the dtype of a norm."""
    return jnp.asarray(value).astype(norm.dtype)
