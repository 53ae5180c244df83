"""The plot of a log, on a figure of its own and never on pyplot's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.decimate import chosen_rows, stretches

# Of the palette of Okabe and Ito, told apart by color-blind readers too; and every
# series has a shape of its own.
NORM, THRESHOLD, CLIPPED, LOSS = "#0072B2", "#000000", "#E69F00", "#009E73"
SKIPPED, BAD = "#B0B0B0", "#D55E00"
COLORS = (NORM, BAD, LOSS, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
DASHES = ("-", "--", ":", "-.")
LEAVES = len(COLORS)  # lines of parameters, at most
PARAMETERS = "norm by parameter"
GROUPS = 150  # of steps; of each some rows are drawn
LIMIT = 1e100  # drawn at most; an axis cannot span all of float64


class Look(NamedTuple):
    """How the lines of a run are told from those of the others."""

    name: str  # empty if there are no others
    color: str = NORM
    dash: str = "-"

    def of(self, what: str, color: str, dash: str = "-") -> dict[str, Any]:
        """The style of a line, whose own color and dash count in a plot of one run."""
        # A name is no formula, whatever dollars it has; an underscore would hide it.
        name = text.shown(self.name, 34).replace("$", r"\$")
        own = {"label": what, "c": color, "ls": dash, "lw": 0.9}
        others = {"label": f"\u200a{name}", "c": self.color, "ls": self.dash, "lw": 1.1}
        return others if name else own


def plot(runs: Mapping[str, LogData]) -> Figure:
    """Panels of one run, or of several over each other, over one axis of steps.

    Args:
      runs: Logs by name.

    Raises:
      ValueError: a log has no steps.
    """
    for data in runs.values():
        stats.statistics(data)
    alone = len(runs) == 1
    any_loss = any(np.isfinite(data.loss).any() for data in runs.values())
    panels = {_norms: 2.4, (_scales if alone else _thresholds): 1.0, _shares: 1.0}
    panels |= {_losses: 1.3} if any_loss else {}
    panels |= {_leaves: 2.0} if alone and has_leaves(*runs.values()) else {}
    figure = Figure((9.2, 1.3 * sum(panels.values())), layout="constrained")
    ratios = [*panels.values()]
    stack = figure.subplots(len(panels), sharex=True, height_ratios=ratios)
    for i, (name, data) in enumerate(runs.items()):
        rows = chosen_rows(data, GROUPS)
        look = Look("" if alone else name, COLORS[i % 8], DASHES[i % 4])
        for draw, axes in zip(panels, stack, strict=True):
            draw(axes, data, rows, look)
            if alone:
                _mark_bad(axes, data, with_label=draw is _norms)
    for axes in stack:
        axes.grid(alpha=0.3, lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "frameon": False}
        columns = 2 if axes.get_ylabel() == PARAMETERS else 4  # names may be long
        axes.legend(fontsize="small", ncols=columns, **place)
        axes.margins(x=0.01)
    stack[-1].set_xlabel("step")
    stack[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    stack[-1].ticklabel_format(axis="x", style="plain", useOffset=False)
    return figure


def has_leaves(data: LogData) -> bool:
    """Whether a log has norms of parameters."""
    return data.leaf_norms is not None and bool(np.isfinite(data.leaf_norms).any())


def _norms(axes: Axes, data: LogData, rows: np.ndarray, look: Look) -> None:
    step, norm = data.step[rows], _positive(data.norm[rows])
    axes.plot(step, norm, **look.of("norm before clipping", NORM), **_dots(rows))
    axes.set(yscale="log", ylabel="gradient norm")
    if look.name:
        return
    bounds = _positive(data.threshold[rows])
    axes.plot(step, bounds, **look.of("threshold", THRESHOLD, "--"))
    clipped = stats.clipped(data)[rows]
    if clipped.any():
        style = {"ls": "", "marker": ".", "ms": 3.5, "c": CLIPPED}
        axes.plot(step[clipped], norm[clipped], label="clipped step", **style)


def _thresholds(axes: Axes, data: LogData, rows: np.ndarray, look: Look) -> None:
    bounds = _positive(data.threshold[rows])
    axes.plot(data.step[rows], bounds, **look.of("threshold", THRESHOLD))
    axes.set(yscale="log", ylabel="threshold")


def _scales(axes: Axes, data: LogData, rows: np.ndarray, look: Look) -> None:
    scales = np.where(np.isfinite(data.scale[rows]), data.scale[rows], np.nan)
    style = look.of("scale: what the clip multiplied the gradient by", NORM)
    axes.plot(data.step[rows], scales, **style, **_dots(rows))
    axes.set(ylabel="scale", ylim=(0, 1.05))


def _shares(axes: Axes, data: LogData, rows: np.ndarray, look: Look) -> None:
    count = len(data.step)
    groups = max(min(100, count // 20), 1)
    starts = np.arange(groups) * count // groups
    sizes = np.diff(np.append(starts, count))
    middle = data.step[starts + sizes // 2]
    parts = [(stats.clipped(data), look.of("share clipped", CLIPPED))]
    if data.skipped.any() and not look.name:
        parts.append((data.skipped, look.of("share skipped", BAD, ":")))
    for flags, style in parts:
        shares = np.add.reduceat(flags, starts, dtype=float) / sizes
        axes.plot(middle, shares, **style)
    axes.set(ylabel="share of steps" if not look.name else "share clipped")
    top = max(float(np.max(line.get_ydata())) for line in axes.lines)
    axes.set_ylim(0, 1.05 * top or 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _losses(axes: Axes, data: LogData, rows: np.ndarray, look: Look) -> None:
    losses = data.loss[rows]
    losses = np.where(np.isfinite(losses), np.clip(losses, -LIMIT, LIMIT), np.nan)
    axes.plot(data.step[rows], losses, **look.of("loss", LOSS), **_dots(rows))
    if stats.spans_decades(data.loss):
        axes.set_yscale("log")
    axes.set_ylabel("loss")


def _leaves(axes: Axes, data: LogData, rows: np.ndarray, look: Look) -> None:
    assert data.leaf_norms is not None
    for i, leaf in enumerate(stats.largest_leaves(data, LEAVES)):
        norms = _positive(data.leaf_norms[rows, leaf])
        style = Look(data.leaf_names[leaf] or "-", COLORS[i], DASHES[i % 4])
        axes.plot(data.step[rows], norms, **style.of("", NORM))
    axes.set(yscale="log", ylabel=PARAMETERS)


def _mark_bad(axes: Axes, data: LogData, with_label: bool) -> None:
    """Bands of steps, since a step without a norm has no height."""
    reached = ~np.isfinite(data.norm) & ~data.skipped
    for flags, color, hatch, label in [
        (data.skipped, SKIPPED, "", "skipped"),
        (reached, BAD, "///", "NaN or infinite, not skipped"),
    ]:
        steps = data.step[stretches(flags, 100)].tolist()
        for first, last in steps:
            axes.axvspan(
                first - 0.5,
                last + 0.5,
                color=color,
                alpha=0.35,
                hatch=hatch,
                zorder=0,
                label=label if with_label else None,
            )
            label = None


def _positive(values: np.ndarray) -> np.ndarray:
    """Values for a logarithmic axis."""
    good = np.isfinite(values) & (values > 0)
    return np.where(good, np.minimum(np.where(good, values, 1), LIMIT), np.nan)


def _dots(rows: np.ndarray) -> dict[str, Any]:
    """A finite step between two that are not would vanish from a line."""
    return {"marker": ".", "ms": 3} if len(rows) < 100 else {}
