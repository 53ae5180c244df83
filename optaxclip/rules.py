"""Parts of the adaptive rules: how one starts, and what becomes of an outlying norm.

The rules :func:`optaxclip.zscore` and :func:`optaxclip.ema` treat a norm beyond their
bound in two ways: the *response* is what it is clipped to, the *record* is what is
remembered in its place. Either can be :func:`at_bound`, :func:`at_mean`,
:func:`reciprocal`, :func:`unchanged`, or your own function ``(norm, mean, bound) ->
value``. The *start* is :func:`quartiles` or :func:`moments` for ``zscore``, and
:func:`smallest` or :func:`average` for ``ema``.
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
