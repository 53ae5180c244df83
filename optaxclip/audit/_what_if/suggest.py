"""Thresholds to try, from the norms of a run and the field's rules of thumb."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from optaxclip.audit import _text as text
from optaxclip.audit._what_if.replay import checked

SHORT = 100  # norms; fewer do not fill the smallest window
ENOUGH = 1000  # norms, from which on a 95th percentile is known well enough
SURE = 1.96  # deviations, within which a percentile lies with 95% confidence
STATIONARY = 1.5  # largest over smallest median of the quarters of a series
SPIKE = 10.0  # medians, at which a norm counts as a spike here
WINDOWS = (100, 200, 500, 1000, 2000, 5000, 10_000)


class Suggestion(NamedTuple):
    """A setting to try."""

    setting: str  # as it is written in Python
    rule: str  # as the command line has it: `constant:1.5`
    reason: str


class Suggestions(NamedTuple):
    """What :func:`suggest` proposes."""

    fixed: Suggestion
    percentile: Suggestion
    remarks: tuple[str, ...]  # why to distrust them; empty if nothing speaks against


def suggest(norms: np.ndarray) -> Suggestions:
    r"""Proposes a fixed threshold and a percentile from the norms of a run.

    The *fixed* threshold is twice the median, the factor of the Zipformer recipes, or
    the 95th percentile if that is larger, so that ordinary steps pass; and at most ten
    times the mean, the upper end of the range that Pascanu et al. found to work (half
    to ten times the average norm over a sufficiently large number of updates). As
    spikes spoil a mean, it is taken with norms cut at ten medians.

    The *percentile* is 95: a guard that clips one ordinary step in twenty. (AutoClip's
    authors advise 10, which clips nine in ten and rather normalises.) The window is the
    smallest from 100 to 10,000 in which the most spikes that the run had in so many
    steps take at most half of the :math:`\lfloor 0.05 (N - 1) \rfloor` places that
    the percentile withstands: the smaller the window, the sooner it follows a change.

    Two tests make *remarks*. A series of fewer than 100 norms does not fill the
    smallest window and has less than five norms above its 95th percentile: too few for
    advice. Of fewer than 1,000 a remark says between which norms that percentile lies
    with 95% confidence. And a series is not stationary if the medians of its four
    quarters differ by more than a factor of 1.5: too much for one fixed threshold to
    fit all of it.

    Args:
      norms: Shape (steps,), before clipping. Zeros, NaN and infinity are left out.

    Returns:
      :class:`Suggestions`, with a sentence of reasons each.

    Raises:
      ValueError: no norm is finite and above 0, or one is negative.

    Example:
      >>> import numpy as np
      >>> from optaxclip.audit import suggest
      >>> norms = np.random.default_rng(0).lognormal(sigma=0.3, size=2000)
      >>> fixed, percentile, remarks = suggest(norms)
      >>> print(fixed.setting)
      clip_by_global_norm(2.0)
      >>> print(percentile.setting)
      clip_by_percentile(95, window=100)

    References:
      Pascanu et al., `On the Difficulty of Training Recurrent Neural Networks
      <https://arxiv.org/abs/1211.5063>`_, 2013

      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks <https://arxiv.org/abs/2007.14469>`_, 2020

      Merad and Gaïffas, `Robust Stochastic Optimization via Gradient Quantile Clipping
      <https://arxiv.org/abs/2309.17316>`_, 2024
    """
    series = checked("suggest", norms).ravel().astype(np.float64)
    series = series[np.isfinite(series) & (series > 0)]
    if not len(series):
        raise ValueError(
            "`suggest(norms=...)` must hold a finite norm above 0, got none."
        )
    return Suggestions(_fixed(series), _percentile(series), tuple(_remarks(series)))


def _fixed(norms: np.ndarray) -> Suggestion:
    median, high = np.quantile(norms, [0.5, 0.95])
    mean = np.minimum(norms, SPIKE * median).mean()
    choices = {"twice the median": 2 * median, "the 95th percentile": high}
    origin = max(choices, key=lambda name: choices[name])
    threshold = choices[origin]
    if threshold > 10 * mean:
        origin, threshold = "ten times the mean", 10 * mean
    rounded = float(f"{threshold:.2g}")
    # Two digits, but not more than the ten times that are claimed.
    threshold = rounded if rounded <= 10 * mean else float(f"{0.95 * threshold:.2g}")
    return Suggestion(
        setting=f"clip_by_global_norm({threshold})",
        rule=f"constant:{threshold}",
        reason=(
            f"{origin.capitalize()} of the norms. It is {threshold / mean:.1f} times "
            f"their mean of {mean:.3g} (outliers are cut at {SPIKE:g} times the "
            "median); Pascanu et al. (2013) found 0.5 to 10 times the mean to work. It "
            f"clips {text.share(float(np.mean(norms > threshold)))} of the steps of "
            "this run."
        ),
    )


def _percentile(norms: np.ndarray) -> Suggestion:
    spikes = norms > SPIKE * np.median(norms)
    fits = [n for n in WINDOWS if _densest(spikes, n) <= _withstood(n) / 2]
    window = fits[0] if fits else WINDOWS[-1]
    densest = _densest(spikes, window)
    most = f"at most {text.count(densest, 'norm')}" if densest else "no norm"
    return Suggestion(
        setting=f"clip_by_percentile(95, window={window})",
        rule=f"quantile:0.95,{window}",
        reason=(
            "It needs no scale and clips about one ordinary step in twenty (the idea "
            "is from Seetharaman et al., 2020; Merad and Gaïffas, 2024, prove that it "
            f"copes with heavy tails and outliers). A window of {window:,} norms "
            f"tolerates {_withstood(window)} outliers; this run had {most} above "
            f"{SPIKE:g} times the median in that many steps. It adapts to a lasting "
            f"rise in about {window // 20} steps."
        ),
    )


def _withstood(window: int) -> int:
    """Spikes in a window that leave its 95th percentile at the other norms."""
    return (window - 1) // 20


def _densest(spikes: np.ndarray, window: int) -> int:
    """The most spikes in so many steps in a row."""
    sums = np.concatenate([np.zeros(window, np.int64), np.cumsum(spikes)])
    return int(np.max(sums[window:] - sums[:-window]))


def _remarks(norms: np.ndarray) -> list[str]:
    remarks = []
    if len(norms) < SHORT:
        remarks.append(
            f"{text.count(len(norms), 'norm')} are too few: a 95th percentile needs at "
            f"least {SHORT}. Record more steps before you trust these numbers."
        )
    elif len(norms) < ENOUGH:
        low, high = _confidence(norms, 0.95)
        remarks.append(
            f"The run is short: its {len(norms)} norms put the 95th percentile "
            f"somewhere between {low:.3g} and {high:.3g} (95% confidence). Take the "
            f"numbers as a first try, and ask again after {ENOUGH:,} steps."
        )
    medians = [float(np.median(part)) for part in np.array_split(norms, 4) if len(part)]
    if max(medians) > STATIONARY * min(medians):
        remarks.append(
            "The norms drift: their medians in the four quarters of the run are "
            f"{', '.join(f'{median:.3g}' for median in medians)}. No fixed threshold "
            "fits all of them; the percentile adapts."
        )
    return remarks


def _confidence(norms: np.ndarray, q: float) -> np.ndarray:
    """Two norms between which the quantile lies, whatever their distribution."""
    count = len(norms)
    spread = SURE * np.sqrt(count * q * (1 - q))  # of how many lie below it
    low, high = np.floor(count * q - spread), np.ceil(count * q + spread)
    ranks = np.clip([low - 1, high - 1], 0, count - 1).astype(int)
    return np.sort(norms)[ranks]
