"""The log of a run, as read back: what every other part of the audit works on."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LogData:
    """One row a step, in the order of the steps, each step once.

    Arrays have one entry a step. A quantity that a step did not have (the loss, if it
    was not passed to ``update``) is NaN.
    """

    metadata: dict[str, Any]  # the first line of the log
    step: np.ndarray  # int64, counted from 0
    norm: np.ndarray  # float64, before clipping; NaN or infinite on a bad step
    threshold: np.ndarray  # float64, infinite where nothing bounds
    scale: np.ndarray  # float64 in [0, 1], what the step was multiplied by
    loss: np.ndarray  # float64
    clipped: np.ndarray  # bool
    skipped: np.ndarray  # bool
    leaf_names: tuple[str, ...] = ()
    leaf_norms: np.ndarray | None = None  # float64, (steps, leaves)
    missed: tuple[tuple[int, int], ...] = ()  # first and last step of each gap
    rewritten: int = 0  # rows that a later row of the same step replaced
    torn: int = 0  # incomplete lines that were dropped
