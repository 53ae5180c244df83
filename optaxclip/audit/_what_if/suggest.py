"""Clips to try, from the norms of a run and from what trained best elsewhere."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData, read
from optaxclip.audit._what_if.compare import Outcome, compare
from optaxclip.audit._what_if.replay import Norms, checked
from optaxclip.audit._what_if.rule_text import parse_rule

SHORT = 100  # norms; fewer do not even end the ramp of the default
ENOUGH = 1000  # norms, which fill its window
SURE = 1.96  # deviations, within which a quantile lies with 95% confidence
STATIONARY = 1.5  # largest over smallest median of the quarters of a series
ADAPTIVE = "clip_by_percentile()"

# Optimizers whose step does not depend on the scale of the gradient, and the others.
_SCALE_FREE = (
    r"\b([nr]?adam|lion|muon|lamb|rmsprop|adagrad|adan|adabelief|yogi|novograd|shampoo)"
)
_SCALED = r"\b(sgd|momentum|nesterov|lars)"


class Suggestion(NamedTuple):
    """A setting to try."""

    setting: str  #: as it is written in Python
    rule: str  #: for the command line, such as ``constant:1.5``
    reason: str  #: why this setting


class Suggestions(NamedTuple):
    """What :func:`suggest` proposes."""

    fixed: Suggestion  #: a fixed threshold
    percentile: Suggestion  #: a clip that chooses its threshold
    #: why not to trust them; empty if there is no such reason
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for suggestion in (self.fixed, self.percentile):
            lines += [suggestion.setting, text.indented(suggestion.reason)]
        cautions = ["Caution:", *map(text.indented, self.remarks)]
        return "\n".join(lines + cautions if self.remarks else lines)

    def __repr__(self) -> str:
        return str(self)


def suggest(norms: Norms, optimizer: str = "") -> Suggestions:
    r"""Proposes a fixed threshold and one that adapts, from the norms of a run.

    Both come from ``benchmarks/which_clip.py``, which compares clips on eleven tasks
    with six optimizers (``docs/choosing.md`` has the table).

    The *percentile* is :func:`optaxclip.clip_by_percentile` with its defaults. There is
    nothing to choose; its reason says what it would have done in this run.

    The *fixed* threshold is the median of the norms. Among fixed multiples of the
    median it is the one whose worst result was best. Larger ones let the large
    gradients of the first steps into Adam's second moment, and smaller ones slow SGD
    down.

    Two tests make *remarks*. Fewer than 100 norms are too few for advice. With fewer
    than 1,000, a remark says between which two norms the median lies with 95%
    confidence. And the norms drift if the medians of the four quarters of the run
    differ by more than a factor of 1.5: then no fixed threshold fits all of it.

    Args:
      norms: A log, as a path or as :func:`read` returns it; or an array of shape
        (steps,), before clipping. NaN and infinity are left out, and so are zeros when
        the median is taken.
      optimizer: A text that names the optimizer, such as ``"adamw"`` or
        ``"chain(clip, sgd)"``. By default, what the log says about it. The
        reason for the fixed threshold says what to expect with this optimizer. If
        the optimizer is unknown, it says what to expect with Adam and with SGD.

    Returns:
      :class:`Suggestions`, each with its reason: print them, or take them apart.

    Raises:
      ValueError: no norm is finite and above 0, or one is negative.

    Example:
      >>> import numpy as np
      >>> from optaxclip.audit import suggest
      >>> norms = np.random.default_rng(0).lognormal(sigma=0.3, size=2000)
      >>> fixed, percentile, remarks = suggest(norms, optimizer="adamw")
      >>> print(fixed.setting)
      clip_by_global_norm(0.99)
      >>> print(percentile.setting)
      clip_by_percentile()

    References:
      Pascanu et al., `On the Difficulty of Training Recurrent Neural Networks
      <https://arxiv.org/abs/1211.5063>`_, 2013, who found thresholds from half to ten
      times the average norm to work
    """
    return advice(norms, {}, optimizer)[0]


def advice(
    norms: Norms, others: Mapping[str, str], optimizer: str = ""
) -> tuple[Suggestions, tuple[Outcome, ...]]:
    """What `suggest` says, and what its two settings and other rules would have done.

    The others are texts of rules, by name; what is replayed is replayed once.
    """
    if isinstance(norms, LogData | str | os.PathLike):
        norms = read(norms)
        optimizer = optimizer or _optimizer_of(norms)
    series = checked("suggest", norms).ravel()
    known = series[np.isfinite(series) & (series > 0)].astype(np.float64)
    if not len(known):
        raise ValueError(
            "`suggest(norms=...)` must hold a finite norm above 0, got none."
        )
    threshold = float(f"{np.median(known):.2g}")
    fixed = f"clip_by_global_norm({threshold})"
    rules = {fixed: f"constant:{threshold}", ADAPTIVE: ADAPTIVE.removesuffix("()")}
    texts = {**rules, **others}
    outcomes = compare({name: _rule(texts[name]) for name in texts}, series)
    of_fixed, of_adaptive, *_ = outcomes
    suggestions = Suggestions(
        Suggestion(fixed, rules[fixed], _fixed(of_fixed, optimizer.lower())),
        Suggestion(ADAPTIVE, rules[ADAPTIVE], _adaptive(of_adaptive)),
        tuple(_remarks(known)),
    )
    return suggestions, outcomes


# The same object for the same text, so that runs of one length compile it once.
_rule = functools.lru_cache(parse_rule)


def _optimizer_of(data: LogData) -> str:
    """What a log says of its optimizer: the transformation and all texts beside it."""
    beside = data.metadata.get("hyperparameters")
    beside = beside.values() if isinstance(beside, dict) else ()
    told = [data.metadata.get("transform"), *beside]
    return " ".join(x for x in told if isinstance(x, str))


def _fixed(did: Outcome, optimizer: str) -> str:
    adam = (
        "An optimizer that divides by the size of the gradient, such as Adam, trains "
        "about as well with any smaller threshold, and worse with a larger one."
    )
    sgd = (
        f"With SGD the clip multiplies steps by {did.mean_scale:.2f} on average, so "
        "tune the learning rate together with it; a threshold up to five times as "
        "large may train faster."
    )
    advice = f"{adam} {sgd}"
    if re.search(_SCALE_FREE, optimizer):
        advice = adam
    elif re.search(_SCALED, optimizer):
        advice = sgd
    return (
        f"The median of the norms; it clips {text.share(did.clipped_share)} of the "
        "steps of this run. On eleven tasks the median was at most 1.9% worse than the "
        f"best of nine fixed thresholds. {advice}"
    )


def _adaptive(did: Outcome) -> str:
    return (
        "There is nothing to choose: the threshold is 1.5 times the 10th percentile of "
        "the last 1,000 norms, and rises to that over the first 100 steps. On eleven "
        "tasks it was at most 3.3% worse than the best of nine fixed thresholds, and "
        f"0.2% on average. It would have clipped {text.share(did.clipped_share)} of "
        f"the steps of this run and multiplied them by {did.mean_scale:.2f} on average."
    )


def _remarks(norms: np.ndarray) -> list[str]:
    remarks = []
    if len(norms) < SHORT:
        remarks.append(
            f"{text.count(len(norms), 'norm')} {'is' if len(norms) == 1 else 'are'} "
            f"too few: a run shows its usual norm after {SHORT} steps or more. Record "
            "more before you trust these numbers."
        )
    elif len(norms) < ENOUGH:
        low, high = confidence(norms, 0.5)
        remarks.append(
            f"The run is short: its {len(norms)} norms put the median somewhere "
            f"between {low:.3g} and {high:.3g} (95% confidence). Take the numbers as a "
            f"first try, and ask again after {ENOUGH:,} steps."
        )
    medians = [float(np.median(part)) for part in np.array_split(norms, 4) if len(part)]
    if max(medians) > STATIONARY * min(medians):
        remarks.append(
            "The norms drift: their medians in the four quarters of the run are "
            f"{', '.join(f'{median:.3g}' for median in medians)}. No fixed threshold "
            "fits all of them; the percentile adapts."
        )
    return remarks


def confidence(norms: np.ndarray, q: float) -> np.ndarray:
    """Two norms between which the quantile lies, whatever their distribution."""
    count = len(norms)
    spread = SURE * np.sqrt(count * q * (1 - q))  # of how many lie below it
    low, high = np.floor(count * q - spread), np.ceil(count * q + spread)
    ranks = np.clip([low - 1, high - 1], 0, count - 1).astype(int)
    return np.sort(norms)[ranks]
