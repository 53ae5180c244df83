"""Whatever looks at a run takes a path, or what `read` returned."""

import dataclasses
import os
import sys

import logs
import numpy as np
import pytest

import optaxclip
from optaxclip.audit import ClipLog, compare, parse_rule, read, replay, suggest, summary


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    rows = [
        logs.row(i, 1.0 + i % 7, 3.0, loss=2.0, leaf_norms=[0.5, 1.0])
        for i in range(60)
    ]
    head = {"transform": "adamw", "leaf_names": ["a", "b"]}
    return logs.write(folder / "run.jsonl", rows, **head)


KINDS = {
    "path": lambda path: path,
    "text": str,
    "data": read,
    "log": ClipLog,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_function_takes_it(path, kind):
    log, norm = KINDS[kind](path), read(path).norm
    rule = parse_rule("constant:2.0")
    assert read(log).metadata == read(path).metadata
    np.testing.assert_array_equal(replay(rule, log).scales, replay(rule, norm).scales)
    assert compare({"a": rule}, log) == compare({"a": rule}, norm)
    assert summary(log) == summary(read(path))


def test_what_was_read_stays_what_it_is(path):
    data = read(path)
    assert read(data) is data
    assert os.fspath(ClipLog(path)) == str(path)


def test_a_summary_is_a_text_and_its_parts(path):
    said = summary(path)
    assert str(said) == repr(said)
    assert str(said).startswith(said.headline)
    assert said.statistics.steps == 60
    for finding in said.findings:
        assert f"[{finding.level}] {finding.title}. {finding.detail}" in str(said)
    empty = dataclasses.replace(read(path), step=np.arange(0))
    assert summary(empty) == ("No steps yet.", (), None)


def test_a_finding_names_its_steps(tmp_path):
    rows = [logs.row(i, 90.0 if i in (40, 50) else 1.0, 2.0) for i in range(100)]
    (finding,) = summary(logs.write(tmp_path / "run.jsonl", rows)).findings
    assert finding.steps == (40, 50)
    assert optaxclip.audit.Finding is type(finding)


def test_of_many_steps_the_first_and_the_last_are_told(tmp_path):
    bad = range(40, 90, 4)
    rows = [logs.row(i, 90.0 if i in bad else 1.0, 2.0) for i in range(100)]
    (finding,) = summary(logs.write(tmp_path / "run.jsonl", rows)).findings
    assert finding.detail.startswith(
        "Steps 40, 44, 48, …, 84, 88 (13 in all) had norms"
    )
    assert finding.steps == tuple(bad)


PRE = '<pre style="white-space: pre-wrap">'


def test_a_log_draws_itself(path):
    data = read(path)
    html = data._repr_html_()
    assert html.startswith(PRE + "60 steps (0 to 59)")
    assert html.count("<img ") == html.count("background: white") == 1
    axes = data.plot().axes
    assert [a.get_ylabel() for a in axes] == [
        "gradient norm",
        "scale",
        "share of steps",
        "loss",
        "norm by parameter",
    ]
    assert len({a.get_xlim() for a in axes}) == 1
    figure = ClipLog(path).plot()
    assert [a.get_ylabel() for a in figure.axes] == [a.get_ylabel() for a in axes]
    assert repr(data) == "LogData(60 steps, 0 to 59)"
    none = dataclasses.replace(data, step=np.arange(0))
    assert none._repr_html_() == f"{PRE}No steps yet.</pre>"
    with pytest.raises(ValueError, match="no steps yet"):
        none.plot()


def test_a_log_that_is_written_draws_itself_too(path, tmp_path):
    html = ClipLog(path)._repr_html_()
    assert html.startswith(f"{PRE}ClipLog(&#x27;{path}&#x27;)\n60 steps (0 to 59)")
    assert html.count("<img ") == 1
    nothing = ClipLog(tmp_path / "new.jsonl")._repr_html_()
    assert nothing.endswith("new.jsonl&#x27;): nothing written</pre>")


def test_which_parameters_were_not_finite_at_a_step(tmp_path):
    rows = [logs.row(i, 1.0, leaf_norms=[0.5, 1.0, 2.0]) for i in (3, 4, 6)]
    rows[1]["leaf_norms"] = ["nan", 1.0, "inf"]
    data = read(logs.write(tmp_path / "run.jsonl", rows, leaf_names=["a", "b", "c"]))
    assert data.nonfinite_leaves(4) == ("a", "c")
    assert data.nonfinite_leaves(6) == ()
    for step in (2, 5, 7):
        with pytest.raises(ValueError, match=f"must be a step of the log, got {step}"):
            data.nonfinite_leaves(step)
    with pytest.raises(ValueError, match="needs norms of parameters"):
        dataclasses.replace(data, leaf_norms=None).nonfinite_leaves(4)


def test_advice_knows_the_optimizer_of_a_log(path):
    norm = read(path).norm
    assert suggest(str(path)) == suggest(norm, "adamw")
    assert suggest(path, "sgd") == suggest(norm, "sgd")


def test_without_matplotlib_a_notebook_has_the_words(path, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith("optaxclip.audit._report.") and name.endswith("stills"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    assert "<img" not in read(path)._repr_html_()
