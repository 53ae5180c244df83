"""The plots of a report: SVG in two widths, each with a caption and a text for it."""

import io
import warnings
from collections.abc import Callable
from functools import partial

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import figures, page
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.decimate import bins

Draw = Callable[[Axes, LogData], object]

# In inches of 96 CSS pixels: as wide as the page on a desk, and on a phone, so that
# text is shown in about the size in which it is drawn.
WIDE, NARROW = 9.2, 3.8
POINTS = 600  # on the axis of steps of a wide picture; half as many in a narrow one


def pictures(data: LogData) -> str:
    """The plots that the log has data for, as HTML."""
    parts = [_norms(data), _histogram(data), _shares(data)]
    if data.leaf_norms is not None and np.isfinite(data.leaf_norms).any():
        parts.append(_leaves(data))
    if np.isfinite(data.loss).any():
        parts.append(_losses(data))
    return "\n".join(parts)


def _norms(data: LogData) -> str:
    s = stats.statistics(data)
    alt = (
        f"Gradient norm and threshold over {_span(data)} on a logarithmic scale. "
        f"Norms: median {text.number(s.median_norm)}, largest "
        f"{text.number(s.largest_norm)} at step {s.largest_norm_step}. Threshold: "
        f"median {text.number(s.median_threshold)}. Marked: "
        f"{text.count(s.clipped, 'clipped step')}, "
        f"{text.count(s.skipped, 'skipped step')}, {s.nonfinite:,} not finite."
    )
    caption = (
        f"{_decimation(data)} Dots: clipped steps, at the norm before clipping. "
        "Crosses along the top: skipped steps. Triangles: steps with a norm of NaN or "
        "infinity that were not skipped."
    )
    return page.picture(
        *_drawn(data, (4.2, 3.6), figures.draw_norms, _points(figures.draw_norms)),
        alt,
        "Norm and threshold",
        caption,
    )


def _histogram(data: LogData) -> str:
    s = stats.statistics(data)
    alt = (
        f"Histogram of the norms of {text.count(s.steps - s.nonfinite, 'step')}: half "
        f"below {text.number(s.median_norm)}, 95% below {text.number(s.p95_norm)}, "
        f"99% below {text.number(s.p99_norm)}, largest {text.number(s.largest_norm)}; "
        f"median threshold {text.number(s.median_threshold)}."
    )
    caption = (
        "The number of steps by norm; both axes are logarithmic. Orange: the median "
        "threshold, with a band from its 5th to its 95th percentile if it moved."
    )
    draws = [figures.draw_histogram] * 2
    return page.picture(
        *_drawn(data, (3.4, 3.4), *draws), alt, "Histogram of norms", caption
    )


def _shares(data: LogData) -> str:
    s = stats.statistics(data)
    alt = (
        f"Share of clipped and of skipped steps over {_span(data)}: "
        f"{text.share(s.clipped_share)} clipped and "
        f"{text.share(s.skipped / s.steps)} skipped overall."
    )
    groups = bins(s.steps, 150, least_size=min(20, s.steps))
    caption = f"Each point is the share among {text.count(groups.size, 'step')}."
    draws = [figures.draw_shares, partial(figures.draw_shares, most=75)]
    caption = caption.replace("Each", "On a wide screen each")
    return page.picture(
        *_drawn(data, (2.7, 2.7), *draws), alt, "Share of clipped steps", caption
    )


def _leaves(data: LogData) -> str:
    assert data.leaf_norms is not None
    largest = figures.largest_leaves(data)
    names = [data.leaf_names[leaf] for leaf in largest]
    known = data.leaf_norms[np.isfinite(data.leaf_norms)]
    shown = (
        f"the {len(names)} of {len(data.leaf_names)} parameters with the largest norms"
    )
    if len(names) == len(data.leaf_names):
        shown = f"all {len(names)} parameters"
    alt = (
        f"Heat map of the gradient norms of {shown} over {_span(data)}, from "
        f"{text.number(float(known.min()))} to {text.number(float(known.max()))}. "
        f"Largest median: {', '.join(names[:3])}."
    )
    caption = (
        f"The largest norm in each stretch of steps, for {shown}, sorted by median "
        "norm. Brighter is larger; gray means NaN or infinity."
    )
    if stats.leaves_are_scaled(data):
        caption += " They were recorded before the loss scale was divided out."
    draws = [figures.draw_leaves, partial(figures.draw_leaves, most=150)]
    heights = 1.1 + 0.22 * len(names), 1.5 + 0.3 * len(names)
    return page.picture(
        *_drawn(data, heights, *draws), alt, "Gradient norm of each parameter", caption
    )


def _losses(data: LogData) -> str:
    known = data.loss[np.isfinite(data.loss)]
    alt = (
        f"Loss over {_span(data)}: first {text.number(float(known[0]))}, last "
        f"{text.number(float(known[-1]))}, smallest "
        f"{text.number(float(known.min()))}, largest {text.number(float(known.max()))}."
    )
    draws = [figures.draw_losses, _points(figures.draw_losses)]
    return page.picture(
        *_drawn(data, (3.0, 3.0), *draws), alt, "Loss", _decimation(data)
    )


def _points(draw: Callable[..., object]) -> Draw:
    return partial(draw, most=POINTS // 2)


def _span(data: LogData) -> str:
    return f"steps {data.step[0]} to {data.step[-1]}"


def _decimation(data: LogData) -> str:
    size = bins(len(data.step), POINTS).size
    if size == 1:
        return "Every step is drawn."
    return (
        f"The line is the median of every {size:,} steps (twice as many on a phone), "
        "the band spans their smallest to their largest: no extreme is left out."
    )


def _drawn(
    data: LogData, heights: tuple[float, float], wide: Draw, narrow: Draw
) -> tuple[bytes, bytes]:
    return (
        _svg(data, (WIDE, heights[0]), wide),
        _svg(data, (NARROW, heights[1]), narrow),
    )


def _svg(data: LogData, size: tuple[float, float], draw: Draw) -> bytes:
    # Not in the style of the notebook it may be called from, and the same every time.
    style = ["default", {"svg.hashsalt": "optaxclip"}]
    with matplotlib.style.context(style), warnings.catch_warnings():
        # A letter of a leaf's name that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), data)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
