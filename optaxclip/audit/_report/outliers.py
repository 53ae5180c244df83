"""What a summary finds in spikes, and in parameters larger than all others."""

import collections

import numpy as np

from optaxclip.audit import _text as text
from optaxclip.audit._log import LogData
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.finding import Finding, at, capital

LEADS = 0.75  # share of the spikes
DOMINANT = 0.9  # share of the squared norm: the others change the norm by 5% at most


def spikes(data: LogData) -> Finding | None:
    """Norms far above those around them, and whether the clip held them."""
    rows = stats.spikes(data)
    if not len(rows):
        return None
    usual = stats.usual_norm(data)[rows]
    times = data.norm[rows] / usual
    after = data.norm[rows] * data.scale[rows] / usual
    passed = (after >= stats.SPIKE) & ~data.skipped[rows]
    worst = int(np.argmax(times))
    number, steps = text.count(len(rows), "spike"), text.steps(data.step[rows])
    detail = (
        f"{capital(steps)} had {'a norm' if len(rows) == 1 else 'norms'} at least "
        f"{stats.SPIKE:g} times as large as in the steps around "
        f"{'it: ' if len(rows) == 1 else 'them: up to '}"
        f"{text.number(times[worst])} times as large"
    )
    detail += "." if len(rows) == 1 else f", at step {data.step[rows[worst]]}."
    where = at(data.step[rows])
    if not passed.any():
        title = f"{number}, {_held(data.skipped[rows])}"
        return Finding("notice", title, detail, where)
    if passed.all():
        title = f"{number} reached the optimizer"
    else:
        title = f"{passed.sum():,} of {number} reached the optimizer"
        detail += f" Not held back: {text.steps(data.step[rows][passed])}."
    lower = "Even after the clip the norm was at least "
    lower += f"{stats.SPIKE:g} times the usual norm. A lower threshold would cut such "
    lower += "spikes down to an ordinary size"
    if np.isinf(data.threshold[rows[passed]]).all():
        lower = "There was no threshold. A fixed one would cut such spikes down"
    adaptive = "; so would one that adapts, such as clip_by_percentile."
    detail += f" {lower}{'.' if stats.moves(data) else adaptive}"
    return Finding("problem", title, detail, at(data.step[rows[passed]]))


def _held(skipped: np.ndarray) -> str:
    how = "skipped" if skipped.all() else "clipped or skipped"
    how = how if skipped.any() else "clipped"
    return f"all {how}" if len(skipped) > 1 else how


def dominating_leaf(data: LogData) -> Finding | None:
    """A parameter that the norm, or the spikes, are made of."""
    shares = stats.leaf_shares(data)
    if (
        data.leaf_norms is None
        or shares is None
        or shares.shape[1] < 3
        or not len(shares)
    ):
        return None
    often = np.mean(shares > DOMINANT, axis=0)
    leaf = int(np.argmax(often))
    if often[leaf] >= 0.5:
        detail = (
            f"In {text.share(float(often[leaf]))} of the steps "
            f"{data.leaf_names[leaf]} holds more than {text.share(DOMINANT)} of the "
            "squared norm, so a clip of the global norm sees little else. Clip this "
            "parameter by itself, or every parameter by its own norm."
        )
        return Finding("notice", "One parameter dominates the norm", detail)
    rows = stats.spikes(data)
    leaders = [stats.largest_leaf(data, row) for row in rows]
    if len(leaders) < 3:
        return None
    leader, times = collections.Counter(leaders).most_common(1)[0]
    if not leader or times < LEADS * len(leaders):
        return None
    # Or it is the largest in every step, and its lead in the spikes tells nothing.
    largest = np.argmax(np.nan_to_num(data.leaf_norms), axis=1)
    if np.mean(largest == data.leaf_names.index(leader)) > 0.5:
        return None
    detail = (
        f"{leader} has the largest norm in {times:,} of the {len(leaders):,} spikes."
    )
    steps = at(data.step[rows])
    return Finding("notice", "The spikes come from one parameter", detail, steps)
