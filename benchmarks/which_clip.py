"""Which clip trains best? Every clip on every task, beside the best of nine constants.

    python benchmarks/which_clip.py            # all, more than an hour on two cores
    python benchmarks/which_clip.py --quick    # three steps a run, to see that it works
    python benchmarks/which_clip.py --tasks 'ppo;lora' --clips 'zclip()'
    python benchmarks/which_clip.py --add --tasks lora --clips 'clippy();adagn()'

Each run is kept in `--work` as it ends; started again, the command goes on from there.
With `--add` it goes on from the results that are published, too, and writes both: no
constant is run again, and all clips that a task lacks are run in one program.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

THREADS = "--xla_cpu_multi_thread_eigen=false"  # a process per core, and no more
QUICK = ("temporal-order", "digits-cnn")  # tasks
RECORD = Path(__file__).parent / "results" / "which_clip.json"  # what is published
FIXED = "fixed"  # the job that runs no clip, then the constants


def main() -> None:
    options = _arguments()
    os.environ["XLA_FLAGS"] = THREADS
    from study.clips import DEFAULT, run_on
    from study.tasks import HELD_OUT, TASKS

    quick = options.quick
    old = json.loads(RECORD.read_text()) if options.add else {"tasks": {}}
    tasks = options.tasks or (list(QUICK) if quick else [*TASKS, *HELD_OUT])
    few = options.clips or ([DEFAULT] if quick else None)
    names = {task: few or run_on(task in HELD_OUT) for task in tasks}
    if options.add:
        jobs = [(task, tuple(lacking(old, task, names[task]))) for task in tasks]
    else:
        jobs = [(t, (clip,)) for t in tasks for clip in (FIXED, *names[t])]
    run(options, jobs)
    new = {task: collect(options, task, names[task], old) for task in tasks}
    save(old["tasks"] | new, options, old)


def lacking(old: dict[str, Any], task: str, clips: list[str]) -> list[str]:
    return [clip for clip in clips if clip not in old["tasks"][task]["clips"]]


def run(options: argparse.Namespace, jobs: list[tuple[str, tuple[str, ...]]]) -> None:
    """Runs what has not been run, a process per core."""
    left = [
        (task, missing)
        for task, clips in jobs
        if (missing := [c for c in clips if not _file(options, task, c).exists()])
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, context) as pool:
        futures = [pool.submit(train, options, *job) for job in left]
        done = concurrent.futures.as_completed(futures)
        for future in tqdm(done, total=len(left), unit="clip", smoothing=0):
            future.result()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return [name for name in text.split(";") if name]

    parser.add_argument("--quick", action="store_true", help="three steps, a minute")
    parser.add_argument("--tasks", type=names, help="some only, between semicolons")
    parser.add_argument("--clips", type=names, help="some only, between semicolons")
    parser.add_argument("--add", action="store_true", help="to what is published")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/which_clip"), help="keeps what was run"
    )
    parser.add_argument("--out", type=Path, help="write OUT.json, OUT.md and OUT.png")
    return parser.parse_args()


def _file(options: argparse.Namespace, task: str, clip: str) -> Path:
    folder = options.work / ("quick" if options.quick else "full") / task
    return folder / f"{clip.replace('/', '-')}.json"


def train(options: argparse.Namespace, task_name: str, names: list[str]) -> None:
    """Trains on a task under clips, or none and the constants; keeps the results."""
    from study.clips import FACTORS, clips, constant
    from study.runs import switched, trainer
    from study.tasks import make_task

    task = make_task(task_name, options.quick)
    start = time.process_time()
    if names == [FIXED]:
        run = trainer(task, constant)
        none = run(math.inf)
        best = np.argmin(np.mean(none["value"], axis=1))
        norm = float(np.median(none["median_norm"][best]))
        fixed = {f"{f:.3g}": run(f * norm) for f in FACTORS}
        result: Any = {"none": none, "median_norm": norm, "constants": fixed}
        return _keep(_file(options, task_name, FIXED), result, start)
    wraps = [clips()[name] for name in names]
    if len(names) == 1:
        run = trainer(task, lambda optimizer, _: wraps[0](optimizer))
    else:
        # The threshold's place is taken by the index of the clip.
        run = trainer(
            task,
            lambda optimizer, index: switched(
                [wrap(optimizer) for wrap in wraps], index.astype(int)
            ),
        )
    for index, name in enumerate(names):
        _keep(_file(options, task_name, name), run(index), start)
        start = time.process_time()


def _keep(path: Path, result: dict[str, Any], start: float) -> None:
    result["cpu_seconds"] = time.process_time() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(path)  # so that a kill leaves no half of a file


def collect(
    options: argparse.Namespace, name: str, clips: list[str], old: dict[str, Any]
) -> dict[str, Any]:
    """What the study knows of a task."""
    from study.tasks import HELD_OUT, TASKS, make_task

    if name in old["tasks"]:
        new = {c: _read(options, name, c) for c in lacking(old, name, clips)}
        record = old["tasks"][name]
        return record | {"clips": record["clips"] | new}
    task = make_task(name, options.quick)
    about = ("model", "trouble", "optimizer", "rates", "unit", "worst", "seeds")
    record = {key: getattr(task, key) for key in about}
    record |= _read(options, name, FIXED)
    record["clips"] = {clip: _read(options, name, clip) for clip in clips}
    steps = 3 if options.quick else (TASKS | HELD_OUT)[name][1]
    return record | {"held_out": name in HELD_OUT, "steps": steps}


def _read(options: argparse.Namespace, task: str, clip: str) -> dict[str, Any]:
    """A result, of six digits a number: the rest is rounding of the machine."""
    text = _file(options, task, clip).read_text()
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))


def save(
    records: dict[str, Any], options: argparse.Namespace, old: dict[str, Any]
) -> None:
    """Writes the record, the tables and the picture, and prints the tables."""
    import _measure
    from study import picture, tables

    out = options.out or RECORD.with_suffix("")
    out.parent.mkdir(parents=True, exist_ok=True)
    where = _measure.environment()
    where["cpu_seconds"] = round(sum(map(_cpu_seconds, records.values())))
    if options.add:
        where, added = old["environment"], [*old.get("added", []), where]
    else:
        added = []
    places = [("", where), *(("Added later: ", place) for place in added)]
    text = "\n\n".join(
        [
            f"# which_clip: {str(__doc__).splitlines()[0]}",
            *(
                title + ", ".join(f"{key} {value}" for key, value in place.items())
                for title, place in places
            ),
            tables.NOTE,
            *(
                f"## {title}\n\n{_measure.markdown(rows, columns)}"
                for title, rows, columns in tables.tables(records)
                if rows
            ),
        ]
    )
    print(text)
    out.with_suffix(".md").write_text(text + "\n")
    record = {"environment": where, "added": added, "tasks": records}
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    picture.draw(records, out.with_suffix(".png"))


def _cpu_seconds(record: dict[str, Any]) -> float:
    clips = record["clips"].values()
    return record["cpu_seconds"] + sum(clip["cpu_seconds"] for clip in clips)


if __name__ == "__main__":
    main()
