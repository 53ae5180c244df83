"""The log of a run, as read back: what every other part of the audit works on."""

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class LogData:
    """One row for each step, in the order of the steps.

    Arrays have one entry for each step. A quantity that a step did not have (the loss,
    if it was not passed to ``update``) is NaN. A number that was recorded in float32 is
    given by its shortest decimal, such as 0.1: ``astype(np.float32)`` gives the same
    bits.

    As the value of a notebook's cell it shows its summary and its plot.
    """

    metadata: dict[str, Any]  # the first line of the log; later runs: "resumed"
    step: np.ndarray  # int64, counted from 0
    norm: np.ndarray  # float64, before clipping; NaN or infinite on a bad step
    threshold: np.ndarray  # float64, infinite where nothing bounds
    scale: np.ndarray  # float64, the factor of the step; above 1 only by `normalize`
    loss: np.ndarray  # float64
    clipped: np.ndarray  # bool
    skipped: np.ndarray  # bool
    leaf_names: tuple[str, ...] = ()
    leaf_norms: np.ndarray | None = None  # float64, (steps, leaves)
    missed: tuple[tuple[int, int], ...] = ()  # first and last step of each gap
    rewritten: int = 0  # rows that a rewind or a later row of the step replaced
    torn: int = 0  # incomplete lines that were dropped
    unsure_before: int = 0  # earlier rows may be of steps repeated since
    restarts: tuple[int, ...] = ()  # the first step that each later process wrote

    @property
    def missing(self) -> int:
        """The number of steps without a row, in all gaps together."""
        return sum(last - first + 1 for first, last in self.missed)

    def nonfinite_leaves(self, step: int) -> tuple[str, ...]:
        """The parameters whose gradient had a norm of NaN or infinity at a step.

        Raises:
          ValueError: the log does not have the step, or no norms of parameters
            (``record_history(leaf_norms=True)`` records them).
        """
        call = "`LogData.nonfinite_leaves(step=...)`"
        if self.leaf_norms is None:
            raise ValueError(
                f"{call} needs norms of parameters, which the log does not have: "
                "record them by `record_history(leaf_norms=True)`."
            )
        row = np.searchsorted(self.step, step)
        if step not in self.step[row : row + 1]:
            raise ValueError(f"{call} must be a step of the log, got {step!r}.")
        bad = np.flatnonzero(~np.isfinite(self.leaf_norms[row]))
        return tuple(self.leaf_names[leaf] for leaf in bad)

    def plot(self) -> "Figure":
        """Norm, threshold, scale, loss and share of clipped steps, over the steps.

        Returns:
          A ``matplotlib.figure.Figure`` that pyplot does not know of: a notebook shows
          it as the value of a cell, ``figure.savefig`` writes it.

        Raises:
          ValueError: the log has no steps.
          ImportError: matplotlib is not installed.
        """
        from optaxclip.audit import _report  # a log can be read without it

        return _report.plot(self)

    def _repr_html_(self) -> str:
        from optaxclip.audit import _report

        return _report.cell(self)

    def __repr__(self) -> str:
        first, last = (self.step[0], self.step[-1]) if len(self.step) else ("-", "-")
        return f"LogData({len(self.step):,} steps, {first} to {last})"

    def to_pandas(self) -> Any:
        """The rows as a ``pandas.DataFrame`` with the steps as its index.

        Its columns are ``norm``, ``threshold``, ``scale``, ``loss``, ``clipped`` and
        ``skipped``, and for every leaf ``leaf_norm/<name>``.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")  # optional, unknown to pyright
        except ImportError as error:
            raise ImportError("`LogData.to_pandas()` needs pandas.") from error
        names = ("norm", "threshold", "scale", "loss", "clipped", "skipped")
        columns = {name: getattr(self, name) for name in names}
        if self.leaf_norms is not None:
            norms = zip(self.leaf_names, self.leaf_norms.T, strict=True)
            columns |= {f"leaf_norm/{name}": column for name, column in norms}
        return pandas.DataFrame(columns, index=pandas.Index(self.step, name="step"))
