"""Parts of the adaptive rules: how one starts, and what becomes of an outlying norm.

The *response* (what a norm beyond the bound is clipped to) and the *record* (what is
remembered in its place) of :func:`optaxclip.zscore` and :func:`optaxclip.ema` are any
of :func:`at_bound`, :func:`at_mean`, :func:`reciprocal`, :func:`unchanged`, or a
function ``(norm, mean, bound) -> value`` of your own. The *start* is
:func:`quartiles` or :func:`moments` for ``zscore``, :func:`smallest` or
:func:`average` for ``ema``.
"""

from optaxclip._thresholds import at_bound as at_bound
from optaxclip._thresholds import at_mean as at_mean
from optaxclip._thresholds import average as average
from optaxclip._thresholds import moments as moments
from optaxclip._thresholds import quartiles as quartiles
from optaxclip._thresholds import reciprocal as reciprocal
from optaxclip._thresholds import smallest as smallest
from optaxclip._thresholds import unchanged as unchanged

__all__ = [
    "at_bound",
    "at_mean",
    "average",
    "moments",
    "quartiles",
    "reciprocal",
    "smallest",
    "unchanged",
]
