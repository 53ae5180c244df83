"""Errors for bad arguments. Only concrete numbers are checked, never traced ones."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.core
import numpy as np
import optax

_call: contextvars.ContextVar[str | None] = contextvars.ContextVar("call", default=None)
_names: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("names")


def call_made(inner: str) -> str:
    """The call that the user made, of which ``inner`` is a part, or is itself."""
    return _call.get() or inner


def argument_given(inner: str) -> str:
    """The argument of the call that the user made, handed on as ``inner``."""
    return _names.get({}).get(inner, inner)


@contextlib.contextmanager
def made(call: str, **names: str) -> Iterator[None]:
    """Within it errors name this call, which the user made, and none that it makes.

    ``names`` has, by the arguments of inner calls, those of this call.
    """
    outermost = _call.get() is None
    token = _call.set(call_made(call))
    names_token = _names.set(names if outermost else _names.get({}))
    try:
        yield
    finally:
        _call.reset(token)
        _names.reset(names_token)


def refused(
    call: str, argument: str, rule: str, value: Any, hint: str = ""
) -> NoReturn:
    """Raises the error: the argument of this call breaks this rule."""
    made_by = call_made(call)
    shown = _shortened(value)
    text = f"`{made_by}({argument}=...)` must be {rule}, got {shown}"
    raise ValueError(f"{text}: {hint}." if hint else f"{text}.")


def check(call: str, argument: str, value: Any, holds: Callable, rule: str) -> None:
    """Refuses what is no number, and a number of which ``holds`` is not true."""
    if isinstance(value, jax.core.Tracer):
        return
    number = rule if rule.startswith("a number") else f"a number that is {rule}"
    if isinstance(value, bool) or not isinstance(
        value, int | float | np.ndarray | np.generic | jax.Array
    ):
        refused(call, argument, number, value)
    try:
        numbers = np.asarray(float(value) if isinstance(value, int) else value)
    except OverflowError:
        refused(call, argument, f"a number that fits a float and is {rule}", value)
    except TypeError:  # a PRNG key
        refused(call, argument, number, value)
    is_real = numbers.dtype.kind in "iufV"  # V: bfloat16
    if not is_real or not np.all(holds(numbers)):
        refused(call, argument, rule if is_real else number, value)


def non_negative(call: str, argument: str, value: Any) -> None:
    """Refuses negative numbers and NaN, which is not comparable."""
    check(call, argument, value, lambda x: x >= 0, "non-negative")


def threshold(call: str, argument: str, value: Any) -> None:
    """Refuses what is neither a schedule nor a number of at least 0."""
    if isinstance(value, optax.GradientTransformation):
        rule = "a number, an array or a schedule"
        refused(call, argument, rule, value, "a rule goes to `clip_by(norm, rule)`")
    if not callable(value):
        non_negative(call, argument, value)


def transformation(call: str, argument: str, value: Any) -> None:
    """Refuses what is no ``optax.GradientTransformation``."""
    if not callable(getattr(value, "init", None)) or not callable(
        getattr(value, "update", None)
    ):
        refused(call, argument, "an `optax.GradientTransformation`", value)


def function(call: str, argument: str, value: Any, what: str) -> None:
    """Refuses what cannot be called."""
    if not callable(value):
        refused(call, argument, f"a function {what}", value)


def count(
    call: str, argument: str, value: Any, least: int = 1, most: int | None = None
) -> None:
    """Refuses what is no integer from ``least`` to ``most``; True and 2.0 are none."""
    rule = f"an integer of at least {least}"
    if most is not None:
        rule = f"an integer from {least} to {most}"
    if isinstance(value, jax.Array):
        hint = (
            "it is a shape, not data. If `optax.inject_hyperparams` made an array of "
            f"it, name it there: `static_args=({argument!r}, ...)`"
        )
        refused(call, argument, rule, value, hint)
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        refused(call, argument, rule, value)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of a shape broadcasts to another shape."""
    pairs = zip(shape[::-1], to[::-1], strict=False)
    return len(shape) <= len(to) and all(a in (1, n) for a, n in pairs)


def _shortened(value: Any, most: int = 200) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "an integer too long to print"
    return text if len(text) <= most else f"{text[:most]}..."
