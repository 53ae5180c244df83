"""Clips and rules from the literature, each a short file on the kernel.

They keep the contracts of the rest of the package. In the study *which clip, when* none
of them was better than :func:`optaxclip.clip_by_percentile`: try that first.

=================================  ====================================================
function                           what it bounds
=================================  ====================================================
:func:`smooth_clip`                the norm, gradually instead of at a corner
:func:`limit_growth`               how fast the norm of a leaf may grow (Fira, APOLLO)
:func:`clippy`                     updates, element by element, against parameters
:func:`sketched_quantile`          a rule: a quantile of an endless history (DDSketch)
:func:`adagn`                      nothing: it sets norms to their running mean (AdaGN)
:func:`clip_coordinate_spikes`     each element against its own second moment (SPAM)
:func:`with_error_feedback`        any clip, with what it cut off added later (U-Clip)
=================================  ====================================================
"""

from optaxclip.contrib._adagn import AdagnState as AdagnState
from optaxclip.contrib._adagn import adagn as adagn
from optaxclip.contrib._clippy import clippy as clippy
from optaxclip.contrib._coordinates import CoordinateState as CoordinateState
from optaxclip.contrib._coordinates import (
    clip_coordinate_spikes as clip_coordinate_spikes,
)
from optaxclip.contrib._feedback import FeedbackState as FeedbackState
from optaxclip.contrib._feedback import with_error_feedback as with_error_feedback
from optaxclip.contrib._growth import limit_growth as limit_growth
from optaxclip.contrib._sketch import SketchState as SketchState
from optaxclip.contrib._sketch import sketched_quantile as sketched_quantile
from optaxclip.contrib._smooth import smooth_clip as smooth_clip

__all__ = [
    "AdagnState",
    "CoordinateState",
    "FeedbackState",
    "SketchState",
    "adagn",
    "clip_coordinate_spikes",
    "clippy",
    "limit_growth",
    "sketched_quantile",
    "smooth_clip",
    "with_error_feedback",
]
