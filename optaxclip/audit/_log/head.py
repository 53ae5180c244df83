"""The first line of a log: what run this is."""

import datetime
import json
import math
import platform
from typing import Any

import jax
import numpy as np
import optax

import optaxclip

PyTree = Any

FORMAT = 1
HEAD = '{"optaxclip_log":'  # how every log begins


def head(about: dict[str, Any], leaf_names: tuple[str, ...]) -> dict[str, Any]:
    """The first line, which asks JAX for its devices."""
    device = jax.devices()[0]
    return {
        "optaxclip_log": FORMAT,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "optaxclip": optaxclip.__version__,
        },
        "device": {"platform": device.platform, "kind": device.device_kind},
        "process_count": jax.process_count(),
        **about,
        "leaf_names": list(leaf_names),
    }


def about(
    transform: str | None, hyperparameters: dict[str, Any] | None, params: PyTree
) -> dict[str, Any]:
    """That part of the first line which the user tells."""
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(params)]
    return {
        "transform": transform,
        "hyperparameters": _plain(hyperparameters or {}),
        "parameter_count": None if params is None else sum(sizes),
    }


def line(content: dict[str, Any]) -> str:
    """A line of JSON, as short as it gets."""
    return json.dumps(content, separators=(",", ":")) + "\n"


def _plain(value: Any) -> Any:
    """A value as JSON knows it; as text, where it does not."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    known = value is None or isinstance(value, bool | int | float | str)
    return value if known else str(value)
