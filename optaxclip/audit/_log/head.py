"""The first line of a log, which says what run this is: written, and read."""

import datetime
import json
import platform
import reprlib
from typing import Any

import jax
import numpy as np
import optax

import optaxclip
from optaxclip.audit._log.check import Damage, sealed
from optaxclip.audit._log.markers import is_metadata
from optaxclip.audit._log.plain import as_text, plain

PyTree = Any

FORMAT = 1
HEAD = '{"optaxclip_log":'  # how every log begins
START = f'{HEAD}{FORMAT},"started":"'  # how those begin that `head` writes
NO_JSON = (ValueError, RecursionError)  # the latter of thousands of brackets


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


def metadata_of(lines: list[bytes]) -> dict[str, Any]:
    """What the first line of a log says; `Damage` if it is none."""
    if not lines:
        raise Damage(0, "the file is empty")
    try:
        head = json.loads(lines[0].decode("latin-1"))
    except NO_JSON:
        head = None
    if not isinstance(head, dict) or "optaxclip_log" not in head:
        raise Damage(0, f"this is no optaxclip log, which begins with {HEAD}")
    if b"\r" in lines[0]:
        raise Damage(0, "the lines end in CR LF, those of a log in LF")
    found = head["optaxclip_log"]
    if type(found) is not int or found != FORMAT:
        reason = f"the log has format {reprlib.repr(found)}, this reader knows {FORMAT}"
        raise Damage(0, reason)
    names = head.get("leaf_names") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        found = reprlib.repr(names)
        raise Damage(0, f"leaf_names must be a list of strings, got {found}")
    if not is_metadata(head):
        raise Damage(0, "it is nested too deeply")
    head.pop("crc", None)
    return head
