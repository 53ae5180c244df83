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
GROUPS = 150  # of steps; of each some rows are drawn
LIMIT = 1e100  # drawn at most, its inverse at least: an axis cannot span all of float64
PARAMETERS = "norm by parameter"
ACTIONS = ("scale", "share of steps", "share clipped")
HEIGHTS = {  # of the panels, by what stands beside their axes
    **{"gradient norm": 2.4, "threshold": 1.0, "scale": 1.0, "share of steps": 1.0},
    **{"share clipped": 1.0, "loss": 1.3, PARAMETERS: 2.0},
}


class Line(NamedTuple):
    """Values over steps, and how they look in the plot of one run."""

    label: str
    steps: np.ndarray
    values: np.ndarray  # NaN for a gap
    color: str
    dash: str = "-"  # "" for dots alone


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
    drawn = {name: _panels(data, alone) for name, data in runs.items()}
    names = [name for name in HEIGHTS if any(map(_holding(name), drawn.values()))]
    if not any(map(stats.acted, runs.values())):
        # Straight lines, drawn only if there is nothing else.
        names = [name for name in names if name not in ACTIONS] or names
    heights = [HEIGHTS[name] for name in names]
    figure = Figure((9.2, 1.3 * sum(heights)), layout="constrained")
    axes_of_panels = figure.subplots(
        len(names), sharex=True, squeeze=False, height_ratios=heights
    )
    stack = axes_of_panels[:, 0]
    logarithmic = {"gradient norm", "threshold", PARAMETERS}
    if any(stats.spans_decades(data.loss) for data in runs.values()):
        logarithmic.add("loss")
    for name, axes in zip(names, stack, strict=True):
        axes.set_yscale("log" if name in logarithmic else "linear")
        for i, (run, panels) in enumerate(drawn.items()):
            for line in filter(_is_drawn, panels.get(name, [])):
                others = line._replace(color=COLORS[i % 8], dash=DASHES[i % 4])
                _draw(axes, line if alone else others._replace(label=_name(run)))
        for data in runs.values() if alone else ():
            _mark_bad(axes, data, with_label=axes is stack[0])
        _finish(axes, name)
    stack[-1].set_xlabel("step")
    stack[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    stack[-1].ticklabel_format(axis="x", style="plain", useOffset=False)
    return figure


def _holding(name: str) -> Any:
    return lambda panels: any(map(_is_drawn, panels.get(name, [])))


def _is_drawn(line: Line) -> bool:
    return bool(np.isfinite(line.values).any())


def _panels(data: LogData, alone: bool) -> dict[str, list[Line]]:
    rows = chosen_rows(data, GROUPS)
    step, is_clipped = data.step[rows], stats.clipped(data)
    norm, bound = _positive(data.norm[rows]), _positive(data.threshold[rows])
    norms = [Line("norm before clipping", step, norm, NORM)]
    bounds = [Line("threshold", step, bound, THRESHOLD, "--")]
    shares = [Line("share clipped", *_shares(data, is_clipped), CLIPPED)]
    losses = [Line("loss", step, _finite(data.loss[rows]), LOSS)]
    if not alone:
        panels = {"gradient norm": norms, "threshold": bounds, "share clipped": shares}
        return {**panels, "loss": losses}
    dots = np.where(is_clipped[rows], norm, np.nan)
    bounds.append(Line("clipped step", step, dots, CLIPPED, ""))
    if data.skipped.any():
        shares.append(Line("share skipped", *_shares(data, data.skipped), BAD, ":"))
    scale = Line(
        "scale: what the clip multiplied the norm by",
        *(step, _finite(data.scale[rows]), NORM),
    )
    panels = {"gradient norm": norms + bounds, "scale": [scale]}
    return {
        **panels,
        "share of steps": shares,
        "loss": losses,
        PARAMETERS: [*_leaves(data, rows)],
    }


def _leaves(data: LogData, rows: np.ndarray) -> list[Line]:
    if data.leaf_norms is None:
        return []
    lines = []
    for i, leaf in enumerate(stats.largest_leaves(data, len(COLORS))):
        norms = _positive(data.leaf_norms[rows, leaf])
        name = _name(data.leaf_names[leaf] or "-")
        lines.append(Line(name, data.step[rows], norms, COLORS[i], DASHES[i % 4]))
    return lines


def _shares(data: LogData, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The steps in the middle of so many groups of rows, and the shares of flags."""
    count = len(flags)
    groups = max(min(100, count // 20), min(10, count))
    starts = np.arange(groups) * count // groups
    sizes = np.diff(np.append(starts, count))
    shares = np.add.reduceat(flags, starts, dtype=float) / sizes
    return data.step[starts + sizes // 2], shares


def _draw(axes: Axes, line: Line) -> None:
    style = {"ls": line.dash, "lw": 0.9}
    # A line shows nothing of a value between two gaps.
    gap = np.concatenate([[True], np.isnan(line.values), [True]])
    alone = np.flatnonzero(~gap[1:-1] & gap[:-2] & gap[2:]).tolist()
    if not line.dash:
        style |= {"marker": ".", "ms": 3.5}
    elif len(line.values) < 100 or alone:
        every = None if len(line.values) < 100 else alone
        style |= {"marker": ".", "ms": 3, "markevery": every}
    axes.plot(line.steps, line.values, c=line.color, label=line.label, **style)


def _finish(axes: Axes, name: str) -> None:
    axes.set_ylabel(name)
    axes.margins(x=0.01)
    if name == "scale":
        axes.set_ylim(0, 1.05)
    if name.startswith("share"):
        top = max(float(np.max(line.get_ydata())) for line in axes.lines)
        axes.set_ylim(0, 1.05 * top or 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.grid(alpha=0.3, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "frameon": False}
    columns = 2 if name == PARAMETERS else 4  # names may be long
    axes.legend(fontsize="small", ncols=columns, **place)


def _mark_bad(axes: Axes, data: LogData, with_label: bool) -> None:
    """Bands of steps, since a step without a norm has no height."""
    reached = ~np.isfinite(data.norm) & ~data.skipped
    for flags, label, style in [
        (data.skipped, "skipped", {"color": SKIPPED}),
        (reached, "NaN or infinite, not skipped", {"color": BAD, "hatch": "///"}),
    ]:
        for i, (first, last) in enumerate(data.step[stretches(flags, 100)].tolist()):
            told = label if with_label and not i else None
            ends = first - 0.5, last + 0.5
            axes.axvspan(*ends, alpha=0.35, zorder=0, label=told, **style)


def _name(name: str) -> str:
    # A name is no formula, whatever dollars it has; an underscore would hide it.
    shown = text.shown(name, 34).replace("$", r"\$")
    return f"\u200a{shown}"


def _positive(values: np.ndarray) -> np.ndarray:
    """Values for a logarithmic axis."""
    good = np.isfinite(values) & (values > 0)
    return np.where(good, np.clip(np.where(good, values, 1), 1 / LIMIT, LIMIT), np.nan)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), np.clip(values, -LIMIT, LIMIT), np.nan)
