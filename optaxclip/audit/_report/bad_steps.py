"""What a summary finds in steps without a usable gradient."""

import numpy as np

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.finding import Finding, at, capital
from optaxclip.audit._what_if import longest_streak

WASTED = 0.1  # share of steps skipped, from which on that is a problem


def reached_the_optimizer(data: LogData) -> Finding | None:
    """Gradients that are not finite and were not skipped."""
    bad = ~np.isfinite(data.norm)
    rows = np.flatnonzero(bad & ~data.skipped)
    if not len(rows):
        return None
    first, kind = rows[0], _kind(data.norm[rows])
    lasting = len(rows) > 1 and bad[first:].all()
    if lasting:
        title = f"The gradient is {kind} from step {data.step[first]} to the end"
    else:
        title = f"{text.count(len(rows), 'step')} with a gradient of {kind}"
    where = "" if lasting else f"{capital(text.steps(data.step[rows]))}."
    detail = (
        f"{where}{_origin(data, first)} A clip does not stop {kind}: the gradient "
        "reached the optimizer. Resume from a checkpoint of an earlier step, with the "
        "optimizer wrapped in skip_nonfinite."
    )
    steps = data.step[rows[:1] if lasting else rows]
    return Finding("problem", title, detail.lstrip(), at(steps))


def skipped(data: LogData) -> Finding | None:
    """Gradients that are not finite and did no harm."""
    rows = np.flatnonzero(data.skipped & ~np.isfinite(data.norm))
    if not len(rows):
        return None
    kind = _kind(data.norm[rows])
    was = "was" if len(rows) == 1 else "were"
    title = f"{text.count(len(rows), 'step')} with a gradient of {kind} {was} skipped"
    detail = f"{capital(text.steps(data.step[rows]))}.{_origin(data, rows[0])}"
    if kind == "infinity":
        title = f"{text.count(len(rows), 'step')} overflowed and {was} skipped"
        detail += (
            " With dynamic_loss_scale this is normal: it is how the scale is found. "
            "Expect up to fifteen such steps at the start, and later one each time the "
            "scale has grown too far."
        )
    return Finding("notice", title, detail.rstrip(), at(data.step[rows]))


def wasted(data: LogData) -> Finding | None:
    """Many skips, in a row or not."""
    share = data.skipped.mean()
    if share < WASTED:
        return None
    detail = (
        f"The model learned nothing from {data.skipped.sum():,} of "
        f"{len(data.skipped):,} steps. A few skips are a guard at work; this many mean "
        "that the data, the learning rate or the threshold of the skip needs attention."
    )
    return Finding("problem", f"{text.share(share)} of the steps were skipped", detail)


def skipping(data: LogData) -> Finding | None:
    """Many skips in a row."""
    start, length = longest_streak(data.skipped)
    if length < 10:
        return None
    end = start + length - 1
    detail = f"From step {data.step[start]} to {data.step[end]} nothing was learned."
    if end == len(data.step) - 1:
        detail += " The run ends with these skips: it may never recover on its own."
    steps = at(data.step[[start, end]])
    return Finding("problem", f"{length:,} steps skipped in a row", detail, steps)


def zero(data: LogData) -> Finding | None:
    """No gradient at all."""
    if stats.statistics(data).largest_norm != 0:
        return None
    detail = "Nothing was learned: probably no gradient reaches the clip."
    return Finding("problem", "Every norm was 0", detail)


def loss(data: LogData) -> Finding | None:
    """An infinite loss."""
    infinite = np.isinf(data.loss)
    if not infinite.any():
        return None
    where = data.step[infinite]
    detail = f"{capital(text.steps(where))}."
    return Finding("notice", "The loss was infinite", detail, at(where))


def _origin(data: LogData, row: int) -> str:
    """Where a gradient that is not finite comes from, as far as the log knows."""
    parts, kind = [], "NaN" if np.isnan(data.norm[row]) else "infinite"
    if leaves := stats.nonfinite_leaves(data, row):
        only = (
            "only " if len(leaves) <= stats.NAMED and leaves != data.leaf_names else ""
        )
        parts.append(f"the gradient was {kind} {only}in {stats.in_words(data, leaves)}")
    loss, advice = data.loss[row], ""
    if np.isfinite(data.loss).any():
        was = "NaN" if np.isnan(loss) else "infinite" if np.isinf(loss) else "finite"
        parts.append(f"the loss was {was}")
        if was != "finite":
            advice = ": look at the batch of that step and at the loss function"
        elif kind == "NaN":
            advice = ": look at the backward pass, for example for the square root of 0"
    if not parts:
        return ""
    return f" At step {data.step[row]} {' and '.join(parts)}{advice}."


def _kind(norms: np.ndarray) -> str:
    nan = np.isnan(norms)
    return "NaN" if nan.all() else "NaN or infinity" if nan.any() else "infinity"
