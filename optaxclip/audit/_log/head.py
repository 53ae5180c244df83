"""The first line of a log: what run this is."""

import datetime
import json
import platform
from typing import Any

import jax
import numpy as np
import optax

import optaxclip
from optaxclip.audit._log.check import sealed
from optaxclip.audit._log.plain import as_text, plain

PyTree = Any

FORMAT = 1
HEAD = '{"optaxclip_log":'  # how every log begins
START = f'{HEAD}{FORMAT},"started":"'  # how those begin that `head` writes


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
    known = transform is None or type(transform) is str
    return {
        "transform": transform if known else as_text(transform),
        "hyperparameters": {} if hyperparameters is None else plain(hyperparameters),
        "parameter_count": None if params is None else sum(sizes),
    }


def line(content: dict[str, Any]) -> str:
    """A line of JSON, as short as it gets, with its check."""
    return sealed(json.dumps(content, separators=(",", ":")))
