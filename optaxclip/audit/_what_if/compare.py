"""Several rules on the norms of one run, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from optaxclip._thresholds import Rule, Threshold
from optaxclip.audit import _text as text
from optaxclip.audit._what_if.replay import Norms, checked, replay

RISE = 2.0  # the probe: norms so many times as large, for good
_PROBE_STEPS = 5000  # how long it lasts before a rule is said never to recover
_TAIL = 1000  # how many of the last norms it repeats
_WINDOW = 100  # mean scales are taken over so many steps
_RECOVERED = 0.9  # of the usual mean scale


class Outcome(NamedTuple):
    """What a rule did in a run. Steps with a norm of NaN or infinity are left out."""

    name: str  #: of the rule
    clipped_share: float  #: steps with a scale below 1, in [0, 1]
    mean_scale: float  #: over the steps
    largest_passed: float  #: the largest norm after clipping
    longest_streak: int  #: most steps clipped in a row
    #: see :func:`compare`; infinite for never, NaN for not probed
    recovery_steps: float


def compare(rules: Mapping[str, Threshold | Rule], norms: Norms) -> tuple[Outcome, ...]:
    r"""Replays several rules and sums up what each would have done.

    *Steps to recover* are those of a probe, the same for every rule: after the run, its
    last 1,000 norms are played again, and again, twice as large. A rule has recovered
    at the first step from which the mean scale of 100 steps is 90% of what it was over
    those 1,000 norms. The probe ends after 5,000 steps. A rule that has not recovered
    by then counts as one that never does, such as a fixed threshold between the old
    norms and the new ones.

    Args:
      rules: From a name to a number, an array of shape (), a schedule or a rule.
      norms: A log or an array of shape (steps,), as in :func:`replay`.

    Returns:
      An :class:`Outcome` for each rule, in their order. If no norm is finite, shares,
      scales and norms are NaN.

    Raises:
      ValueError: ``norms`` is not one-dimensional, or has a negative element.

    Example:
      >>> import numpy as np
      >>> import optaxclip
      >>> from optaxclip.audit import compare, outcome_table
      >>> norms = np.random.default_rng(0).lognormal(sigma=0.3, size=2000)
      >>> norms[1500] = 300.0
      >>> rules = {"fixed": 1.5, "percentile": optaxclip.quantile(0.95, 200)}
      >>> print(outcome_table(compare(rules, norms)))
      rule        clipped  mean scale  largest passed  longest streak  recovers in
      fixed          8.6%       0.990             1.5               3        never
      percentile     5.9%       0.993           1.781               3      0 steps
    """
    series = checked("compare", norms)
    if series.ndim != 1:
        raise ValueError(
            f"`compare(norms=...)` must have the shape (steps,), got {series.shape}."
        )
    return tuple(_replayed(name, rule, series) for name, rule in rules.items())


def outcome(
    name: str,
    norms: np.ndarray,
    scales: np.ndarray,
    clipped: np.ndarray | None = None,
) -> Outcome:
    """The outcome of norms and scales as they were recorded: without a probe.

    ``clipped`` tells clipped steps from skipped ones, of which the scale is 0 too.
    """
    finite = np.isfinite(norms)
    flags = np.asarray(scales < 1 if clipped is None else clipped)[finite]
    norms, scales = np.asarray(norms)[finite], np.asarray(scales)[finite]
    if not len(norms):
        return Outcome(name, np.nan, np.nan, np.nan, 0, np.nan)
    return Outcome(
        name,
        clipped_share=float(flags.mean()),
        mean_scale=float(scales.mean(dtype=np.float64)),
        largest_passed=float(np.max(norms * scales)),
        longest_streak=longest_streak(flags)[1],
        recovery_steps=np.nan,
    )


def streaks(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last row of each run of true flags."""
    edges = np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1


def longest_streak(flags: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of true flags; (0, 0) if none is true."""
    first, last = streaks(flags)
    lengths = last - first + 1
    longest = int(np.argmax(lengths)) if len(lengths) else 0
    return (int(first[longest]), int(lengths[longest])) if len(lengths) else (0, 0)


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table of plain text, a line a rule."""
    rows = [HEADER, *map(cells, outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [
        "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join(
        f"{row[0]:{widths[0]}}{rest}" for row, rest in zip(rows, numbers, strict=True)
    )


HEADER = (
    *("rule", "clipped", "mean scale"),
    *("largest passed", "longest streak", "recovers in"),
)


def cells(outcome: Outcome) -> tuple[str, ...]:
    """An outcome as the texts of a table's row."""
    never = np.isinf(outcome.recovery_steps)
    return (
        outcome.name,
        text.share(outcome.clipped_share),
        _known(outcome.mean_scale, ".3f"),
        _known(outcome.largest_passed, ".4g"),
        f"{outcome.longest_streak:,}",
        "never" if never else _known(outcome.recovery_steps, ",.0f", " steps"),
    )


def _known(value: float, form: str, unit: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{form}}{unit}"


def _replayed(name: str, rule: Threshold | Rule, norms: np.ndarray) -> Outcome:
    finite = np.flatnonzero(np.isfinite(norms))
    tail = finite[-_TAIL:]
    with np.errstate(over="ignore"):
        risen = RISE * norms[tail]
    probe = np.resize(risen, (_PROBE_STEPS + _WINDOW) * (len(tail) > 0))
    scales = replay(rule, np.concatenate([norms, probe])).scales
    run, probed = scales[: len(norms)], scales[len(norms) :]
    recovery = _recovery(run[tail].mean(), probed) if len(tail) else np.nan
    return outcome(name, norms, run)._replace(recovery_steps=recovery)


def _recovery(usual: float, scales: np.ndarray) -> float:
    sums = np.concatenate([[0.0], np.cumsum(scales, dtype=np.float64)])
    means = (sums[_WINDOW:] - sums[:-_WINDOW]) / _WINDOW
    recovered = np.flatnonzero(means >= _RECOVERED * usual)
    return float(recovered[0]) if len(recovered) else np.inf
