"""Regret: what a clip loses to the best of the constants, and how sure that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray
DRAWS = 2000  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Regret:
    """Of one clip on one task; positive where the best constant is better."""

    at_best_rates: float  # in the unit of the task
    in_errors: float  # the same in standard errors
    in_percent: float  # the same, of what the best constant learns
    at_same_rate: float  # at the clip's worst rate, both at that rate; in percent
    share_clipped: float  # at its own best rate


def values(result: Mapping[str, Any]) -> Array:
    """Values at the end of the runs: rates, seeds."""
    return np.asarray(result["value"], float)


def constants(record: Mapping[str, Any]) -> Array:
    """Of a task: thresholds, rates, seeds."""
    return np.stack([values(result) for result in record["constants"].values()])


def best(values_CRS: Array) -> tuple[int, int]:
    """Of thresholds (or any clips) and rates, those with the lowest mean."""
    means_CR = values_CRS.mean(-1)
    clip, rate = np.unravel_index(means_CR.argmin(), means_CR.shape)
    return int(clip), int(rate)


def regret(record: Mapping[str, Any], result: Mapping[str, Any]) -> Regret:
    """Of a clip's result on the task of the record."""
    clip_RS, fixed_CRS = values(result), constants(record)
    rate = int(clip_RS.mean(-1).argmin())
    chosen_S, best_S = clip_RS[rate], fixed_CRS[best(fixed_CRS)]
    lost = float(chosen_S.mean() - best_S.mean())
    learned = record["worst"] - best_S.mean()
    same_R = clip_RS.mean(-1) - fixed_CRS.mean(-1).min(0)
    return Regret(
        at_best_rates=lost,
        in_errors=_in_errors(lost, chosen_S, best_S),
        in_percent=100 * lost / learned,
        at_same_rate=float(100 * same_R.max() / learned),
        share_clipped=float(np.mean(result["share_clipped"][rate])),
    )


def _in_errors(lost: float, first_S: Array, second_S: Array) -> float:
    """In standard errors of the difference: seeds are pairs, of one model and data."""
    error = standard_error(first_S - second_S)
    return 0.0 if lost == 0 else float(lost / max(error, 1e-12))


def standard_error(values_S: Array) -> float:
    return float(values_S.std(ddof=1) / np.sqrt(len(values_S)))


def bootstrap(
    records: Mapping[str, Mapping[str, Any]], clip: str, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Worst and mean regret over tasks, each with its 95% interval.

    Seeds are drawn again within each task, the same for the clip and the constants; the
    best constant and the best rates are chosen anew in every draw.

    Args:
      records: By task.
      clip: The name of a clip in each record.
      seed: Of the draws.

    Returns:
      For ``worst`` and ``mean``, in percent of what the best constant learns: the
      estimate and the ends of its interval.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        _draws(record, values(record["clips"][clip]), rng)
        for record in records.values()
    ]
    percent_TD = np.stack(drawn)  # tasks, draws; the first draw is the data itself
    summaries = {"worst": percent_TD.max(0), "mean": percent_TD.mean(0)}
    return {
        name: (float(x_D[0]), *map(float, np.percentile(x_D[1:], [2.5, 97.5])))
        for name, x_D in summaries.items()
    }


def _draws(
    record: Mapping[str, Any], clip_RS: Array, rng: np.random.Generator
) -> Array:
    fixed_CRS = constants(record)
    seeds = clip_RS.shape[-1]
    draws_DS = rng.integers(seeds, size=(DRAWS, seeds))
    draws_DS = np.concatenate([np.arange(seeds)[None], draws_DS])
    clip_D = clip_RS[:, draws_DS].mean(-1).min(0)
    fixed_D = fixed_CRS[:, :, draws_DS].mean(-1).min((0, 1))
    return 100 * (clip_D - fixed_D) / (record["worst"] - fixed_D)
