"""The study: it runs, goes on after a kill, and the pages say what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from study.clips import LITERATURE, run_on
from study.regret import bootstrap, regret
from study.tables import by_kind, choosing, literature, worst_and_mean
from study.tasks import HELD_OUT, TASKS

import optaxclip
from optaxclip.audit import suggest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "which_clip.py"
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "which_clip.json").read_text())


def quick(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("XLA_FLAGS", None)  # the eight devices of the tests
    command = [sys.executable, SCRIPT, "--quick", "--work", folder, *options]
    return subprocess.run(
        [*command, "--out", folder / "out"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_quick_study_goes_on_where_it_was_stopped(tmp_path):
    quick(tmp_path)
    first = json.loads((tmp_path / "out.json").read_text())
    assert list(first["tasks"]) == ["temporal-order", "digits-cnn"]
    for record in first["tasks"].values():
        assert len(record["constants"]) == 9
        for clip in ("none", "clips"):
            assert record[clip]
        values = np.asarray(record["clips"]["clip_by_percentile()"]["value"])
        assert values.shape == (3, 2)  # rates and seeds
        assert np.all(np.isfinite(values))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    # As after a kill: one result is missing, another is half written.
    missing = tmp_path / "quick" / "digits-cnn" / "clip_by_percentile().json"
    kept = tmp_path / "quick" / "digits-cnn" / "fixed.json"
    missing.rename(missing.with_suffix(".part"))
    before = kept.stat().st_mtime_ns
    again = quick(tmp_path)
    assert "1/1" in again.stderr
    assert kept.stat().st_mtime_ns == before
    second = json.loads((tmp_path / "out.json").read_text())
    result = ("digits-cnn", "clips", "clip_by_percentile()", "value")
    assert at(second["tasks"], result) == at(first["tasks"], result)


def at(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree


def record(clip, fixed, worst=10.0):
    """A task with one rate per row, a seed per column."""
    result = lambda values: {"value": values, "share_clipped": values}  # noqa: E731
    return {
        "worst": worst,
        "constants": {str(i): result(values) for i, values in enumerate(fixed)},
        "clips": {"clip": result(clip)},
    }


def test_regret_is_to_the_best_constant_each_at_its_own_rate():
    task = record(
        clip=[[5.0, 7.0], [3.0, 5.0]],  # means 6 and 4
        fixed=[[[9.0, 9.0], [3.0, 1.0]], [[5.0, 5.0], [8.0, 8.0]]],
    )
    found = regret(task, task["clips"]["clip"])
    assert found.at_best_rates == 4.0 - 2.0
    assert found.in_percent == 100 * 2.0 / (10 - 2)
    assert found.in_errors == pytest.approx(2.0 / 2.0)  # seed by seed: 0 and 4
    assert found.at_same_rate == 100 * 2.0 / 8  # 4 - 2; 6 - 5 is less
    assert found.share_clipped == 4.0


def test_a_bootstrap_holds_the_estimate_and_narrows_with_the_spread():
    def width(spread):
        noise = spread * np.random.default_rng(0).standard_normal((2, 20))
        task = record([(3 + noise[0]).tolist()], [[(2 + noise[1]).tolist()]])
        middle, low, high = bootstrap({"task": task}, "clip")["mean"]
        assert low < middle < high
        return high - low

    assert width(1.0) > 5 * width(0.1)
    assert bootstrap({"t": record([[3.0] * 4], [[[2.0] * 4]])}, "clip")["worst"] == (
        pytest.approx((12.5, 12.5, 12.5))
    )


def test_the_page_has_the_tables_of_the_study():
    page = (ROOT / "docs" / "choosing.md").read_text()
    assert by_kind(RESULTS["tasks"]) in page
    assert choosing(RESULTS["tasks"]) in page
    assert literature(RESULTS["tasks"]) in page


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md", "docs/index.md"])
def test_pages_have_the_regret_of_the_default_and_of_no_clip(page):
    text = " ".join((ROOT / page).read_text().split())
    worst, mean = worst_and_mean(RESULTS["tasks"], "clip_by_percentile()")
    assert f"at most {worst:.1f}% worse than" in text
    assert f"and {mean:.1f}% on average" in text
    none = worst_and_mean(RESULTS["tasks"], "no clip")[1]
    assert f"without a clip is {none:.1f}% worse on average" in text


@pytest.mark.parametrize("name", ["clip_by_percentile", "autoclip", "zclip", "adagc"])
def test_docstrings_have_the_regret_of_the_study(name):
    worst, mean = worst_and_mean(RESULTS["tasks"], f"{name}()")
    text = " ".join(getattr(optaxclip, name).__doc__.split())
    assert f"at most {worst:.1f}% worse than the best of nine constants" in text
    assert f"and {mean:.1f}% on average" in text


def test_suggestions_have_the_regret_of_the_study():
    fixed, percentile, _ = suggest(np.ones(1000))
    worst, mean = worst_and_mean(RESULTS["tasks"], "clip_by_percentile()")
    assert f"at most {worst:.1f}% worse than the best of nine" in percentile.reason
    assert f"and {mean:.1f}% on average" in percentile.reason
    worst, _ = worst_and_mean(RESULTS["tasks"], "constant, 1 x median")
    assert f"at most {worst:.1f}% worse than the best of nine" in fixed.reason
    # No other multiple of the median is better in the worst case.
    factors = next(iter(RESULTS["tasks"].values()))["constants"]
    every = [f"constant, {factor} x median" for factor in factors]
    assert min(worst_and_mean(RESULTS["tasks"], c)[0] for c in every) == worst


def test_two_tasks_were_held_out_and_every_task_has_its_clips():
    tasks = RESULTS["tasks"]
    assert set(tasks) == {*TASKS, *HELD_OUT}
    for name, task in tasks.items():
        assert task["held_out"] == (name in HELD_OUT)
        run = [clip for clip in task["clips"] if clip not in LITERATURE]
        assert run == [c for c in run_on(task["held_out"]) if c not in LITERATURE]
        assert len(task["constants"]) == 9
        shapes = {np.shape(clip["value"]) for clip in task["clips"].values()}
        assert shapes == {(3, task["seeds"])}
