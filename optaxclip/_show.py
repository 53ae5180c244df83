"""How states and defaults print: a state on one screen, a default by its name."""

import operator
from typing import Any, Generic, TypeVar, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")

_MOST = 3  # entries of a dict that are shown


def shown(self: Any) -> str:
    """The ``__repr__`` of a NamedTuple of arrays: scalars in full, of others the shape.

    >>> import jax.numpy as jnp, optaxclip
    >>> print(optaxclip.clip_by_percentile(window=5).init(jnp.ones(3)).rule_state)
    QuantileState(quantile_ring=float32[5], quantile_sorted=float32[5], \
quantile_slot=0, quantile_count=0)
    """
    fields = (f"{name}={_value(x)}" for name, x in self._asdict().items())
    return f"{type(self).__name__}({', '.join(fields)})"


def shown_by_name(names: list[str], values: Any) -> str:
    """The elements of an array by their names, as a dict would print them."""
    is_array = isinstance(values, jax.Array | np.ndarray) and not _is_abstract(values)
    if not is_array or not getattr(values, "is_fully_addressable", True):
        return f"{len(names)} named: {_array(values)}"
    values = jax.device_get(values)  # on the host: a trace may be under way
    first = {name: values[..., i] for i, name in enumerate(names[:_MOST])}
    return _dict(first | dict.fromkeys(names[_MOST:]))


def _value(x: Any) -> str:
    return _dict(x) if isinstance(x, dict) else _array(x)


def _dict(x: dict[Any, Any]) -> str:
    entries = [f"{name!r}: {_value(x[name])}" for name in list(x)[:_MOST]]
    more = [f"... {len(x) - _MOST} more"] if len(x) > _MOST else []
    return "{" + ", ".join(entries + more) + "}"


def _array(x: Any) -> str:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return repr(x)
    if x.shape or _is_abstract(x) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return f"{x.dtype}{list(x.shape)}"
    if not getattr(x, "is_fully_addressable", True):
        return f"{x.dtype}[]"
    number = jax.device_get(x).item()  # on the host: a trace may be under way
    if jnp.issubdtype(x.dtype, jnp.floating) and number == jnp.finfo(x.dtype).max:
        return "no bound"
    return f"{number:.6g}"


def _is_abstract(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


class _Default(Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return getattr(self.value, "__name__", repr(self.value))

    # For tools that read defaults from signatures. No `__call__`: see `default`.
    def __eq__(self, other: object) -> bool:
        return self.value == chosen(other)

    def __hash__(self) -> int:
        return hash(self.value)

    def __index__(self) -> int:
        return operator.index(self.value)  # type: ignore[call-overload]  # or an error


def default(value: T) -> T:
    """A default argument that prints as its name, and that is static.

    ``optax.inject_hyperparams`` calls functions, which it takes for schedules, and
    makes arrays of numbers; of defaults it should do neither. The callee unwraps it by
    :func:`chosen`.
    """
    return cast(T, _Default(value))


def chosen(argument: T) -> T:
    """The argument, or what a :func:`default` stands for."""
    return cast(T, argument.value) if isinstance(argument, _Default) else argument
