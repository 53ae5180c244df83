"""The command line: what it prints, and what it says when it cannot."""

import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import logs
import numpy as np
import pytest

import optaxclip
from optaxclip.audit import _cli, _commands, compare, parse_rule, read, suggest
from optaxclip.audit._report import page as page_module
from optaxclip.audit._report import statistics as stats

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = ("summary", "suggest", "replay", "report")


@pytest.fixture(scope="module")
def run_log(tmp_path_factory):
    return logs.long_run(tmp_path_factory.mktemp("logs") / "run.jsonl", steps=2000)


def arguments(command, path):
    """A command that works, on this log."""
    options = {
        "replay": ["--rule", "constant:1.0"],
        "report": ["-o", f"{path}.html"],
    }
    return [command, str(path), *options.get(command, [])]


def failed(capsys, argv):
    """What a command that fails prints on stderr, and nothing on stdout."""
    assert _cli.main(argv) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("optaxclip: ")
    return printed.err


def refused(capsys, argv):
    """What a command with wrong arguments prints on stderr."""
    with pytest.raises(SystemExit) as exit_:
        _cli.main(argv)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: optaxclip")
    return " ".join(printed.err.split())


def strict(text):
    """JSON without NaN and Infinity, which no other reader than Python's takes."""

    def fail(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=fail)


def as_number(value):
    return float(value) if isinstance(value, str) else value


# -- what it prints


def test_summary(capsys, run_log):
    assert _cli.main(["summary", str(run_log)]) == 0
    out = capsys.readouterr().out
    data = read(run_log)
    assert out.startswith("2,000 steps (0 to 1999): ")
    assert "[notice] 5 steps with a gradient of NaN or infinity were skipped" in out
    assert f"{100 * stats.clipped(data).mean():.1f}% clipped" in out


def test_summary_json(capsys, run_log):
    assert _cli.main(["summary", str(run_log), "--json"]) == 0
    summary = strict(capsys.readouterr().out)
    expected = stats.statistics(read(run_log))._asdict()
    assert summary["statistics"] == expected
    assert {finding["level"] for finding in summary["findings"]} <= {
        "problem",
        "notice",
        "fine",
    }
    assert summary["metadata"]["process_count"] == 8
    assert (summary["missed"], summary["rewritten"], summary["torn"]) == ([], 0, 0)


def test_replay(capsys, run_log):
    texts = ["constant:1.0", "quantile:0.95,100*2", "zscore:decay=0.9"]
    options = [part for text in texts for part in ("--rule", text)]
    assert _cli.main(["replay", str(run_log), *options]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == (
        "rule clipped mean scale largest passed longest streak recovers in"
    )
    assert [row.split()[0] for row in rows] == ["recorded", *texts]
    share = 100 * stats.clipped(read(run_log))[np.isfinite(read(run_log).norm)].mean()
    assert rows[0].split()[1] == f"{share:.1f}%"


def test_replay_json(capsys, run_log):
    options = ["--rule", "constant:1.0", "--rule", "quantile:0.9,50", "--json"]
    assert _cli.main(["replay", str(run_log), *options]) == 0
    replayed = strict(capsys.readouterr().out)
    assert replayed["steps"] == 2000
    recorded, *others = replayed["outcomes"]
    assert recorded["name"] == "recorded"
    assert recorded["recovery_steps"] == "nan"
    texts = ["constant:1.0", "quantile:0.9,50"]
    rules = {text: parse_rule(text) for text in texts}
    for got, expected in zip(others, compare(rules, read(run_log).norm), strict=True):
        got = {name: as_number(got[name]) for name in got if name != "name"}
        assert got == {n: v for n, v in expected._asdict().items() if n != "name"}


@pytest.mark.parametrize("command", ["summary", "suggest", "replay"])
@pytest.mark.sample(1)
def test_several_logs(capsys, tmp_path, command):
    for name in "ab":
        (tmp_path / name).mkdir()
        rows = [logs.row(i, 1.0 + "ab".index(name)) for i in range(30)]
        logs.write(tmp_path / name / "run.jsonl", rows)
    paths = [str(tmp_path / name / "run.jsonl") for name in "ab"]
    first, *options = arguments(command, paths[0])
    argv = [first, *paths, *options[1:]]
    each = []
    for path in paths:
        assert _cli.main(arguments(command, path)) == 0
        each.append(capsys.readouterr().out)
    assert _cli.main(argv) == 0
    assert capsys.readouterr().out == f"a/run\n{each[0]}\nb/run\n{each[1]}"
    assert _cli.main([*argv, "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert [part["log"] for part in found] == paths
    assert _cli.main([*arguments(command, paths[1]), "--json"]) == 0
    assert found[1] == {"log": paths[1], **strict(capsys.readouterr().out)}


def test_a_report_of_several_logs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(page_module.stills, "image", lambda _: "")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        logs.write(path, [logs.row(i, 1.0) for i in range(30)])
    assert _cli.main(["report", *map(str, paths)]) == 0
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text()
    assert "<h3>a</h3>" in page
    assert "<h3>b</h3>" in page
    monkeypatch.setattr(page_module, "_alternatives", logs.no_alternatives)
    assert _cli.main(["report", str(paths[0])]) == 0
    assert (tmp_path / "a.html").exists()


def test_a_report_that_follows_a_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(page_module, "_alternatives", logs.no_alternatives)
    monkeypatch.setattr(page_module.stills, "image", lambda _: "")
    path, page = logs.write(tmp_path / "run.jsonl", []), tmp_path / "run.html"
    seen = []  # the number of steps on the page, at each pause

    def sleep(seconds):
        assert seconds == 7
        text = page.read_text() if page.exists() else ""
        assert ('http-equiv="refresh" content="7"' in text) == bool(text)
        seen.append(int(re.search(r'"steps": (\d+)', text)[1]) if text else 0)
        if len(seen) == 2:
            page.unlink()  # nothing new, so it is not written again
        elif len(seen) == 5:
            raise KeyboardInterrupt
        else:
            with path.open("a") as file:
                file.write(json.dumps(logs.row(len(seen), 1.0)) + "\n")

    monkeypatch.setattr(_commands.time, "sleep", sleep)
    argv = ["report", str(path), "--follow", "--every", "7"]
    assert _cli.main(argv) == 0
    assert seen == [0, 1, 0, 2, 3]
    assert capsys.readouterr().out == f"Wrote {page}\n"
    assert 'http-equiv="refresh"' not in page.read_text()
    assert '"steps": 3' in page.read_text()
    path.write_text("no log\n")
    assert "line 1: this is no optaxclip log" in failed(capsys, argv)


def test_skipped_steps_do_not_count_as_clipped(capsys, tmp_path):
    rows = [logs.row(i, 0.5) for i in range(9)]
    rows.append({**logs.row(9, 50.0), "scale": 0.0, "clipped": False, "skipped": True})
    path = logs.write(tmp_path / "run.jsonl", rows)
    assert _cli.main([*arguments("replay", path), "--json"]) == 0
    recorded, fixed = strict(capsys.readouterr().out)["outcomes"]
    assert recorded["clipped_share"] == recorded["longest_streak"] == 0
    assert fixed["clipped_share"] == 0.1


def test_suggest(capsys, run_log):
    assert _cli.main(["suggest", str(run_log)]) == 0
    out = capsys.readouterr().out
    data = read(run_log)
    fixed, percentile, remarks = suggest(data)
    for text in (fixed.setting, fixed.reason, percentile.reason, *remarks):
        assert text in " ".join(out.split())
    assert max(map(len, out.splitlines()[:-1])) <= 80
    # The last line is a command that runs.
    try_it = shlex.split(out.splitlines()[-1].removeprefix("Try: optaxclip "))
    assert _cli.main(try_it) == 0
    assert fixed.rule in capsys.readouterr().out


def test_suggest_json(capsys, run_log):
    assert _cli.main(["suggest", str(run_log), "--json"]) == 0
    suggested = strict(capsys.readouterr().out)
    data = read(run_log)
    expected = suggest(data)
    assert suggested["fixed"] == expected.fixed._asdict()
    assert suggested["percentile"] == expected.percentile._asdict()
    assert suggested["remarks"] == list(expected.remarks)


def test_report(capsys, run_log, tmp_path):
    page = tmp_path / "page.html"
    options = ["-o", str(page), "--title", "A title"]
    assert _cli.main(["report", str(run_log), *options]) == 0
    assert capsys.readouterr().out == f"Wrote {page}\n"
    assert "A title" in page.read_text()


def test_steps_that_are_missing_are_said_to_be(capsys, tmp_path):
    rows = [logs.row(step, 1.0 + 0.01 * (step % 7)) for step in range(300)]
    path = logs.write(tmp_path / "a run.jsonl", [*rows[:100], *rows[150:]])
    for command in ("replay", "suggest", "summary"):
        assert _cli.main(arguments(command, path)) == 0
        assert "50 steps missing" in capsys.readouterr().out


@pytest.mark.parametrize("norm", [0.0, float("nan"), float("inf"), 1e-40, 1e38])
def test_runs_of_one_norm(capsys, tmp_path, norm):
    path = logs.write(tmp_path / "run.jsonl", [logs.row(i, norm) for i in range(250)])
    for command in ("summary", "replay"):
        for options in ([], ["--json"]):
            assert _cli.main([*arguments(command, path), *options]) == 0
            out = capsys.readouterr().out
            assert strict(out) if options else "nan" not in out
    if 0 < norm < np.inf:
        assert _cli.main(arguments("suggest", path)) == 0
    else:
        error = failed(capsys, arguments("suggest", path))
        assert f"{path}: `suggest(norms=...)` must hold a finite norm above 0" in error


def finding(norms, threshold, **more):
    """Runs of 400 steps, each with one thing to find, as rows of a log."""
    thresholds = np.broadcast_to(threshold, np.shape(norms)).tolist()
    return [
        logs.row(i, norm, bound, **{name: of(i) for name, of in more.items()})
        for i, (norm, bound) in enumerate(zip(norms.tolist(), thresholds, strict=True))
    ]


HEALTHY = "Nothing stands out in the norms"
STEADY = 1 + 0.01 * (np.arange(400) % 7)
DECAY = STEADY * (1 + 19 * np.exp(-np.arange(400) / 8))  # to a twentieth
FINDINGS = {
    "nothing": (
        finding(STEADY, 2.0),
        "fine",
        "Nothing stands out in the norms",
        "Of 400 steps, 0 were clipped and 0 skipped.",
    ),
    "over": (
        finding(STEADY, 0.5),
        "notice",
        "Every step was clipped",
        "gradients were multiplied by 0.486. With SGD that lowers the learning rate",
    ),
    "a stretch": (
        finding(np.where(np.arange(400) // 100 == 2, 4.0, STEADY), 2.0),
        "notice",
        "For a while most steps were clipped",
        "100% of the steps from 200 to 299 were clipped, and 25.0% of all steps.",
    ),
    "under": (
        finding(STEADY, 103.0),
        "notice",
        "The clip never acted: its threshold is out of reach",
        "is 100 times the median norm and 97.2 times the largest",
    ),
    "unbounded": (finding(STEADY, np.inf), "notice", "The clip was off", "infinite"),
    "zeros": (finding(np.zeros(400), 1.0), "problem", "Every norm was 0", "learned"),
    "mostly zeros": (
        finding(np.where(np.arange(400) % 4, 0, STEADY), 2.0),
        "notice",
        "The clip never acted: its threshold is out of reach",
        "is infinite times the median norm",
    ),
    "a spike held": (
        finding(np.where(np.arange(400) == 123, 90.0, STEADY), 2.0),
        "notice",
        "1 spike, clipped",
        "Step 123 had a norm at least 5 times as large as in the steps around it: "
        "87.4 times as large.",
    ),
    "a spike not held": (
        finding(np.where(np.arange(400) == 123, 90.0, STEADY), 50.0),
        "problem",
        "1 spike reached the optimizer",
        "Even after the clip the norm was at least 5 times the usual norm.",
    ),
    "nothing yet": (
        finding(STEADY[:19], 2.0),
        "fine",
        "Nothing stands out yet",
        "Of 19 steps, 0 were clipped and 0 skipped. That is too few steps to say",
    ),
    "a spike that an adaptive clip does not hold": (
        finding(np.where(np.arange(400) == 123, 90.0, STEADY), 7 * STEADY),
        "problem",
        "1 spike reached the optimizer",
        "A lower threshold would cut such spikes down to an ordinary size.",
    ),
    "a spike that nothing bounds": (
        finding(np.where(np.arange(400) == 123, 90.0, STEADY), np.inf),
        "problem",
        "1 spike reached the optimizer",
        "There was no threshold. A fixed one would cut such spikes down; so would",
    ),
    "some spikes held": (
        finding(np.where(np.isin(np.arange(400), [50, 90]), 9.0, STEADY), 4.0)[:80]
        + finding(np.where(np.arange(400) == 90, 9.0, STEADY), 8.0)[80:],
        "problem",
        "1 of 2 spikes reached the optimizer",
        "Steps 50, 90 had norms at least 5 times as large as in the steps around "
        "them: up to 8.74 times as large, at step 50. Not held back: step 90.",
    ),
    "a spike at the very end": (
        finding(np.where(np.arange(400) >= 398, 90.0, STEADY), 2.0),
        "notice",
        "2 spikes, all clipped",
        "Steps 398, 399 had norms",
    ),
    "a start-up decay": (finding(DECAY, 3.0), "fine", HEALTHY, ""),
    "a start-up decay, followed": (finding(DECAY, 1.5 * DECAY), "fine", HEALTHY, ""),
    "a rise": (
        finding(np.geomspace(1.0, 4.0, 400), 8.0),
        "notice",
        "The norms rise",
        "The median norm went from 1.07 (steps 0 to 39) to 3.74 (steps 360 to 399). "
        "The threshold stayed at 8: 0% of the earlier steps were clipped, and 0% of",
    ),
    "a rise at the start alone": (
        finding(np.minimum(np.geomspace(1.0, 60.0, 400), 5.0), 6.0),
        "fine",
        HEALTHY,
        "",
    ),
    "a jump that stays": (
        finding(np.where(np.arange(400) < 120, DECAY, 5.0), 6.0),
        "notice",
        "The norms rise",
        "(steps 360 to 399)",
    ),
    "a rise after a decay": (
        finding(np.concatenate([DECAY[:200], np.geomspace(1.0, 4.0, 200)]), 6.0),
        "notice",
        "The norms rise",
        "(steps 360 to 399)",
    ),
    "a rise that the threshold follows": (
        finding(np.geomspace(1.0, 4.0, 400), 1.5 * np.geomspace(1.0, 4.0, 400)),
        "notice",
        "The norms rise, and the threshold with them",
        "and the threshold followed from 1.61 to 5.61. A threshold that adapts does",
    ),
    "norms that leave a fixed threshold": (
        finding(np.geomspace(4.0, 0.5, 400), 3.9),
        "notice",
        "The threshold is no longer near the norms",
        "Earlier (steps 40 to 79) it was 3.9, or 1.33 times the median norm. At the "
        "end (steps 360 to 399) it is 3.9, or 7.05 times. A spike would now pass.",
    ),
    "a threshold that leaves the norms": (
        finding(STEADY, np.geomspace(1.0, 40.0, 400)),
        "notice",
        "The threshold is no longer near the norms",
        "A spike would now pass.",
    ),
    "many skips": (
        [{**row, "skipped": i % 5 == 0} for i, row in enumerate(finding(STEADY, 2.0))],
        "problem",
        "20.0% of the steps were skipped",
        "The model learned nothing from 80 of 400 steps.",
    ),
    "skipped": (
        finding(np.where(np.arange(400) // 20 == 5, np.nan, STEADY), 2.0),
        "problem",
        "20 steps skipped in a row",
        "From step 100 to 119 nothing was learned.",
    ),
    "the loss": (
        finding(STEADY, 2.0, loss=lambda i: "inf" if i == 17 else 1.0),
        "notice",
        "The loss was infinite",
        "Step 17.",
    ),
    "a leaf": (
        finding(STEADY, 2.0, leaf_norms=lambda i: [0.1, 1.0, 0.1 if i % 4 else 2.0]),
        "notice",
        "One parameter dominates the norm",
        "In 75.0% of the steps b holds more than 90.0% of the squared norm",
    ),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_a_summary_finds(capsys, tmp_path, name):
    rows, level, title, detail = FINDINGS[name]
    leaves = ("a", "b", "c") if "leaf_norms" in rows[0] else ()
    path = logs.write(tmp_path / "run.jsonl", rows, leaf_names=leaves)
    assert _cli.main(["summary", str(path), "--json"]) == 0
    first = strict(capsys.readouterr().out)["findings"][0]
    assert (first["level"], first["title"]) == (level, title)
    assert detail in first["detail"]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        _cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"optaxclip {optaxclip.__version__}\n"


@pytest.mark.parametrize("command", [*COMMANDS, "watch"])
def test_help_has_an_example_that_parses(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        _cli.main([command, "--help"])
    assert exit_.value.code == 0
    example = capsys.readouterr().out.splitlines()[-1]
    argv = shlex.split(example.removeprefix("example: optaxclip "))
    parsed = vars(_cli._parser().parse_args(argv))
    assert parsed.get("logs", [parsed.get("log")]) == ["run.jsonl"]
    assert argv[0] == command


# -- what it refuses


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": No such file or directory"),
        ("", ", line 1: the file is empty."),
        ("name,value\n1,2\n", ", line 1: this is no optaxclip log"),
        ('{"optaxclip_log":2}\n', ", line 1: the log has format 2, this reader knows"),
        ("damaged", ", line 3: not JSON"),
        ("no row", ", line 2: neither a row nor a marker"),
        ("null", ", line 3: neither a row nor a marker: None"),
        ("a list", ", line 3: neither a row nor a marker: [1]"),
        ("a word", ", line 3: neither a row nor a marker: {'unsure_before': 'x'}"),
        ("an odd gap", ", line 3: neither a row nor a marker: {'missed': 3}"),
        ("a norm of null", ", line 2: no row of a log: norm must be a number, got N"),
        ("too deep", ", line 1: it is nested too deeply."),
        ("CR", ", line 1: this is no optaxclip log"),
        ("CR LF", ", line 1: the lines end in CR LF, those of a log in LF."),
        ("no steps", ": the log has no steps yet."),
    ],
)
def test_bad_files(capsys, tmp_path, command, content, message):
    path = tmp_path / "run.jsonl"
    head, row = json.dumps(logs.first_line()), json.dumps(logs.row(0, 1.0))
    contents = {
        "damaged": f"{head}\n{row}\n{row[:20]}\n{row}\n",
        "no row": f"{head}\n{{}}\n{row}\n",
        "null": f"{head}\n{row}\nnull\n{row}\n",
        "a list": f"{head}\n{row}\n[1]\n",
        "a word": f'{head}\n{row}\n{{"unsure_before":"x"}}\n',
        "an odd gap": f'{head}\n{row}\n{{"missed":3}}\n{row}\n',
        "a norm of null": f"{head}\n{row.replace('1.0', 'null', 1)}\n",
        "too deep": f'{{"optaxclip_log":1,"a":{"[" * 600}{"]" * 600}}}\n{row}\n',
        "CR": f"{head}\r{row}\r",
        "CR LF": f"{head}\r\n{row}\r\n",
        "no steps": f"{head}\n",
    }
    if content is not None:
        path.write_text(contents.get(content, content), newline="")
    error = failed(capsys, arguments(command, path))
    assert f"optaxclip: {path}{message}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_directory(capsys, tmp_path, command):
    error = failed(capsys, arguments(command, tmp_path))
    assert error == f"optaxclip: {tmp_path}: Is a directory\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_is_refused_at_once(capsys, tmp_path, command):
    path = tmp_path / "run.jsonl"
    os.mkfifo(path)
    error = failed(capsys, arguments(command, path))
    assert error == f"optaxclip: {path}: Not a regular file\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_a_file_without_permission(capsys, run_log, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(run_log.read_bytes())
    path.chmod(0)
    error = failed(capsys, arguments("summary", path))
    assert error == f"optaxclip: {path}: Permission denied\n"


def test_an_error_of_the_system_without_a_file_name(capsys, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_commands, "read", denied)
    error = failed(capsys, arguments("summary", "run.jsonl"))
    assert error == "optaxclip: run.jsonl: Permission denied\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["plot"], "invalid choice: 'plot'"),
        (["summary"], "the following arguments are required: log"),
        (["replay", "run.jsonl"], "the following arguments are required: --rule"),
        (["summary", "run.jsonl", "--rule", "zscore"], "unrecognized arguments"),
        (
            ["replay", "run.jsonl", "--rule", "median:3"],
            "argument --rule: `median:3` is no rule: expected a call as in Python",
        ),
        (
            ["replay", "run.jsonl", "--rule", "constant:-1"],
            "argument --rule: `constant(value=...)` must be non-negative, got -1.",
        ),
        (
            ["replay", "run.jsonl", "--rule", "quantile:95,1000"],
            "argument --rule: `quantile(q=...)` must be a number in [0, 1], got 95: "
            "the 95th percentile is q=0.95.",
        ),
    ],
)
def test_bad_usage(capsys, argv, message):
    assert message in refused(capsys, argv)


def test_a_rule_that_no_device_can_hold(capsys, run_log):
    argv = ["replay", str(run_log), "--rule", "ema:warmup=99999999999"]
    error = failed(capsys, argv)
    assert "the rule ema:warmup=99999999999 cannot be replayed: " in error


@pytest.mark.parametrize("command", ["replay", "suggest"])
def test_norms_below_0_which_only_a_norm_of_ones_own_can_be(capsys, tmp_path, command):
    rows = [{**logs.row(0, 1.0), "norm": -1.0}]
    path = logs.write(tmp_path / "run.jsonl", rows)
    error = failed(capsys, arguments(command, path))
    assert "(norms=...)` must be non-negative, got -1.0." in error


EXTREMES = {
    "a norm below 0": {"norm": lambda i: -1.0 if i == 3 else 1.0},
    "norms below 0": {"norm": lambda i: -1.0},
    "a norm of -infinity": {"norm": lambda i: "-inf" if i == 3 else 1.0},
    "a norm beyond float32": {"norm": lambda i: 1e300 if i == 3 else 1.0},
    "norms beyond float32": {"norm": lambda i: 1e300},
    "the largest norms": {"norm": lambda i: 1.7e308},
    "the smallest norms": {"norm": lambda i: 5e-324},
    "norms at both ends": {"norm": lambda i: 1e300 if i % 2 else 1e-300},
    "losses at both ends": {"loss": lambda i: 1.7e308 * (-1) ** i},
    "a steady loss below 0": {"loss": lambda i: -1e308},
    "large thresholds": {"threshold": lambda i: 1.7e308},
    "thresholds below 0": {"threshold": lambda i: "-inf"},
    "odd scales": {"scale": lambda i: "-inf" if i % 2 else "inf"},
    "odd leaves": {"leaf_norms": lambda i: [1e300, -1.0, "-inf"]},
    "the last steps": {"step": lambda i: i + 2**63 - 40},
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.sample(1)
def test_numbers_of_float64_never_end_in_a_traceback(
    capsys, monkeypatch, tmp_path, name
):
    monkeypatch.setattr(page_module, "_alternatives", logs.no_alternatives)
    changes = EXTREMES[name]
    leaves = ("a", "b", "c") if "leaf_norms" in changes else ()
    rows = [
        logs.row(i, 1.0) | {key: value(i) for key, value in changes.items()}
        for i in range(30)
    ]
    path = logs.write(tmp_path / "run.jsonl", rows, leaf_names=leaves)
    for command in ("summary", "report"):
        assert _cli.main(arguments(command, path)) == 0
    for command in ("suggest", "replay"):
        status = _cli.main(arguments(command, path))
        printed = capsys.readouterr()
        assert (status, printed.err.count("\n")) in [(0, 0), (1, 1)]
        assert "`" in printed.err or not status


HEADS = [
    {"parameter_count": "many"},
    {"parameter_count": [1]},
    {"parameter_count": True},
    {"device": "cpu"},
    {"device": [3]},
    {"device": {"kind": {"a": 1}}},
    {"started": 3, "transform": {"a": 1}, "versions": None, "hyperparameters": [None]},
    {"resumed": 3},
    {"hyperparameters": {"a": [[[[1, [2, {"b": [float("nan")]}]]]]]}},
]


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_first_line_of_other_types(capsys, monkeypatch, tmp_path, head):
    monkeypatch.setattr(page_module, "_alternatives", logs.no_alternatives)
    monkeypatch.setattr(page_module.stills, "image", lambda _: "")
    rows = [logs.row(i, 1.0) for i in range(3)]
    path = logs.write(tmp_path / "run.jsonl", rows, **head)
    for command in ("summary", "report"):
        assert _cli.main(arguments(command, path)) == 0
    assert _cli.main(["summary", str(path), "--json"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "no/page.html"),
            "no/page.html: No such file or directory",
        ),
        (OSError(28, "No space left on device"), "page.html: No space left on device"),
        (
            IsADirectoryError(21, "`report(path=...)` cannot be written", "pages"),
            "pages: cannot be written",
        ),
        (
            ModuleNotFoundError("No module named 'jinja2'", name="jinja2"),
            'the report needs jinja2: pip install "optaxclip[audit]"',
        ),
    ],
)
def test_a_report_that_cannot_be_written(capsys, monkeypatch, run_log, error, message):
    def fail(*_, title):
        raise error

    monkeypatch.setattr(_commands, "report", fail)
    found = failed(capsys, ["report", str(run_log), "-o", "page.html"])
    assert found == f"optaxclip: {message}\n"


def test_no_log_for_a_page_that_exists(capsys, tmp_path):
    page, log = tmp_path / "page.html", tmp_path / "none.jsonl"
    page.write_text("old")
    error = failed(capsys, ["report", str(log), "-o", str(page)])
    assert error == f"optaxclip: {log}: No such file or directory\n"
    assert page.read_text() == "old"


def test_a_report_never_overwrites_the_log(capsys, run_log):
    before = run_log.read_bytes()
    error = failed(capsys, ["report", str(run_log), "-o", str(run_log)])
    assert "is the log: name another file for the page" in error
    assert run_log.read_bytes() == before


# -- as a process


def python(*argv, env=None, **options):
    # Buffered, as it is wherever nobody asked for the contrary.
    fixed = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    environment = {**os.environ, **fixed, **(env or {})}
    return subprocess.run(
        [sys.executable, *map(str, argv)], env=environment, check=False, **options
    )


def test_a_process_needs_neither_accelerator_nor_matplotlib(run_log):
    argv = ["-m", "optaxclip", "replay", run_log, "--rule", "zscore", "--json"]
    result = python(*argv, env={"JAX_PLATFORMS": "tpu"}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(strict(result.stdout)["outcomes"]) == 2


def test_a_failure_is_the_exit_status(tmp_path):
    argv = ["-m", "optaxclip", "summary", tmp_path / "none.jsonl"]
    result = python(*argv, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet(run_log):
    reading, writing = os.pipe()
    os.close(reading)
    argv = ["-m", "optaxclip", "summary", run_log]
    result = python(*argv, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has none")
def test_a_full_disk_is_said(run_log):
    with open("/dev/full", "w") as full:
        argv = ["-m", "optaxclip", "summary", run_log]
        result = python(*argv, stdout=full, stderr=subprocess.PIPE, text=True)
    expected = "optaxclip: standard output: No space left on device\n"
    assert (result.returncode, result.stderr) == (1, expected)


def test_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["optaxclip"].partition(":")
    assert getattr(importlib.import_module(module), name) is _cli.main
    audit = project["optional-dependencies"]["audit"]
    assert audit == ["jinja2", "matplotlib", "rich"]


def test_a_terminal_that_lacks_a_character(run_log, tmp_path):
    log = shutil.copy(run_log, tmp_path / "Gaïffas.jsonl")
    argv = ["-m", "optaxclip", "suggest", log]
    result = python(*argv, env={"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"Ga\xefffas" in result.stdout
