"""The report says what the log says, in a page that is whole and needs nothing else."""

import base64
import dataclasses
import functools
import html.parser
import json
import math
import pathlib
import re
import zlib
from hashlib import sha256

import logs
import numpy as np
import pytest

from optaxclip.audit import LogData, compare, parse_rule, read, report, suggest
from optaxclip.audit._report import page as page_module
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.decimate import chosen_rows, stretches
from optaxclip.audit._report.payload import payload
from optaxclip.audit._text import number, share
from optaxclip.audit._what_if.compare import cells, outcome

VOID = {"meta", "link", "img", "source", "br"}
HOSTILE = '<script>alert("x")</script>&amp;\'</td></table>'


class Page(html.parser.HTMLParser):
    """The tags, texts and tables of a page; refuses tags that do not match."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.tables, self.texts = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append((attributes["aria-labelledby"], []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.tables[-1][1][-1][-1] += data
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def table(self, name):
        """Header and rows of a table."""
        header, *rows = dict(self.tables)[name]
        return header, rows

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def log(norm, threshold=2.0, **more):
    """The log of a clip with these norms."""
    norm = np.asarray(norm, float)
    bad = ~np.isfinite(norm)
    scale = np.where(
        bad, np.nan, np.minimum(1, threshold / np.where(bad | (norm == 0), 1, norm))
    )
    columns = {
        "metadata": {},
        "step": np.arange(len(norm)),
        "norm": norm,
        "threshold": np.full(len(norm), threshold),
        "scale": scale,
        "loss": np.full(len(norm), np.nan),
        "clipped": scale < 1,
        "skipped": bad,
    }
    return LogData(**columns | more)


def written(data, folder, **more):
    path = report(data, folder / "report.html", **more)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A log with everything, and its page."""
    folder = tmp_path_factory.mktemp("report")
    data = read(logs.long_run(folder / "run.jsonl", steps=4000))
    data = dataclasses.replace(data, missed=((7, 9), (20, 20)), rewritten=1234, torn=1)
    return data, report(data, folder / "report.html")


@pytest.fixture
def no_replays(monkeypatch):
    """For tests of other things: compiling and drawing take nearly all the time."""
    monkeypatch.setattr(page_module, "_alternatives", logs.no_alternatives)
    monkeypatch.setattr(page_module.stills, "image", lambda _: "<img alt='picture'>")


@functools.cache
def parsed(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_needs_nothing_else(long_run):
    path = long_run[1]
    source, page = path.read_text(encoding="utf-8"), parsed(path)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"] for a in page.attributes("a")}
    assert links <= {f"#{name}" for name in ids}
    assert len(links) == 6
    goals = {a["data-step"] for a in page.attributes("a") if "data-step" in a}
    assert {"1000", "2000", "3600"} <= goals
    labels = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert labels <= set(ids)
    assert not re.search(r"""(src|href|url\()[=("']*(https?:)?//""", source)
    data, *scripts = re.findall(r"<script[^>]*>(.*?)</script>", source, re.DOTALL)
    assert json.loads(data)["runs"][0]["steps"] == 4000
    (policy,) = [a["content"] for a in page.attributes("meta") if "http-equiv" in a]
    hashes = [base64.b64encode(sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{x}'" for x in hashes)
    assert len(scripts) == 2
    assert policy.startswith(f"default-src 'none'; script-src {allowed}; img-src data:")
    (image,) = page.attributes("img")
    assert len(image["alt"]) > 40
    svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
    assert b"</svg>" in svg
    assert all(a["scope"] in ("col", "row") for a in page.attributes("th"))
    titles = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert titles[0] == "h1"
    assert titles.count("h1") == 1


def test_words_come_first_then_plots_then_tables(long_run):
    source = long_run[1].read_text(encoding="utf-8")
    places = [
        source.index(mark)
        for mark in ('class="headline"', 'class="finding', "<figure", "<table")
    ]
    assert places == sorted(places)
    assert source.rindex("<figure") < source.index("<table")


def test_the_numbers_are_those_of_the_log(long_run):
    data, path = long_run
    page = parsed(path)
    finite = np.isfinite(data.norm)
    clipped = data.clipped & finite
    rows = dict(page.table("numbers")[1])
    largest = np.argmax(np.where(finite, data.norm, 0))
    assert rows["steps"] == "4,000 (0 to 3999)"
    assert rows["steps missed"] == "4 (7 to 9, 20 to 20)"
    assert rows["steps run again"] == "1,234"
    assert rows["torn lines dropped"] == "1"
    assert rows["clipped"] == f"{clipped.sum()} ({100 * clipped.mean():.1f}%)"
    assert rows["skipped"].startswith("5 (")
    assert rows["NaN or infinity"] == str((~finite).sum()) == "5"
    assert rows["spikes"] == str(len(stats.spikes(data)))
    assert rows["norm, median"] == number(np.median(data.norm[finite]))
    assert rows["norm, 95th percentile"] == number(np.quantile(data.norm[finite], 0.95))
    assert rows["norm, largest"] == f"{number(data.norm[largest])} at step {largest}"
    assert rows["scale, mean"] == number(data.scale[finite].mean())
    assert f"{clipped.sum()} clipped" in page.attributes("img")[0]["alt"]
    assert "4 steps missing: 7 to 9, 20 to 20; 1,234 steps run again" in page.text


def test_events_are_rows_of_the_log(long_run):
    data, path = long_run
    header, rows = parsed(path).table("largest")
    assert header[-1] == "largest parameter"
    assert 5 <= len(rows) <= 20
    assert all(float(row[4]) >= 2 for row in rows[5:])
    for step, norm, threshold, scale, _, loss, action, leaf in rows:
        i = int(step)
        assert norm == number(data.norm[i])
        assert threshold == number(data.threshold[i])
        assert scale == number(data.scale[i])
        assert loss == ("-" if np.isnan(data.loss[i]) else number(data.loss[i]))
        assert action == ("clipped" if data.clipped[i] else "passed")
        assert leaf == data.leaf_names[np.argmax(data.leaf_norms[i])]
    times = [float(row[4]) for row in rows]
    assert times == sorted(times, reverse=True)
    largest = data.step[np.nanargmax(np.where(np.isinf(data.norm), 0, data.norm))]
    assert str(largest) in [row[0] for row in rows]
    bad = [int(row[0]) for row in parsed(path).table("nonfinite")[1]]
    assert bad == np.flatnonzero(~np.isfinite(data.norm)).tolist()


def test_parameters_are_ranked_by_their_share_of_the_squared_norm(long_run):
    data, path = long_run
    rows = parsed(path).table("parameters")[1]
    norms = data.leaf_norms[np.isfinite(data.leaf_norms).all(axis=1)]
    norms = norms[norms.max(axis=1) > 0].astype(np.float64)
    shares = norms**2 / np.sum(norms**2, axis=1, keepdims=True)
    medians = dict(zip(data.leaf_names, np.median(shares, axis=0), strict=True))
    assert [row[0] for row in rows] == sorted(medians, key=medians.get)[::-1][:10]
    leads = np.argmax(norms, axis=1)
    for name, of_norm, lead in rows:
        at = data.leaf_names.index(name)
        assert of_norm == share(medians[name])
        assert lead == share(np.mean(leads == at))


def test_replays_are_those_of_compare(long_run):
    data, path = long_run
    page = parsed(path)
    fixed, percentile, _ = suggest(data)
    rules = {
        fixed.setting: fixed.rule,
        percentile.setting: percentile.rule,
        "twice the median of 100": "quantile:0.5,100*2",
        "z-score, as in ZClip": "zscore",
    }
    rules = {name: parse_rule(text) for name, text in rules.items()}
    expected = [outcome("as recorded", data.norm, data.scale)]
    expected += compare(rules, data.norm)
    assert page.table("replays")[1] == [list(cells(row)) for row in expected]
    assert fixed.reason in page.text
    assert percentile.reason in page.text


def test_the_metadata_are_all_there(long_run):
    data, path = long_run
    rows = dict(parsed(path).table("settings")[1])
    assert rows["transform"] == data.metadata["transform"]
    assert rows["versions: jax"] == "0.12.0"
    assert rows["device: kind"] == "TPU v5e"
    assert rows["hyperparameters: learning_rate"] == "0.0003"
    assert rows["parameter_count"] == "124439808"
    assert rows["leaf_names"] == ", ".join(logs.LEAVES)
    assert {key.split(":")[0] for key in rows} == set(data.metadata)


@pytest.mark.usefixtures("no_replays")
def test_metadata_of_any_shape(tmp_path):
    metadata = {
        "none": None,
        "empty": {},
        "deep": {"a": {"b": [1, 2.5]}},
        "mixed": [1, "x", None],
        "resumed": [{"started": "later"}, {"started": "last", "device": {"kind": "T"}}],
    }
    page = written(log([1.0, 3.0], metadata=metadata), tmp_path)
    assert dict(page.table("settings")[1]) == {
        "none": "null",
        "empty": "{}",
        "deep: a: b": "[1, 2.5]",
        "mixed": '[1, "x", null]',
        "resumed 1: started": "later",
        "resumed 2: started": "last",
        "resumed 2: device: kind": "T",
    }


@pytest.mark.usefixtures("no_replays")
def test_hostile_names_are_text(tmp_path):
    data = log(
        np.full(30, 3.0),
        metadata={"transform": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}},
        leaf_names=("a", HOSTILE, "$x_$ \\frac 梯度"),
        leaf_norms=np.tile([1.0, 5.0, 2.0], (30, 1)),
    )
    page = written(data, tmp_path, title=HOSTILE)
    assert len(page.attributes("script")) == 3
    assert page.table("largest")[1][0][-1] == HOSTILE
    assert dict(page.table("settings")[1])["transform"] == HOSTILE
    assert page.text.count("alert") >= 6


@pytest.mark.usefixtures("no_replays")
def test_without_loss_and_leaves_their_parts_are_absent(tmp_path):
    page = written(log(np.linspace(1, 3, 500)), tmp_path)
    assert "largest parameter" not in page.table("largest")[0]
    assert "nonfinite" not in dict(page.tables)


@pytest.mark.parametrize(
    "norm", [[math.nan] * 50, [1.5], [0.0] * 40, [math.inf, 1e-30, 1e30]]
)
@pytest.mark.sample(1)
def test_poor_logs_have_a_page(norm, tmp_path):
    leaf_norms = np.stack([norm, norm], axis=1)
    data = log(norm, leaf_names=("a", "b"), leaf_norms=leaf_norms)
    page = written(data, tmp_path)
    assert dict(page.table("numbers")[1])["steps"].startswith(f"{len(norm)} (")
    usable = np.isfinite(norm) & (np.asarray(norm) > 0)
    assert ("there is nothing to go by" in page.text) == (not usable.any())
    assert ("Problem Every norm was 0" in page.text) == (not np.any(norm))
    assert ("replays" in dict(page.tables)) == usable.any()


@pytest.mark.usefixtures("no_replays")
def test_a_long_run_loses_no_extreme(tmp_path):
    norm = np.random.default_rng(0).lognormal(size=30_000, sigma=0.3)
    norm[12_345] = 777.0
    page = written(log(norm), tmp_path)
    assert page.table("largest")[1][0][:2] == ["12345", "777"]


def test_a_log_without_steps_is_refused(tmp_path):
    path = logs.write(tmp_path / "run.jsonl", [])
    with pytest.raises(
        ValueError, match=re.escape("`report(data=...)` must hold a step, the log has")
    ):
        report(read(path), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("no_replays")
def test_the_page_is_replaced_at_once_and_always_the_same(tmp_path, monkeypatch):
    path = tmp_path / "new" / "folder" / "report.html"
    data = log(np.linspace(1, 3, 50))
    assert report(data, str(path)) == path
    first = path.read_bytes()
    assert report(data, path).read_bytes() == first
    monkeypatch.setattr(pathlib.Path, "replace", _fails)
    with pytest.raises(OSError, match="No space left"):
        report(log([5.0]), path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def _fails(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("no_replays")
@pytest.mark.parametrize("place", ["file/report.html", "folder"])
def test_an_unwritable_path_says_so(place, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        OSError, match=re.escape("`report(path=...)` cannot be written")
    ):
        report(log([1.0]), tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# -- several runs, and one kind of input


@pytest.mark.usefixtures("no_replays")
def test_several_runs_are_on_one_page(tmp_path):
    runs = {
        "low": log(np.full(60, 1.0), 0.5, metadata={"transform": "a", "seed": 1}),
        HOSTILE: log(np.full(40, 3.0), 2.0, metadata={"transform": "b", "seed": 1}),
    }
    page = written(runs, tmp_path)
    header, rows = page.table("differences")
    assert header == ["what", "low", HOSTILE]
    rows = {row[0]: row[1:] for row in rows}
    assert rows["steps"] == ["60 (0 to 59)", "40 (0 to 39)"]
    assert rows["transform"] == ["a", "b"]
    assert rows["norm, median"] == ["1", "3"]
    assert "seed" not in rows
    assert {"largest", "largest-1"} <= {*dict(page.tables)}
    data = json.loads(re.search(PAYLOAD, (tmp_path / "report.html").read_text())[1])
    assert [run["name"] for run in data["runs"]] == ["low", HOSTILE]
    assert len(page.attributes("script")) == 3


PAYLOAD = r'(?s)<script type="application/json" id="payload">(.*?)</script>'


@pytest.mark.usefixtures("no_replays")
def test_a_page_stands_beside_its_log(tmp_path):
    (tmp_path / "b").mkdir()
    rows = [logs.row(i, 1.0) for i in range(30)]
    paths = [tmp_path / "run.jsonl", tmp_path / "b" / "run.jsonl"]
    for path in paths:
        logs.write(path, rows)
    assert report(str(paths[0])) == tmp_path / "run.html"
    assert report(paths) == tmp_path / "report.html"
    assert Page((tmp_path / "report.html").read_text()).table("differences")[0] == [
        "what",
        f"{tmp_path.name}/run",
        "b/run",
    ]
    with pytest.raises(ValueError, match="must be given for a log without a path"):
        report(read(paths[0]))
    with pytest.raises(ValueError, match="is the log: name another file"):
        report(paths[0], paths[0])
    with pytest.raises(ValueError, match="must hold a log, got none"):
        report([], tmp_path / "page.html")


# -- what the script of a page is given


def unpacked(run):
    """The columns of a run, as the script of the page reads them."""
    content = zlib.decompress(base64.b64decode(run["bytes"]))
    kinds = {"f": "<f4", "u": "<u4"}
    columns, count = {}, run["rows"]
    for i, (name, kind) in enumerate(run["columns"]):
        planes = np.frombuffer(content, np.uint8, 4 * count, 4 * count * i)
        columns[name] = planes.reshape(4, -1).T.copy().view(kinds[kind])[:, 0]
    return columns


def test_the_script_is_given_every_row_of_a_short_log(long_run):
    data = long_run[0]
    run = payload(data, "a")
    columns = unpacked(run)
    assert run["rows"] == run["steps"] == 4000
    for name in ("norm", "threshold", "scale", "loss"):
        expected = getattr(data, name)
        finite = np.isfinite(expected)
        np.testing.assert_allclose(columns[name][finite], expected[finite], 2e-5)
        np.testing.assert_array_equal(np.isnan(columns[name]), np.isnan(expected))
    norms = columns["leaf0"]
    leaf = data.leaf_names.index(run["leaves"][0])
    finite = np.isfinite(norms)
    np.testing.assert_allclose(norms[finite], data.leaf_norms[finite, leaf], 2e-5)
    leaders = [run["leaders"][i] for i in columns["leader"]]
    expected = [stats.largest_leaf(data, i) for i in range(4000)]
    assert {a for a, b in zip(leaders, expected, strict=True) if a != b and b} == set()
    assert set(run["bad"]) == {1000, 2000, 2001, 2002, 3600}
    assert run["bad"][1000] == data.leaf_names[3]
    assert (columns["action"] & 1).sum() == stats.clipped(data).sum()
    assert run["bands"]["skipped"] == [[1000, 1000], [2000, 2002], [3600, 3600]]
    assert run["bands"]["reached"] == []


def test_a_long_log_keeps_its_extremes_and_its_shares():
    rng = np.random.default_rng(0)
    norm = rng.lognormal(size=200_000, sigma=0.3)
    norm[123_456], norm[77], norm[100_000] = 777.0, 1e-4, np.nan
    data = log(norm, 1.5)
    rows = chosen_rows(data, 1000)
    assert len(rows) < 3100
    assert {0, 77, 100_000, 123_456, 199_999} <= set(rows.tolist())
    near = rows[np.isfinite(norm[rows])]
    assert abs(np.median(norm[near]) - np.nanmedian(norm)) < 0.01
    run = payload(data, "")
    columns = unpacked(run)
    a, b = 100, len(columns["row"]) - 100
    share = int(columns["clippedBefore"][b] - columns["clippedBefore"][a])
    first, last = columns["row"][a], columns["row"][b]
    assert share == data.clipped[first:last].sum()
    assert len(run["bytes"]) < 1_000_000


ACTED = ["gradient norm", "scale", "share of steps"]


@pytest.mark.parametrize(
    ("changes", "panels"),
    [
        ({}, ["gradient norm"]),
        ({"norm": np.nan, "scale": np.nan}, ["gradient norm"]),
        ({"scale": 0.5, "clipped": True}, ACTED),
        ({"scale": 0.0, "skipped": True}, ACTED),
        ({"scale": 2.0}, ACTED),  # by `normalize`
    ],
)
def test_scale_and_shares_are_drawn_if_a_step_was_changed(changes, panels):
    ones, flags = np.ones(30), np.zeros(30, bool)
    loss = np.full(30, np.nan)
    data = LogData({}, np.arange(30), ones, 4 * ones, ones, loss, flags, flags)
    for name, value in changes.items():
        column = getattr(data, name).copy()
        column[7] = value
        data = dataclasses.replace(data, **{name: column})
    assert [axes.get_ylabel() for axes in data.plot().axes] == panels
    assert payload(data, "")["acted"] == (panels == ACTED)


@pytest.mark.parametrize(
    ("flags", "most", "expected"),
    [
        ([0, 0], 9, []),
        ([1, 1, 0, 1], 9, [[0, 1], [3, 3]]),
        ([1, 0, 1, 0, 0, 0, 1], 2, [[0, 2], [6, 6]]),
        ([1, 0, 0, 1, 0, 1], 1, [[0, 5]]),
    ],
)
def test_stretches(flags, most, expected):
    assert stretches(np.array(flags, bool), most).tolist() == expected


def test_a_restart_is_told_by_what_was_different(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "_alternatives", logs.no_alternatives)
    monkeypatch.setattr(page_module.stills, "image", lambda _: "<img alt='picture'>")
    first = {"started": "at noon", "versions": {"jax": "1", "optax": "2"}}
    later = {"started": "at one", "versions": {"jax": "1", "optax": "3"}}
    data = log([1.0] * 30, metadata={**first, "resumed": [later]}, restarts=(20,))
    page = written(data, tmp_path)
    assert dict(page.table("settings")[1]) == {
        "started": "at noon",
        "versions: jax": "1",
        "versions: optax": "2",
        "resumed 1: started": "at one",
        "resumed 1: versions: optax": "3",
    }
    assert dict(page.table("numbers")[1])["restarts"] == "1 (step 20)"
    both = written({"a": data, "b": log([1.0] * 30, metadata=first)}, tmp_path)
    rows = [row[0] for row in both.table("differences")[1]]
    assert rows == ["restarts"]


def test_a_parameter_without_a_gradient_in_most_steps_is_among_the_largest():
    norms = np.tile([[1.0, 0.5, 0.0]], (60, 1))
    norms[[20, 40], 2] = 90.0
    data = log(norms.max(axis=1), leaf_names=("a", "b", "c"), leaf_norms=norms)
    assert payload(data, "")["leaves"] == ["c", "a", "b"]


def test_a_value_between_two_gaps_has_a_dot():
    norms = np.zeros((200, 1))
    norms[50] = 90.0
    data = log(np.ones(200), leaf_names=("a",), leaf_norms=norms)
    norm, *_, leaf = [axes.lines[0] for axes in data.plot().axes]
    assert (norm.get_marker(), leaf.get_markevery()) == ("None", [50])
