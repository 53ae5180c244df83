"""Still pictures of a page: for paper, and where scripts do not run."""

import base64
import html
import io
import re
import warnings
from collections.abc import Mapping

import matplotlib.style

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import figures
from optaxclip.audit._report import statistics as stats


def image(runs: Mapping[str, LogData], style: str = "max-width: 100%") -> str:
    """An ``img`` element that holds the plot of runs; ``style`` is its CSS."""
    alt = html.escape(alternative(runs))
    return f'<img src="{uri(runs)}" alt="{alt}" style="{style}">'


def uri(runs: Mapping[str, LogData]) -> str:
    """The plot of runs in SVG, as an address that holds all of it."""
    # Not in the style of the notebook it may be called from, and the same every time.
    style = ["default", {"svg.hashsalt": "optaxclip"}]
    with matplotlib.style.context(style), warnings.catch_warnings():
        # A letter of a leaf's name that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        file = io.BytesIO()
        options = {"metadata": {"Date": None, "Creator": None}, "transparent": True}
        figures.plot(runs).savefig(file, format="svg", **options)
    # A tenth of a point is enough for a line; Matplotlib writes a millionth.
    svg = re.sub(rb' d="[^"]*"', _rounded, file.getvalue())
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _rounded(path: re.Match[bytes]) -> bytes:
    return re.sub(rb"(\.\d)\d+", rb"\1", path[0])


def alternative(runs: Mapping[str, LogData]) -> str:
    """What the plot of runs shows, for who cannot see it."""
    parts = ["Gradient norm, threshold, share of clipped steps and loss by step."]
    for name, data in runs.items():
        s = stats.statistics(data)
        parts.append(
            f"{f'{text.shown(name)}: s' if name else 'S'}teps {s.first_step} to "
            f"{s.last_step}; median norm {text.number(s.median_norm)}, largest "
            f"{text.number(s.largest_norm)} at step {s.largest_norm_step}; median "
            f"threshold {text.number(s.median_threshold)}; {s.clipped:,} clipped, "
            f"{s.skipped:,} skipped, {s.nonfinite:,} not finite."
        )
    return " ".join(parts)
