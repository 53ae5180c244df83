"""Measuring gradients once, however many transformations ask.

A skip around a clip, or a recorder around both, measures the very gradients that the
clip inside will measure, and XLA does not merge the two reads: the clip stands in a
branch. So the outer one hands over what it found, for as long as the inner one is
traced, to whoever asks for the same norm of the same arrays.
"""

import contextlib
import contextvars
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from optaxclip import _gradients, _mesh
from optaxclip._norms import global_norm, leaf_norm

PyTree = Any
Norm = Callable[[PyTree], PyTree]


class _Known(NamedTuple):
    norm: Norm
    leaves: list[jax.Array]
    norms: PyTree


_known: contextvars.ContextVar[tuple[_Known, ...]] = contextvars.ContextVar(
    "known", default=()
)


def initial(norm: Norm, params: PyTree) -> PyTree:
    """Norms of the structure, shapes and dtypes that those of gradients will have."""
    with _mesh.initialising():
        return norm(_gradients.split(params).gradients)


def measure(norm: Norm, gradients: PyTree) -> PyTree:
    """The norms of gradients: those handed over, or else by reading the gradients."""
    leaves = jax.tree.leaves(gradients)
    for known in _known.get():
        if _are_same(known.leaves, leaves):
            if _parts(known.norm) == _parts(norm):
                return known.norms
            if _is_global_of_leaves(norm, known.norm):
                return global_norm(known.norms, axis_name=())
    return norm(gradients)


@contextlib.contextmanager
def handing_over(norm: Norm, gradients: PyTree, norms: PyTree) -> Iterator[None]:
    """Within it these norms are known, and nobody is warned of the gradients again."""
    known = _Known(norm, jax.tree.leaves(gradients), norms)
    token = _known.set((known, *_known.get()))
    try:
        with _mesh.measured():
            yield
    finally:
        _known.reset(token)


def _are_same(leaves: list[jax.Array], others: list[jax.Array]) -> bool:
    return len(leaves) == len(others) and all(map(operator.is_, leaves, others))


def _parts(norm: Norm) -> tuple[Norm, _mesh.AxisName]:
    """A norm and the axis names that it was given."""
    if not isinstance(norm, functools.partial) or norm.args:
        return norm, None
    if norm.keywords.keys() != {"axis_name"}:
        return norm, None
    return norm.func, norm.keywords["axis_name"]


def _is_global_of_leaves(norm: Norm, known: Norm) -> bool:
    function, axis_name = _parts(norm)
    return function is global_norm and _parts(known) == (leaf_norm, axis_name)
