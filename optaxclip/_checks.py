"""Errors for bad arguments. Only concrete numbers are checked, never traced ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np


def check(call: str, argument: str, value: Any, holds: Callable, rule: str) -> None:
    """Raises ``ValueError`` unless ``holds`` of every concrete number in ``value``."""
    if isinstance(value, jax.core.Tracer) or callable(value):
        return
    numbers = np.asarray(float(value) if isinstance(value, int) else value)
    if numbers.dtype.kind not in "biufV" or not np.all(holds(numbers)):  # V: bfloat16
        raise ValueError(f"`{call}({argument}=...)` must be {rule}, got {value!r}.")


def non_negative(call: str, argument: str, value: Any) -> None:
    """Refuses negative numbers and NaN, which is not comparable."""
    check(call, argument, value, lambda x: x >= 0, "non-negative")


def count(
    call: str, argument: str, value: Any, least: int = 1, most: int | None = None
) -> None:
    """Refuses what is no integer from ``least`` to ``most``; True and 2.0 are none."""
    rule = (
        f"an integer of at least {least}"
        if most is None
        else f"an integer from {least} to {most}"
    )
    if isinstance(value, jax.Array):
        raise ValueError(
            f"`{call}({argument}=...)` must be {rule}, got the JAX array {value}: it "
            "is a shape, not data. If `optax.inject_hyperparams` made an array of it, "
            f"name it there: `static_args=({argument!r}, ...)`."
        )
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        raise ValueError(f"`{call}({argument}=...)` must be {rule}, got {value!r}.")
