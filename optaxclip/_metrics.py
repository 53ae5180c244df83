"""Reading what the clips in an optimizer state did."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _gradients
from optaxclip._clip import ClipState, clip_scale
from optaxclip._maximum import largest
from optaxclip._skip import SkipState

PyTree = Any

_UNREAD = ("rule_state", "skip_rule_state", "inner_state")  # large, and not scalars


def metrics(opt_state: PyTree, *, per_leaf: bool = False) -> dict[str, jax.Array]:
    r"""What the clips and skips of an optimizer did, as flat scalars for any logger.

    Args:
      opt_state: Any pytree that holds clips or skips: the state of ``optax.chain``,
        ``named_chain``, ``masked``, ``partition``, ``MultiSteps`` or
        ``inject_hyperparams``, a Flax ``TrainState``, or an ``nnx.Optimizer``.
      per_leaf: Adds the first four keys below once more for every leaf of a clip
        that has several norms, as ``grad_norm/<path>`` and so on: of the leaf, or of
        that unit of it which exceeds its threshold most.

    Returns:
      A dict of float32 and int32 scalars (float64 where a clip works in it), on
      device, with these keys:

      =========================  ====================================================
      ``grad_norm``              the norm before clipping
      ``clipped_grad_norm``      the norm after clipping: min(norm, threshold), and
                                 of no meaning where the norm is not finite
      ``clip_threshold``         the threshold it was held to
      ``clip_scale``             what the update was multiplied by, in [0, 1]
      ``clipped_norm_fraction``  the share of norms above their threshold, in [0, 1]
      ``step_count``             updates since the start
      ``clip_count``             updates in which a finite norm was clipped
      ``nonfinite_count``        updates with a norm that was NaN or infinite
      ``clip_fraction``          ``clip_count / step_count``, 0 before the first step
      =========================  ====================================================

      A skip adds five more:

      =========================  ====================================================
      ``skip_norm``              the norm that decided
      ``skip_threshold``         the threshold it was held to
      ``skip_count``             steps skipped since the start
      ``skipped_in_a_row``       steps skipped since the last that was not
      ``skip_nonfinite_count``   of the skipped, those with a norm not finite
      =========================  ====================================================

      A clip inside a skip is not run on a skipped step, so that it tells of the last
      step that was made.

      Counters tell of all updates, other values of the last. A clip with several norms
      (of leaves, of units) reports the one that exceeds its threshold most, so that
      ``clip_scale`` is the smallest scale. Before the first update the norm is 0, the
      threshold infinite and the scale 1.

      *Names.* A single clip has no prefix. With several, each key is prefixed by
      where its clip stands: the keys of ``named_chain`` and ``partition`` and the
      positions in ``chain``, from the outside in, joined by ``/``:
      ``before/grad_norm``, ``0/grad_norm``, ``1/0/grad_norm``; clips and skips are
      counted apart. Wrappers add nothing,
      unless two clips would share a name; then every attribute on the way is named.

      *Stacked states.* In a state stacked by ``vmap`` or ``pmap`` every value has the
      leading axes of the stack.

    Raises:
      ValueError: the state holds no clip.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(1e-3))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> for name, value in optaxclip.metrics(state).items():
      ...     print(f"{name:21} {value:g}")
      grad_norm             5
      clipped_grad_norm     1
      clip_threshold        1
      clip_scale            0.2
      clipped_norm_fraction 1
      step_count            1
      clip_count            1
      nonfinite_count       0
      clip_fraction         1
    """
    opt_state = getattr(opt_state, "opt_state", opt_state)
    clips, skips = named(opt_state, ClipState), named(opt_state, SkipState)
    if not clips and not skips:
        raise ValueError(
            "`metrics(opt_state=...)` must hold the state of an optaxclip "
            f"transformation, got {jax.tree.structure(opt_state)}."
        )
    report = {}
    for prefix, state in [*clips.items(), *skips.items()]:
        values = _unstacked(state, per_leaf)
        report |= {f"{prefix}{name}": value for name, value in values.items()}
    return report


def named(opt_state: PyTree, kind: type) -> dict[str, Any]:
    """Every state of a kind, by its prefix."""
    found = list(_find(opt_state, kind, ()))
    if len(found) == 1:
        return {"": _plain(found[0][1])}
    paths = [path for path, _ in found]
    names = _unique([[_places(path) for path in paths], paths])
    return {f"{n}/": _plain(state) for n, (_, state) in zip(names, found, strict=True)}


def _unique(spellings: list[list[tuple[Any, ...]]]) -> list[str]:
    """The first spelling of some paths in which no two have the same name."""
    for paths in spellings:
        names = [_gradients.name(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [jax.tree_util.keystr(path) for path in spellings[-1]]


def _find(tree: PyTree, kind: type, at: tuple[Any, ...]) -> Iterator[Any]:
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, kind)
    )
    for path, node in nodes:
        if isinstance(node, kind):
            yield at + path, node
            inner = getattr(node, "inner_state", ())
            inside = jax.tree_util.GetAttrKey("inner_state")
            yield from _find(inner, kind, (*at, *path, inside))


def _places(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path without the attributes that wrappers add."""
    return tuple(e for e in path if not isinstance(e, jax.tree_util.GetAttrKey))


def _plain(state: Any) -> Any:
    """A state with arrays in place of the variables that Flax NNX wraps them in."""

    def is_variable(node: Any) -> bool:
        return hasattr(node, "get_value")

    fields = state._replace(**{name: () for name in _UNREAD if hasattr(state, name)})
    return jax.tree.map(
        lambda x: x.get_value() if is_variable(x) else x, fields, is_leaf=is_variable
    )


def _unstacked(state: Any, per_leaf: bool) -> dict[str, jax.Array]:
    names: list[str] = []

    def values(state: Any) -> list[jax.Array]:
        is_clip = isinstance(state, ClipState)
        report = of_clip(state, per_leaf) if is_clip else of_skip(state)
        names[:] = report  # which vmap would return sorted
        return list(report.values())

    for _ in range(jnp.ndim(state[0])):  # stacked by vmap or pmap
        values = jax.vmap(values)
    return dict(zip(names, values(state), strict=True))


def of_skip(state: SkipState) -> dict[str, jax.Array]:
    metrics = (jax.tree.leaves(tree) for tree in state.skip_metrics)
    worst = _worst(_stacked([_worst(_Row(*row)) for row in zip(*metrics, strict=True)]))
    return {
        "skip_norm": worst.norm,
        "skip_threshold": worst.threshold,
        "skip_count": state.skip_count,
        "skipped_in_a_row": state.skipped_in_a_row,
        "skip_nonfinite_count": state.skip_nonfinite_count,
    }


def of_clip(state: ClipState, per_leaf: bool) -> dict[str, jax.Array]:
    norms, thresholds, _ = state.clip_metrics
    paths_and_norms, treedef = jax.tree_util.tree_flatten_with_path(norms)
    paths = [path for path, _ in paths_and_norms]
    rows = [
        _Row(norm, threshold)
        for (_, norm), threshold in zip(
            paths_and_norms, treedef.flatten_up_to(thresholds), strict=True
        )
    ]
    worst = [_worst(row) for row in rows]
    exceeding = sum((jnp.sum(row.norm > row.threshold) for row in rows), jnp.int32(0))
    report = {
        **_values(_worst(_stacked(worst))),
        "clipped_norm_fraction": exceeding / max(sum(row.norm.size for row in rows), 1),
        "step_count": state.step_count,
        "clip_count": state.clip_count,
        "nonfinite_count": state.nonfinite_count,
        "clip_fraction": state.clip_count / jnp.maximum(state.step_count, 1),
    }
    if per_leaf and any(paths):  # a norm without a path is the only one
        for name, row in zip(_unique([paths]), worst, strict=True):
            report |= _values(row, f"/{name}")
    return report


class _Row(NamedTuple):
    """Norms and their thresholds, of one shape."""

    norm: jax.Array
    threshold: jax.Array


def _worst(row: _Row) -> _Row:
    """The norm that exceeds its threshold most; where none has one, the largest.

    Found by maxima alone, which, unlike indexing, work on sharded norms; by such as
    keep NaN on the way between devices.
    """
    norm, threshold = row
    if not norm.size:
        return _Row(jnp.zeros((), norm.dtype), jnp.full((), jnp.inf, norm.dtype))
    ratio = norm / jnp.where(threshold == 0, 1, threshold)
    ratio = jnp.where((threshold == 0) & (norm > 0), jnp.inf, ratio)
    ratio = jnp.where(jnp.all(jnp.isinf(threshold)), norm, ratio)
    ratio = jnp.where(jnp.isnan(ratio), jnp.inf, ratio)
    here = ratio == jnp.max(ratio)
    return _Row(*(largest(jnp.where(here, x, 0), None, ()) for x in row))


def _stacked(rows: list[_Row]) -> _Row:
    if not rows:
        return _Row(jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32))
    dtype = jnp.result_type(*(row.norm.dtype for row in rows))
    return _Row(
        *(
            jnp.stack([x.astype(dtype) for x in column])
            for column in zip(*rows, strict=True)
        )
    )


def _values(row: _Row, suffix: str = "") -> dict[str, jax.Array]:
    return {
        f"grad_norm{suffix}": row.norm,
        f"clipped_grad_norm{suffix}": jnp.minimum(row.norm, row.threshold),
        f"clip_threshold{suffix}": row.threshold,
        f"clip_scale{suffix}": clip_scale(*row),
    }
