"""The study: it runs, goes on after a kill, and the pages say what it found."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import which_clip
from study.clips import LITERATURE, run_on
from study.regret import bootstrap, regret
from study.tables import (
    by_kind,
    choosing,
    literature,
    percents,
    run_for,
    worst_and_mean,
)
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


@pytest.mark.slow
def test_clips_in_one_program_train_as_each_does_alone(tmp_path):
    clips, results = ["clippy()", "clip_by_percentile()"], []
    for jobs in ([clips], [[clip] for clip in clips]):
        options = argparse.Namespace(quick=True, work=tmp_path / str(len(jobs)))
        # The study is no part of the package.
        with (
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            for names in jobs:
                which_clip.train(options, "temporal-order", names)
        folder = options.work / "quick" / "temporal-order"
        results += [json.loads((folder / f"{clip}.json").read_text()) for clip in clips]
    for together, alone in zip(results[:2], results[2:], strict=True):
        for key in ("value", "median_norm", "share_clipped"):
            np.testing.assert_allclose(together[key], alone[key], rtol=1e-5)
    assert np.all(np.array(results[1]["share_clipped"]) > 0)


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


CONTRIB = {
    "adagn": "adagn()",
    "limit_growth": "limit_growth()",
    "smooth_clip": "smooth_clip(1.0)",
    "clip_coordinate_spikes": "clip_coordinate_spikes()",
    "clippy": "clippy()",
    "with_error_feedback": "with_error_feedback(clip_by_percentile())",
    "sketched_quantile": "clip_by(global_norm, sketched_quantile(0.5))",
}


@pytest.mark.parametrize("name", CONTRIB)
def test_docstrings_of_contrib_have_the_regret_of_the_study(name):
    tasks = run_for(RESULTS["tasks"], CONTRIB[name])
    text = " ".join(getattr(optaxclip.contrib, name).__doc__.split())
    number = {1: "one task", 2: "two tasks", 5: "five tasks"}[len(tasks)]
    assert f"On the {number} of the study that it was run on" in text
    its, default = (percents(tasks, c) for c in (CONTRIB[name], "clip_by_percentile()"))
    assert f"at most {max(its):.1f}% worse than the best of nine constants" in text
    assert all(a >= b for a, b in zip(its, default, strict=True))
    assert "nowhere better than :func:`optaxclip.clip_by_percentile`" in text


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
