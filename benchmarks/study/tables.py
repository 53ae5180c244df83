"""The study's record, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from study.clips import DEFAULT, LITERATURE, PER_PARAMETER
from study.regret import Regret, best, bootstrap, constants, regret, standard_error

Record = Mapping[str, Any]  # of a task
Row = dict[str, Any]

UNCLIPPED = "no clip"

NOTE = """\
*Regret* is the final value of a clip, at the best of its three learning rates, minus
that of the best of nine constants at the best of the same rates, a mean over seeds.
Below 0 the clip is better than every constant. On each task: in the unit of the task,
and in parentheses in standard errors of the difference, seed by seed. *Worst* and
*mean* are over the tasks, in percent of what the best constant learns (the value of a
model that knows nothing, minus its own), with 95% intervals of a bootstrap over
seeds, in which the best constant and the best rates are chosen anew; with 4 seeds
these are too narrow. *At the same rate*: the worst task and rate, where clip and
constant train at that rate. A run that diverged counts as one that knows nothing.
`k x Pp of N, ramp R` is k times the p-th percentile of the last N norms, the current
one included, and rises to that over the first R steps. The default was chosen on the
tasks that are not held out; it and all rates were fixed before the first run of the
others. The rules from the literature were run later, with their defaults, and only on
some tasks: a dash is a task that a rule was not run on."""


def with_constants(record: Record) -> Record:
    """The record with a clip for each constant and for none, beside the others."""
    fixed = {f"constant, {k} x median": r for k, r in record["constants"].items()}
    clips = {UNCLIPPED: record["none"], **fixed, **record["clips"]}
    return {**record, "clips": clips}


def tables(records: Mapping[str, Record]) -> list[tuple[str, list[Row], Row]]:
    """Title, rows and columns of each."""
    chosen_on = {task: r for task, r in records.items() if not r["held_out"]}
    done = {task: with_constants(record) for task, record in records.items()}
    everywhere = set.intersection(*(set(r["clips"]) for r in done.values()))
    everywhere -= set(LITERATURE)
    named = [clip for clip in next(iter(done.values()))["clips"] if clip in everywhere]
    made = [("Clips", regret_rows(records, named), regret_columns(records))]
    if chosen_on:
        first = next(iter(chosen_on.values()))
        apart = everywhere | set(LITERATURE)
        variants = [clip for clip in first["clips"] if clip not in apart]
        names = [DEFAULT, *variants]
        rows = regret_rows(chosen_on, names) if variants else []
        made.append(("Variants of the default", rows, regret_columns(chosen_on)))
    some = {task: r for task, r in records.items() if set(LITERATURE) & set(r["clips"])}
    if some:
        rows = literature_rows(some)
        made.append(("Rules from the literature", rows, literature_columns(some)))
    made.append(("Tasks", task_rows(records), TASK_COLUMNS))
    return made


def task_rows(records: Mapping[str, Record]) -> list[Row]:
    """What the tasks are, and the best constant on each."""
    return [_task_row(name, record) for name, record in records.items()]


def _task_row(name: str, record: Record) -> Row:
    clip, rate = best(constants(record))
    factor = list(record["constants"])[clip]
    values_S = constants(record)[clip, rate]
    return {
        "task": name + (" (held out)" if record["held_out"] else ""),
        "model": record["model"],
        "optimizer": record["optimizer"],
        "trouble": record["trouble"],
        "median": f"{record['median_norm']:.3g}",
        "rates": ", ".join(f"{r:g}" for r in record["rates"]),
        "factor": f"{factor} x at rate {record['rates'][rate]:g}",
        "value": f"{values_S.mean():.4g} ± {standard_error(values_S):.2g}",
        "unit": record["unit"],
        "steps": str(record["steps"]),
        "seeds": str(record["seeds"]),
    }


TASK_COLUMNS = {
    "task": "task",
    "model": "model",
    "optimizer": "optimizer",
    "trouble": "what goes wrong",
    "median": "median norm, unclipped",
    "rates": "rates",
    "factor": "best constant",
    "value": "its final value",
    "unit": "unit",
    "steps": "steps",
    "seeds": "seeds",
}


def regret_rows(records: Mapping[str, Record], names: Sequence[str]) -> list[Row]:
    """A row per clip: its regret on each task, the worst and the mean."""
    every = {task: with_constants(record) for task, record in records.items()}
    rows = []
    for clip in names:
        regrets = {t: regret(r, r["clips"][clip]) for t, r in every.items()}
        rows.append({"clip": clip, **summary(every, clip, regrets), **_cells(regrets)})
    return sorted(rows, key=lambda row: row["_worst"])


def summary(
    records: Mapping[str, Record], clip: str, regrets: Mapping[str, Regret]
) -> Row:
    spread = bootstrap(records, clip)
    errors = max(regrets.values(), key=lambda r: r.in_errors).in_errors
    same = max(r.at_same_rate for r in regrets.values())
    shares = [r.share_clipped for r in regrets.values()]
    return {
        "_worst": spread["worst"][0],
        "errors": f"{errors:+.1f}",
        "worst": interval(spread["worst"]),
        "mean": interval(spread["mean"]),
        "same": f"{same:+.1f}",
        "clipped": f"{min(shares):.0%} to {max(shares):.0%}",
    }


def interval(estimate: tuple[float, float, float]) -> str:
    middle, low, high = estimate
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def _cells(regrets: Mapping[str, Regret]) -> Row:
    return {
        task: f"{r.at_best_rates:+.2g} ({r.in_errors:+.1f})"
        for task, r in regrets.items()
    }


def regret_columns(records: Mapping[str, Record]) -> dict[str, str]:
    tasks = {task: f"{task}, {record['unit']}" for task, record in records.items()}
    return {
        "clip": "clip",
        "errors": "worst, standard errors",
        "worst": "worst, %",
        "mean": "mean, %",
        "same": "worst at the same rate, %",
        "clipped": "steps clipped",
        **tasks,
    }


# What the rules from the literature are compared with.
BESIDE = (DEFAULT, "constant, 1 x median", UNCLIPPED)


def literature_rows(records: Mapping[str, Record]) -> list[Row]:
    """A row per rule; a dash on a task that it was not run on."""
    every = {task: with_constants(record) for task, record in records.items()}
    rows = []
    for clip in (*BESIDE, *LITERATURE):
        run = {
            t: regret(r, r["clips"][clip])
            for t, r in every.items()
            if clip in r["clips"]
        }
        if run:
            shares = [r.share_clipped for r in run.values()]
            clipped = f"{min(shares):.0%} to {max(shares):.0%}"
            none = dict.fromkeys(every, "-")
            rows.append({"clip": clip, "clipped": clipped, **none, **_cells(run)})
    return rows


def run_for(records: Mapping[str, Record], clip: str) -> dict[str, Record]:
    """The tasks that a clip was run on."""
    return {task: r for task, r in records.items() if clip in r["clips"]}


def literature_columns(records: Mapping[str, Record]) -> dict[str, str]:
    columns = regret_columns(records)
    kept = ("clip", "clipped", *records)
    return {key: columns[key] for key in kept}


def literature(records: Mapping[str, Record]) -> str:
    """The table of `docs/choosing.md`: regret in percent, and dashes."""
    some = {
        task: with_constants(r)
        for task, r in records.items()
        if set(LITERATURE) & set(r["clips"])
    }
    lines = ["| clip | " + " | ".join(some) + " |", "|---" * (len(some) + 1) + "|"]
    for clip in (*BESIDE, *LITERATURE):
        found = [
            f"{regret(r, r['clips'][clip]).in_percent:+.1f}"
            if clip in r["clips"]
            else "-"
            for r in some.values()
        ]
        if set(found) != {"-"}:
            name = OFFERED.get(clip, f"`{clip}`")
            lines.append(f"| {name} | " + " | ".join(found) + " |")
    return "\n".join(lines)


# The rows of `docs/choosing.md`: what a user can write, and the tuned constant.
OFFERED = {
    DEFAULT: f"`{DEFAULT}`",
    PER_PARAMETER: f"`{PER_PARAMETER}`",
    "constant, 1 x median": "a constant at the median norm of the run without a clip",
    "clip_by_global_norm(1.0)": "`clip_by_global_norm(1.0)`",
    "adaptive_grad_clip(0.01)": "`adaptive_grad_clip(0.01)`",
    "adagc()": "`adagc()`",
    "autoclip()": "`autoclip()`",
    "zclip()": "`zclip()`",
    "skip_spikes()": "`skip_spikes(inner)`",
    UNCLIPPED: "no clip",
}


def percents(records: Mapping[str, Record], clip: str) -> list[float]:
    """Regret on each task."""
    every = map(with_constants, records.values())
    return [regret(r, r["clips"][clip]).in_percent for r in every]


def worst_and_mean(records: Mapping[str, Record], clip: str) -> tuple[float, float]:
    every = percents(records, clip)
    return max(every), sum(every) / len(every)


def choosing(records: Mapping[str, Record]) -> str:
    """The table of `docs/choosing.md`: regret in percent, a row per clip."""
    heads = [task + ("*" if r["held_out"] else "") for task, r in records.items()]
    lines = ["| clip | worst | mean | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for clip, name in OFFERED.items():
        numbers = [*worst_and_mean(records, clip), *percents(records, clip)]
        lines.append(f"| {name} | " + " | ".join(f"{x:+.1f}" for x in numbers) + " |")
    return "\n".join(lines)


# The first table of `docs/choosing.md`: kinds of runs, and their tasks.
KINDS = {
    "AdamW or Muon, clean data": ("transformer-adamw", "transformer-muon"),
    "Lion, clean data": ("transformer-lion",),
    "Adam, bfloat16 gradients": ("diffusion",),
    "AdamW, 1 or 2% of the batches broken": ("transformer-adamw-broken", "lora"),
    "Adam, reinforcement learning (PPO)": ("ppo",),
    "SGD, recurrent network, exploding gradients": ("temporal-order", "addition"),
    "SGD, LSTM, clean data": ("lstm",),
    "SGD with momentum, no normalization, 1% of the batches broken": ("digits-cnn",),
}
COMPARED = {
    DEFAULT: f"`{DEFAULT}`",
    PER_PARAMETER: "median, per parameter",
    "constant, 1 x median": "constant at the median",
    "clip_by_global_norm(1.0)": "constant 1.0",
    UNCLIPPED: "no clip",
}


def by_kind(records: Mapping[str, Record]) -> str:
    """Regret in percent, the worst task of each kind of run."""
    every = {task: with_constants(record) for task, record in records.items()}
    lines = ["| your run | " + " | ".join(COMPARED.values()) + " |"]
    lines.append("|---" * (len(COMPARED) + 1) + "|")
    for kind, tasks in KINDS.items():
        worst = [
            max(regret(every[t], every[t]["clips"][clip]).in_percent for t in tasks)
            for clip in COMPARED
        ]
        lines.append(f"| {kind} | " + " | ".join(f"{x:+.1f}" for x in worst) + " |")
    return "\n".join(lines)
