"""The summary and the page name what was done to a run, and nothing else."""

import dataclasses
import json

import logs
import numpy as np
import pytest
import runs

from optaxclip.audit import _cli, read, report, summary
from optaxclip.audit._report import page as page_module
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.events import nonfinite_events

# Of each run all findings, the first with what its detail must say.
EXPECTED = {
    "healthy": (
        ["[fine] Nothing stands out in the norms"],
        "Every norm was finite, and none after the first 10 was a spike. Of 400 steps,",
    ),
    "spikes held": (
        ["[notice] 3 spikes, all clipped"],
        "Steps 130, 217, 305 had norms at least 5 times as large as in the steps",
    ),
    "spikes passed": (
        ["[problem] 3 spikes reached the optimizer"],
        "Steps 130, 217, 305 had norms at least 5 times as large as in the steps",
    ),
    "NaN in one layer": (
        ["[problem] The gradient is NaN from step 260 to the end"],
        "At step 260 the gradient was NaN only in hidden_1/kernel and the loss was "
        "finite: look at the backward pass",
    ),
    "NaN in all": (
        ["[problem] The gradient is NaN from step 260 to the end"],
        "At step 260 the gradient was NaN in all 8 parameters and the loss was NaN: "
        "look at the batch of that step",
    ),
    "NaN skipped": (
        ["[notice] 2 steps with a gradient of NaN were skipped"],
        "Steps 170, 260. At step 170 the gradient was NaN in all 8 parameters",
    ),
    "always clipped": (
        ["[notice] Every step was clipped"],
        "The threshold is below the ordinary norms",
    ),
    "never clipped": (
        ["[notice] The clip never acted: its threshold is out of reach"],
        "The threshold, 100, is ",
    ),
    "restarted twice": (
        [
            "[notice] The run was restarted twice",
            "[fine] Nothing stands out in the norms",
        ],
        "Restarted at steps 100, 300; 100 steps run again from a checkpoint; the log",
    ),
    "float16": (
        ["[notice] 7 steps overflowed and were skipped"],
        "At step 0 the gradient was infinite in all 8 parameters and the loss was "
        "finite. With dynamic_loss_scale this is normal",
    ),
}


@pytest.mark.parametrize("name", runs.RUNS)
@pytest.mark.sample(1)
def test_a_run_is_known_by_its_findings(name, tmp_path, monkeypatch):
    data = runs.RUNS[name](tmp_path / "run.jsonl")
    titles, detail = EXPECTED[name]
    found = summary(data).findings
    if name == "float16":  # how many of them depends on the last bits
        count = int(data.skipped.sum())
        assert count > 3
        titles = [titles[0].replace("7", str(count))]
    assert [f"[{f.level}] {f.title}" for f in found] == titles
    assert detail in found[0].detail
    assert str(summary(data)).splitlines()[1].startswith(f"{titles[0]}. ")
    assert stats.leaves_are_scaled(data) == (name == "float16")
    monkeypatch.setattr(page_module, "_alternatives", logs.no_alternatives)
    monkeypatch.setattr(page_module.stills, "image", lambda _: "<img alt='picture'>")
    page = report(data, tmp_path / "page.html").read_text()
    first = page.index('<li class="finding')
    assert page.index(found[0].title) < page.index("<figure")
    assert page[first:].startswith(f'<li class="finding {found[0].level}">')


def test_whether_norms_of_leaves_include_the_loss_scale(tmp_path):
    leaves = [[3.0 * scale, 4.0 * scale] for scale in [2.0**15] * 30 + [2.0**16] * 30]
    data = log(np.full(60, 5.0), tmp_path, leaf_norms=leaves)
    assert stats.leaves_are_scaled(data)
    true = dataclasses.replace(data, leaf_norms=np.tile([3.0, 4.0], (60, 1)))
    assert not stats.leaves_are_scaled(true)


# -- spikes


def log(norms, folder, **more):
    """The log of a loose clip, with leaf norms if given."""
    rows = [
        logs.row(i, norm, 5.0, **{key: value[i] for key, value in more.items()})
        for i, norm in enumerate(np.asarray(norms).tolist())
    ]
    names = [f"layer_{i}" for i in range(len(rows[0].get("leaf_norms", ())))]
    return read(logs.write(folder / "run.jsonl", rows, leaf_names=names))


def test_the_usual_norm_is_the_larger_of_the_medians_on_both_sides(tmp_path):
    norms = np.random.default_rng(0).lognormal(size=300).round(6)
    norms[[20, 150]] = np.nan
    usual = stats.usual_norm(log(norms, tmp_path))
    finite = norms[np.isfinite(norms)]
    expected = []
    for i in range(len(finite)):
        before, after = finite[max(i - 50, 0) : i], finite[i + 1 : i + 51]
        sides = [np.sort(s)[(len(s) - 1) // 2] for s in (before, after) if len(s) >= 10]
        expected.append(max(sides) if len(before) >= 10 else np.nan)
    np.testing.assert_array_equal(usual[np.isfinite(norms)], expected)
    assert np.isnan(usual[[20, 150]]).all()


@pytest.mark.parametrize("halving", [0.5, 2, 8, 30])
@pytest.mark.parametrize("fall", [5, 30, 1000])
def test_a_decay_has_no_spike(fall, halving, tmp_path):
    noise = np.random.default_rng(0).lognormal(sigma=0.2, size=400)
    norms = noise * (1 + fall * 0.5 ** (np.arange(400) / halving))
    assert not len(stats.spikes(log(norms, tmp_path)))


def test_a_rise_that_lasts_is_no_spike(tmp_path):
    norms = np.where(np.arange(400) < 200, 1.0, 20.0)
    assert not len(stats.spikes(log(norms, tmp_path)))


def test_large_norms_that_come_again_and_again_are_no_spikes(tmp_path):
    """As in PPO, whose epochs over the same data end with small gradients."""
    phase = np.concatenate([np.full(5, 50.0), np.geomspace(30, 0.3, 11)])
    norms = np.tile(phase, 25) * np.random.default_rng(0).lognormal(sigma=0.1, size=400)
    assert np.any(norms >= 5 * stats.usual_norm(log(norms, tmp_path)))
    assert not len(stats.spikes(log(norms, tmp_path)))
    norms[194] *= 20
    assert stats.spikes(log(norms, tmp_path)).tolist() == [194]


@pytest.mark.parametrize(
    ("start", "length"),
    [(10, 1), (10, 9), (25, 24), (100, 24), (340, 24), (391, 9), (399, 1)],
)
def test_a_burst_is_spikes(start, length, tmp_path):
    norms = np.ones(400)
    norms[start : start + length] = 9.0
    expected = np.flatnonzero(norms > 1)
    assert stats.spikes(log(norms, tmp_path)).tolist() == expected.tolist()


def test_a_spike_within_a_decay(tmp_path):
    norms = 1 + 20 * 0.5 ** (np.arange(400) / 8)
    norms[30] *= 50
    assert stats.spikes(log(norms, tmp_path)).tolist() == [30]


def test_a_parameter_that_leads_in_spikes_alone(tmp_path):
    norms = np.where(np.arange(400) % 100 == 50, 90.0, 1.0)
    leaves = np.full((400, 3), 0.5)
    leaves[norms > 1, 2] = 90.0
    data = log(norms, tmp_path, leaf_norms=leaves.tolist())
    _, second, *_ = summary(data).findings
    assert second.title == "The spikes come from one parameter"
    assert second.detail == "layer_2 has the largest norm in 4 of the 4 spikes."
    leaves[:, 2] *= 2  # the largest in every step: nothing to tell
    data = dataclasses.replace(data, leaf_norms=leaves)
    assert "spikes come" not in str(summary(data))


def test_a_large_norm_at_the_start_is_said_to_be_unjudged(tmp_path):
    norms = np.where(np.arange(60) == 3, 90.0, 1.0)
    remark = "and the largest 90, at step 3 (the first 10 norms never count as spikes)."
    assert remark in summary(log(norms, tmp_path)).headline
    assert "never count" not in summary(log(np.roll(norms, 20), tmp_path)).headline


def test_a_parameter_that_dominates_comes_before_the_threshold(tmp_path):
    data = log(np.full(60, 50.0), tmp_path, leaf_norms=[[50.0, 1.0, 1.0]] * 60)
    titles = [finding.title for finding in summary(data).findings]
    assert titles == ["One parameter dominates the norm", "Every step was clipped"]


# -- NaN


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ([0], "only in layer_0"),
        ([4, 20, 27], "only in layer_4, layer_20, layer_27"),
        ([1, 2, 3, 4], "in 4 of 28 parameters"),
        (range(1, 28), "in 27 of 28 parameters"),
        (range(28), "in all 28 parameters"),
    ],
)
def test_which_parameters_are_not_finite(bad, expected, tmp_path, capsys):
    leaves = np.full((60, 28), 0.1)
    leaves[40, list(bad)] = np.nan
    rows = [[logs.number(x) for x in row] for row in leaves]
    norms = np.where(np.arange(60) == 40, np.nan, 1.0)
    data = log(norms, tmp_path, leaf_norms=rows)
    (finding,) = summary(data).findings
    assert f"At step 40 the gradient was NaN {expected}." in finding.detail
    (event,) = nonfinite_events(data, 5)
    assert event.leaf == expected.removeprefix("only ").removeprefix("in ")
    assert _cli.main(["summary", str(tmp_path / "run.jsonl"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert expected in printed["findings"][0]["detail"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 1.0], "the loss was finite: look at the backward pass"),
        ([1.0, "nan"], "the loss was NaN: look at the batch"),
        ([1.0, "inf"], "the loss was infinite: look at the batch"),
        (["nan", "nan"], ""),  # not recorded
    ],
)
def test_what_the_loss_says_of_a_nan(losses, expected, tmp_path):
    norms = np.where(np.arange(60) == 40, np.nan, 1.0)
    data = log(norms, tmp_path, loss=[losses[i == 40] for i in range(60)])
    detail = summary(data).findings[0].detail
    assert expected in detail
    assert ("the loss was" in detail) == bool(expected)


def test_nan_that_comes_and_goes(tmp_path):
    norms = np.where(np.isin(np.arange(60), [40, 45]), np.nan, 1.0)
    data = log(norms, tmp_path)
    data = dataclasses.replace(data, skipped=np.zeros(60, bool))
    (finding,) = summary(data).findings
    assert finding.title == "2 steps with a gradient of NaN"
    assert finding.detail.startswith("Steps 40, 45. A clip does not stop NaN")
    assert finding.level == "problem"


# -- thresholds that move, and those that do not


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        (np.full(400, 1.0), False),
        (np.where(np.arange(400) < 200, 1.0, 2.0), False),  # resumed with another
        (np.repeat([1.0, 0.5, 0.2], [100, 200, 100]), False),
        (np.full(400, np.inf), False),
        (np.linspace(1, 2, 400), True),
        (np.repeat(np.arange(40.0), 10), True),
    ],
)
def test_whether_a_threshold_moves(thresholds, expected, tmp_path):
    data = dataclasses.replace(log(np.ones(400), tmp_path), threshold=thresholds)
    assert stats.moves(data) == expected


@pytest.mark.parametrize("name", ["healthy", "never clipped"])
def test_by_the_logs_of_real_clips(name, tmp_path):
    data = runs.RUNS[name](tmp_path / "run.jsonl")
    assert stats.moves(data) == (name == "healthy")


# -- the record


def test_a_record_with_gaps_comes_before_praise(tmp_path):
    data = log(np.ones(60), tmp_path)
    data = dataclasses.replace(data, missed=((7, 9),), torn=1)
    assert [f.title for f in summary(data).findings] == [
        "The record is not complete",
        "Nothing stands out in the norms",
    ]
    assert summary(data).findings[0][2:] == (
        "3 steps missing: 7 to 9; 1 torn line dropped.",
        (7,),
    )


@pytest.mark.parametrize(
    ("scale", "adapts", "found"),
    [(0.5, False, True), (0.5, True, False), (0.05, True, True)],
)
def test_most_steps_may_be_clipped_by_a_threshold_that_adapts(
    scale, adapts, found, tmp_path
):
    """It chose to; but not where next to nothing of them is left."""
    wobble = 1 + 0.01 * np.sin(np.arange(300)) if adapts else np.ones(300)
    thresholds = scale * wobble
    data = dataclasses.replace(
        log(np.ones(300), tmp_path),
        threshold=thresholds,
        scale=thresholds,
        clipped=np.ones(300, bool),
    )
    titles = [finding.title for finding in summary(data).findings]
    assert ("Every step was clipped" in titles) == found
