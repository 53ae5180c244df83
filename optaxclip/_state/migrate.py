"""Moving the state of an optimizer into one with other clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _checks
from optaxclip._kernel import ClipState, SkipState
from optaxclip._norms import path_name
from optaxclip._state.history import HistoryState
from optaxclip._state.versions import MEASURED, bounded, upgraded
from optaxclip._transforms import LossScaleState

PyTree = Any

# The states that are this package's own, whole but for an `inner_state`. The first two
# fields of each are arrays; nothing else has both names.
_OWN = (ClipState, SkipState, LossScaleState, HistoryState)

# On a path, the step from an own state to its `inner_state`: told apart by identity
# from the attribute of that name which wrappers of optax have.
_INSIDE = jax.tree_util.GetAttrKey("inner_state")


def migrate_state(
    old_state: PyTree, tx: optax.GradientTransformation, params: PyTree
) -> PyTree:
    """Moves an optimizer's state into one that has other clips or skips.

    Use it for a checkpoint made with optax's clips or with none, with another window or
    another clip, with or without a skip, or with version 0.1.0. The optimizer keeps its
    moments, counts and schedules. Clips and skips that stayed the same keep their
    state. Whatever is new starts fresh.

    Leaves are paired by the names on their paths. Positions in sequences and keys made
    of digits are not names, and clips and skips are ignored, so a clip may be put in
    front. Leaves with the same name are paired in order. If two leaves with the same
    name and shape trade places, they cannot be told apart. Where that may happen, use
    ``optax.named_chain``, and do not use digits as names of parameters that come and
    go.

    Args:
      old_state: The old optimizer's state, as it was or as the nested dicts and lists
        that Orbax (without a target) and ``flax.serialization`` turn it into.
      tx: The new optimizer. Only its clips and skips may differ from the old one's.
      params: The parameters, as for ``tx.init``.

    Returns:
      A state with the structure, dtypes and shardings of ``tx.init(params)``, and these
      values:

      ==============================  ==============================================
      leaf                            value
      ==============================  ==============================================
      of the optimizer                from ``old_state``
      of a clip or skip               from ``old_state`` if all leaves of this clip
                                      or skip kept shape and dtype, else fresh
      of clips with equal structure   from ``old_state`` if there are as many, else
                                      all fresh
      ==============================  ==============================================

    Raises:
      ValueError: the optimizer's leaves in ``old_state`` and in the new state are not
        the same ones, or differ in shape or dtype. If a wrapper was removed, pass the
        state that it held: ``old_state.inner_state`` for ``optax.apply_if_finite``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optaxclip
      >>> params = jnp.zeros(2)
      >>> sgd = optax.sgd(0.1, momentum=0.9)
      >>> old = optax.chain(optax.clip_by_global_norm(1.0), sgd)
      >>> _, old_state = old.update(jnp.array([0.3, 0.4]), old.init(params))
      >>> tx = optax.chain(optaxclip.clip_by_percentile(), sgd)
      >>> state = optaxclip.migrate_state(old_state, tx, params)
      >>> print(optax.tree.get(state, "trace"), state[0].step_count)
      [0.3 0.4] 0
    """
    if not callable(getattr(tx, "init", None)):
        rule = "an `optax.GradientTransformation`"
        _checks.refused("migrate_state", "tx", rule, tx)
    fresh = tx.init(params)
    targets = list(_entries(fresh, ()))
    old, new = _grouped(_entries(old_state, ())), _grouped(targets)
    _check_optimizer(old, new)
    source = {}
    for key, entries in new.items():
        if len(old.get(key, ())) == len(entries):
            pairs = zip(entries, old[key], strict=True)
            source |= {id(target): found.node for target, found in pairs}
    return _rebuilt(fresh, (source.get(id(target)) for target in targets))


class _Entry(NamedTuple):
    """A leaf of an optimizer, or an own state."""

    path: tuple[Any, ...]
    node: Any
    form: Any  # of an own state: what another must have to take its place

    def key(self) -> tuple[Any, ...]:
        """Equal for entries that may be paired."""
        path = [entry for entry in self.path if entry is not _INSIDE]
        return tuple(x for x in _spelled(path) if isinstance(x, str)), self.form

    def place(self) -> list[tuple[bool, Any]]:
        """The path as something to sort by; strings and integers do not compare."""
        return [(isinstance(x, str), x) for x in _spelled(self.path)]


def _entries(tree: PyTree, at: tuple[Any, ...]) -> Iterator[_Entry]:
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_own)
    for path, node in nodes:
        if not _is_own(node):
            yield _Entry(at + path, node, None)
            continue
        parts = {key: _shape_and_dtype(x) for key, x in _parts(node).items()}
        yield _Entry(at + path, node, (_kind(node), frozenset(parts.items())))
        yield from _entries(_fields(node).get("inner_state"), (*at, *path, _INSIDE))


def _kind(node: Any) -> type | None:
    """Which own state this is, as it was made or as a dict of its fields."""
    for kind in _OWN:
        # Empty fields may be lost: Flax NNX keeps none of them.
        as_dict = isinstance(node, Mapping) and (
            set(kind._fields[:2]) <= set(node) <= set(kind._fields)
        )
        if isinstance(node, kind) or as_dict:
            return kind
    return None


def _is_own(node: Any) -> bool:
    return _kind(node) is not None


def _fields(own: Any) -> dict[str, Any]:
    return dict(own) if isinstance(own, Mapping) else own._asdict()


def _parts(own: Any) -> dict[tuple[Any, ...], Any]:
    """The leaves of an own state by their paths, those of its inner state left out."""
    fields = _fields(own) | {"inner_state": None}
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(fields)
    keys = _keys([path for path, _ in paths_and_leaves])
    parts = {key: leaf for key, (_, leaf) in zip(keys, paths_and_leaves, strict=True)}
    return upgraded(parts)


def _keys(paths: list[tuple[Any, ...]]) -> list[tuple[str, ...]]:
    """A key for each leaf of an own state, however containers were saved."""
    keys = [_words(path) for path in paths]
    if len(set(keys)) < len(keys):  # names with slashes, or of the form ".../value"
        keys = [(jax.tree_util.keystr(path),) for path in paths]
    return keys


def _words(path: Any) -> tuple[str, ...]:
    """A path in words, those of a name by themselves: 0.1.0 kept norms in trees."""
    words = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
    words = "/".join(words).split("/")
    while words and words[-1] == "value":  # the inside of a variable of Flax NNX
        words.pop()
    return tuple(words)


def _spelled(path: Any) -> tuple[str | int, ...]:
    """A path in words and, for positions, integers, however containers were saved."""
    return tuple(int(word) if word.isdecimal() else word for word in _words(path))


def _grouped(entries: Any) -> dict[tuple[Any, ...], list[_Entry]]:
    groups = {}
    for entry in sorted(entries, key=_Entry.place):
        groups.setdefault(entry.key(), []).append(entry)
    return groups


def _check_optimizer(
    old: dict[Any, list[_Entry]], new: dict[Any, list[_Entry]]
) -> None:
    lost, missing, changed = [], [], []
    for key in old | new:
        if key[1] is not None:  # an own state
            continue
        before, after = old.get(key, []), new.get(key, [])
        lost += [path_name(entry.path) for entry in before[len(after) :]]
        missing += [path_name(entry.path) for entry in after[len(before) :]]
        for x, y in zip(before, after, strict=False):
            was, needed = _shape_and_dtype(x.node), _shape_and_dtype(y.node)
            if was != needed:
                changed.append(f"{path_name(y.path)} ({was} for {needed})")
    differences = {
        "leaves that the new state has no place for": lost,
        "none for these of the new state": missing,
        "another shape or dtype": changed,
    }
    if any(differences.values()):
        got = "; ".join(f"{k}: {_listed(v)}" for k, v in differences.items() if v)
        raise ValueError(
            "`migrate_state(old_state=...)` must be a state of the optimizer in `tx`, "
            f"clips and skips of optaxclip aside, got {got}."
        )


def _listed(names: list[str], most: int = 10) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most] + more)


def _shape_and_dtype(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
    return f"{dtype}{list(np.shape(leaf))}"


def _rebuilt(tree: PyTree, sources: Iterator[Any]) -> PyTree:
    """The tree with values from the next sources, where they are not ``None``."""

    def take(node: Any) -> Any:
        source = next(sources)
        if not _is_own(node):
            return node if source is None else _placed(source, node)
        if source is not None:
            node = _refilled(node, _parts(source))
        if not hasattr(node, "inner_state"):
            return node
        return node._replace(inner_state=_rebuilt(node.inner_state, sources))

    return jax.tree.map(take, tree, is_leaf=_is_own)


def _refilled(own: Any, parts: dict[tuple[Any, ...], Any]) -> Any:
    fields = own._asdict() | {"inner_state": None}
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(fields)
    paths = [path for path, _ in paths_and_leaves]

    def value(path: tuple[Any, ...], old: Any) -> Any:
        return old if {*_words(path[:2])} & MEASURED else bounded(old)

    new = [
        _placed(value(path, parts[key]), leaf)
        for key, (path, leaf) in zip(_keys(paths), paths_and_leaves, strict=True)
    ]
    filled = treedef.unflatten(new)
    del filled["inner_state"]
    return own._replace(**filled)


def _placed(old: Any, new: Any) -> Any:
    """The old value where, and as firmly as, ``init`` placed the new one."""
    traced = isinstance(old, jax.core.Tracer) or isinstance(new, jax.core.Tracer)
    if traced or jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
        return jnp.asarray(old)
    if isinstance(new, jax.Array) and new.committed:
        return jax.device_put(old, new.sharding)
    # By way of the host: an array that is committed to a device stays so otherwise.
    return jnp.array(np.asarray(old))
