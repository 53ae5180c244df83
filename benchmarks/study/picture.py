"""The study in one picture: loss over fixed thresholds, and the default's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.clips import DEFAULT
from study.regret import standard_error, values

FIXED, CHOSEN, NONE = "#0072B2", "#D55E00", "#767676"
COLUMNS = 4


def draw(records: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel per task."""
    rows = -(-len(records) // COLUMNS)
    figure = Figure(figsize=(12, 2.7 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for ax, (name, record) in zip(axes, records.items(), strict=False):
        _panel(ax, name, record)
    for ax in axes[len(records) :]:
        ax.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=11
    )
    figure.supxlabel(
        "fixed threshold, in median gradient norms of the run without a clip",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(ax: Axes, name: str, record: Mapping[str, Any]) -> None:
    factors = [float(f) for f in record["constants"]]
    ends = [_at_best_rate(r) for r in record["constants"].values()]
    means, errors = np.transpose(ends)
    ax.errorbar(
        factors, means, errors, color=FIXED, marker="o", markersize=4, capsize=2,
        label="a fixed threshold",
    )  # fmt: skip
    _level(ax, record["clips"][DEFAULT], CHOSEN, "-", f"optaxclip.{DEFAULT}")
    none, _ = _at_best_rate(record["none"])
    ax.axhline(none, color=NONE, linestyle=":", label="no clip")
    ax.set_xscale("log")
    ax.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    chosen, error = _at_best_rate(record["clips"][DEFAULT])
    low, high = min(means.min(), chosen - error), max(means.max(), none)
    ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    held_out = ", held out" if record["held_out"] else ""
    ax.set_title(f"{name}{held_out}\n{record['optimizer']}", fontsize=9.5)
    ax.set_ylabel(record["unit"], fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _level(
    ax: Axes, result: Mapping[str, Any], color: str, style: str, label: str
) -> None:
    mean, error = _at_best_rate(result)
    ax.axhline(mean, color=color, linestyle=style, linewidth=2, label=label)
    ax.axhspan(mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def _at_best_rate(result: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    values_RS = values(result)
    best_S = values_RS[values_RS.mean(-1).argmin()]
    return float(best_S.mean()), standard_error(best_S)
