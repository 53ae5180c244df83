"""The plots of a log, drawn on figures of their own, never on pyplot's."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.decimate import Bins, bins

# Of the palette of Okabe and Ito, told apart by color-blind readers too; and every
# series has a shape of its own.
NORM, BAND, THRESHOLD = "#0072B2", "#A6CEE3", "#000000"
CLIPPED, SKIPPED, LOSS = "#E69F00", "#D55E00", "#009E73"
LIMIT = 1e100  # drawn at most; an axis cannot span all of float64
LEAVES = 24  # at most so many rows of the heat map


def plot(data: LogData) -> Figure:
    """Norm and threshold, share of clipped steps and loss of a log, over its steps.

    Args:
      data: A log, as :func:`optaxclip.audit.read` returns it.

    Returns:
      A ``matplotlib.figure.Figure`` that no global state knows of: a notebook shows it
      as the value of a cell, ``figure.savefig`` writes it.

    Raises:
      ValueError: the log has no steps.
    """
    stats.statistics(data)
    draws = [draw_norms, draw_shares]
    if np.isfinite(data.loss).any():
        draws.append(draw_losses)
    heights = [2.2, 1.0, 1.0][: len(draws)]
    figure = Figure(figsize=(9, 2.1 * sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(draws), sharex=True, squeeze=False, height_ratios=heights
    )
    for draw, axes in zip(draws, panels[:, 0], strict=True):
        draw(axes, data)
    for axes in panels[:-1, 0]:
        axes.set_xlabel("")
    return figure


def draw_norms(axes: Axes, data: LogData, most: int = 600) -> None:
    """Norm and threshold on a logarithmic scale; clipped and skipped steps marked."""
    groups = bins(len(data.step), most)
    positive = np.where(data.norm > 0, data.norm, np.nan)
    _band(axes, groups, data.step, positive, ("norm", NORM, BAND))
    bounds = np.where(data.threshold > 0, data.threshold, np.nan)
    x = groups.x(data.step)
    axes.plot(x, groups.median(bounds), "--", c=THRESHOLD, lw=1.3, label="threshold")
    rows = groups.highest_row(positive, stats.clipped(data) & (data.norm > 0))
    marks = {"ls": "", "ms": 3.5, "mew": 0.8, "zorder": 3}
    if len(rows):
        axes.plot(
            data.step[rows],
            data.norm[rows],
            marker="o",
            c=CLIPPED,
            label="clipped",
            **marks,
        )
    axes.set(yscale="log", ylabel="gradient norm")
    _mark_bad(axes, groups, data)
    _finish(axes)


def draw_shares(axes: Axes, data: LogData, most: int = 150) -> None:
    """The share of clipped, and of skipped, steps over time."""
    groups = bins(len(data.step), most, least_size=min(20, len(data.step)))
    x = groups.x(data.step)
    axes.plot(
        x, groups.mean(stats.clipped(data)), c=CLIPPED, lw=1.5, label="clipped steps"
    )
    axes.fill_between(x, groups.mean(stats.clipped(data)), color=CLIPPED, alpha=0.25)
    if data.skipped.any():
        skipped = groups.mean(data.skipped)
        axes.plot(x, skipped, ":", c=SKIPPED, lw=1.8, label="skipped steps")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_ylabel("share of steps")
    _finish(axes)


def draw_losses(axes: Axes, data: LogData, most: int = 600) -> None:
    """The loss that was logged."""
    groups = bins(len(data.step), most)
    finite = np.isfinite(data.loss)
    losses = np.where(finite, np.clip(data.loss, -LIMIT, LIMIT), data.loss)
    _band(axes, groups, data.step, losses, ("loss", LOSS, "#B2DFCB"))
    known = losses[finite]
    if known.min() > 0 and known.max() > 30 * known.min():
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    _finish(axes)


def draw_histogram(axes: Axes, data: LogData) -> None:
    """How often which norm occurred, with the threshold and percentiles."""
    norms = data.norm[np.isfinite(data.norm) & (data.norm > 0)]
    if not len(norms):
        axes.text(0.5, 0.5, "no finite norm", ha="center", transform=axes.transAxes)
        return
    low, high = np.log10(norms.min()), np.log10(norms.max())
    edges = np.logspace(low, max(high, low + 1e-3), 60)
    edges[0], edges[-1] = norms.min(), max(edges[-1], norms.max())
    axes.hist(norms, edges, color=BAND, ec=NORM, lw=0.4, label="steps")
    styles = {50: (0, (1, 1)), 95: (0, (4, 2)), 99: (0, (8, 3))}
    for percent, style in styles.items():
        value = float(np.percentile(norms, percent))
        axes.axvline(value, ls=style, c=NORM, lw=1.4, label=f"{percent}% below")
    known = data.threshold[np.isfinite(data.threshold) & (data.threshold > 0)]
    if len(known):
        first, middle, last = np.percentile(known, [5, 50, 95])
        if last > 1.001 * first:
            axes.axvspan(first, last, color=CLIPPED, alpha=0.25, lw=0)
        axes.axvline(middle, c=CLIPPED, lw=2.2, label="threshold")
    axes.set(xscale="log", yscale="log", xlabel="gradient norm", ylabel="steps")
    _log_ticks(axes.xaxis, norms.max() / norms.min())
    _finish(axes, xlabel="gradient norm")


def draw_leaves(
    axes: Axes, data: LogData, most: int = 300, name_width: int = 40
) -> Any:
    """The largest norm of each leaf in each bin; the largest leaves come first."""
    assert data.leaf_norms is not None
    groups = bins(len(data.step), most)
    leaves = largest_leaves(data)
    highest = groups.high(data.leaf_norms[:, leaves]).T
    image = axes.imshow(
        np.log10(np.where(highest > 0, highest, np.nan)),
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        extent=(data.step[0], max(data.step[-1], data.step[0] + 1), len(leaves), 0),
    )
    narrow = _is_narrow(axes)
    names = [text.shown(data.leaf_names[leaf], name_width) for leaf in leaves]
    if narrow:
        names = [_two_lines(name) for name in names]
    # A name is no formula, whatever dollars it has.
    style = {"fontsize": "small", "parse_math": False}
    axes.set_yticks(np.arange(len(leaves)) + 0.5, names, **style)
    axes.tick_params(axis="y", length=0)
    axes.set_facecolor("0.85")  # where a bin holds no number
    axes.set_xlabel("step")
    _step_ticks(axes)
    side = {"location": "bottom" if narrow else "right", "pad": 0.02, "aspect": 30}
    ticks = MaxNLocator(4 if narrow else 8)
    form = FuncFormatter(lambda y, _: f"{10**y:.3g}")
    bar = axes.figure.colorbar(image, ax=axes, ticks=ticks, format=form, **side)
    bar.set_label("gradient norm")
    return image


def largest_leaves(data: LogData) -> np.ndarray:
    """The leaves that the heat map shows, by their median norm, largest first."""
    assert data.leaf_norms is not None
    known = np.where(np.isfinite(data.leaf_norms), data.leaf_norms, np.nan)
    medians = np.nan_to_num(stats.row_medians(known.T))
    return np.argsort(-medians, kind="stable")[:LEAVES]


def _band(
    axes: Axes,
    groups: Bins,
    step: np.ndarray,
    values: np.ndarray,
    style: tuple[str, str, str],
) -> None:
    """The median of each bin and, behind it, all that lies between its extremes."""
    label, colour, band = style
    x = groups.x(step)
    if groups.size > 1:
        low, high = groups.low(values), groups.high(values)
        axes.fill_between(
            x, low, high, color=band, lw=0.5, label=f"{label}, least to largest"
        )
        label = f"{label}, median"
    # A finite step between two others that are not would vanish from a line.
    marker = "." if groups.size == 1 and len(x) < 100 else ""
    axes.plot(x, groups.median(values), c=colour, lw=1.2, marker=marker, label=label)


def _mark_bad(axes: Axes, groups: Bins, data: LogData) -> None:
    """Skipped steps, and those not finite, which have no height, along the top."""
    bad = ~np.isfinite(data.norm)
    for flags, marker, colour, label, height in [
        (data.skipped, "x", SKIPPED, "skipped", 0.97),
        (bad & ~data.skipped, "v", "#CC79A7", "NaN or infinite, not skipped", 0.92),
    ]:
        rows = groups.highest_row(np.zeros(len(bad)), flags)
        if len(rows):
            axes.plot(
                data.step[rows],
                np.full(len(rows), height),
                ls="",
                marker=marker,
                c=colour,
                ms=7,
                mew=1.8,
                label=label,
                transform=axes.get_xaxis_transform(),
            )


def _finish(axes: Axes, xlabel: str = "step") -> None:
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.3, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if xlabel == "step":
        axes.margins(x=0.01)
        _step_ticks(axes)
    axes.legend(
        fontsize="small",
        ncols=2 if _is_narrow(axes) else 3,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        frameon=False,
        borderaxespad=0.2,
    )


def _step_ticks(axes: Axes) -> None:
    """Steps as the log writes them, never as 0.5 of 1e6."""
    axes.xaxis.set_major_locator(
        MaxNLocator(3 if _is_narrow(axes) else 5, integer=True)
    )
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)


def _log_ticks(axis: Axis, span: float) -> None:
    """Ticks that do not run into each other where norms span a decade or two."""
    if span < 30:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _is_narrow(axes: Axes) -> bool:
    """Whether the figure is as wide as a phone rather than a page."""
    figure = axes.get_figure(root=True)
    return figure is not None and figure.get_figwidth() < 6


def _two_lines(name: str, width: int = 20) -> str:
    """A name that is longer broken at the slash, or else the place, in its middle."""
    if len(name) <= width:
        return name
    middle = len(name) // 2
    slashes = [place + 1 for place, letter in enumerate(name[:-1]) if letter == "/"]
    place = min(slashes, key=lambda place: abs(place - middle), default=middle)
    if max(place, len(name) - place) > len(name) * 0.7:
        place = middle
    return f"{name[:place]}\n{name[place:]}"
