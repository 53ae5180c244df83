"""The report says what the log says, in a page that is whole and needs nothing else."""

import base64
import dataclasses
import functools
import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import logs
import numpy as np
import pytest
from matplotlib.figure import Figure

from optaxclip.audit import LogData, compare, parse_rule, read, report, suggest
from optaxclip.audit._report import statistics as stats
from optaxclip.audit._report.figures import draw_histogram
from optaxclip.audit._text import number
from optaxclip.audit._what_if import optimizer_of
from optaxclip.audit._what_if.compare import cells, outcome

report_module = sys.modules[report.__module__]
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
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][1][-1][-1] += data
        if self.open and self.open[-1] != "style":
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
    """For tests of other things: compiling takes half the time."""
    monkeypatch.setattr(report_module, "_replays", lambda *_: "")


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
    labels = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert labels <= set(ids)
    assert "//" not in re.sub(r"base64,[\w+/=]*", "", source)
    assert not page.attributes("script")
    images = page.attributes("img")
    assert len(images) == len(page.attributes("source")) == 5
    assert all(len(image["alt"]) > 40 for image in images)
    pictures = [a["src"] for a in images] + [
        a["srcset"] for a in page.attributes("source")
    ]
    for uri in pictures:
        svg = base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,"))
        assert b"</svg>" in svg
    assert all(a["scope"] in ("col", "row") for a in page.attributes("th"))
    titles = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert titles[0] == "h1"
    assert titles.count("h1") == 1


def test_words_come_first_then_plots_then_tables(long_run):
    source = long_run[1].read_text(encoding="utf-8")
    places = [
        source.index(mark)
        for mark in ('class="headline"', 'class="finding', "<figure>", "<table")
    ]
    assert places == sorted(places)
    assert source.rindex("<figure>") < source.index("<table")


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
    assert rows["mean scale"] == number(data.scale[finite].mean())
    assert f"{clipped.sum()} clipped steps" in page.attributes("img")[0]["alt"]
    assert "4 steps missing: 7 to 9, 20 to 20; 1,234 steps run again" in page.text


def test_events_are_rows_of_the_log(long_run):
    data, path = long_run
    header, rows = parsed(path).table("largest")
    assert header[-1] == "largest parameter"
    assert len(rows) == 20
    for step, norm, threshold, scale, _, action, leaf in rows:
        i = int(step)
        assert norm == number(data.norm[i])
        assert threshold == number(data.threshold[i])
        assert scale == number(data.scale[i])
        assert action == ("clipped" if data.clipped[i] else "passed")
        assert leaf == data.leaf_names[np.argmax(data.leaf_norms[i])]
    times = [float(row[4]) for row in rows]
    assert times == sorted(times, reverse=True)
    largest = data.step[np.nanargmax(np.where(np.isinf(data.norm), 0, data.norm))]
    assert str(largest) in [row[0] for row in rows]
    bad = [int(row[0]) for row in parsed(path).table("nonfinite")[1]]
    assert bad == np.flatnonzero(~np.isfinite(data.norm)).tolist()


def test_replays_are_those_of_compare(long_run):
    data, path = long_run
    page = parsed(path)
    fixed, percentile, _ = suggest(data.norm, optimizer_of(data))
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
    assert not page.attributes("script")
    assert page.table("largest")[1][0][-1] == HOSTILE
    assert dict(page.table("settings")[1])["transform"] == HOSTILE
    assert HOSTILE in page.attributes("img")[-1]["alt"]
    assert page.text.count("alert") >= 6


@pytest.mark.usefixtures("no_replays")
def test_without_loss_and_leaves_their_parts_are_absent(tmp_path):
    page = written(log(np.linspace(1, 3, 500)), tmp_path)
    assert len(page.attributes("img")) == 3
    assert "Gradient norm of each parameter" not in page.text
    assert "Loss" not in page.text
    assert "largest parameter" not in page.table("largest")[0]
    assert "nonfinite" not in dict(page.tables)


@pytest.mark.parametrize(
    "norm", [[math.nan] * 50, [1.5], [0.0] * 40, [math.inf, 1e-30, 1e30]]
)
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
    assert "largest 777 at step 12345" in page.attributes("img")[0]["alt"]
    assert "median of every 50 steps" in page.text


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
    monkeypatch.setattr(report_module.Path, "replace", _fails)
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


PROBE = """<script>window.addEventListener("load", () => {
  const images = [...document.images], root = document.documentElement;
  document.title = JSON.stringify({
    loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
    narrow: images.filter(i => i.naturalWidth < i.naturalHeight * 1.5).length,
    width: root.scrollWidth, window: innerWidth,
    text: document.querySelector(".headline").textContent});
});</script></body>"""


def in_browser(path, folder, width):
    """The DOM that a page has in Chromium, and what Chromium says of it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("needs Chromium or Chrome on the PATH")
    quiet = ["gpu", "background-networking", "component-update", "sync", "extensions"]
    command = [browser, "--headless", "--no-sandbox", "--no-first-run"]
    command += [f"--disable-{what}" for what in quiet]
    command += [f"--user-data-dir={folder / 'browser'}", f"--window-size={width},900"]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [400, 1200])
def test_in_a_browser_every_picture_loads_and_nothing_overflows(
    width, long_run, tmp_path
):
    # The page forbids scripts, the probe among them.
    source = long_run[1].read_text(encoding="utf-8")
    source = source.replace("default-src", "script-src 'unsafe-inline'; default-src")
    copy = tmp_path / "copy.html"
    copy.write_text(source.replace("</body>", PROBE), encoding="utf-8")
    dom, messages = in_browser(copy, tmp_path, width)
    found = json.loads(re.search("<title>(.*?)</title>", dom)[1])
    assert found["loaded"] == 5
    assert found["narrow"] == (5 if width == 400 else 0), found
    # A headless window may be wider than asked for, by its least width.
    assert width <= found["window"] < width + 120
    assert found["width"] <= found["window"]
    assert found["text"].startswith("4,000 steps (0 to 3999)")
    assert "CONSOLE" not in messages


def test_the_page_itself_gives_no_console_error(long_run, tmp_path):
    dom, messages = in_browser(long_run[1], tmp_path, 400)
    assert "</html>" in dom
    assert "CONSOLE" not in messages


def test_the_page_lets_no_script_run(long_run, tmp_path):
    source = long_run[1].read_text(encoding="utf-8")
    copy = tmp_path / "copy.html"
    copy.write_text(source.replace("</body>", PROBE), encoding="utf-8")
    dom, messages = in_browser(copy, tmp_path, 400)
    assert "<title>Gradient clipping report</title>" in dom
    assert "CONSOLE" in messages  # so that its absence above means something


@pytest.mark.parametrize("width", [3.8, 9.2])
@pytest.mark.parametrize("span", [1, 1.3, 8, 29, 31, 1e3, 1e8])
def test_the_labels_of_the_histogram_do_not_overlap(span, width):
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    axes = figure.subplots()
    draw_histogram(axes, log(np.geomspace(0.13, 0.13 * span, 200)))
    figure.draw_without_rendering()
    labels = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
    low, high = axes.get_xlim()
    boxes = [
        label.get_window_extent()
        for label in labels
        if label.get_text() and low <= label.get_position()[0] <= high
    ]
    boxes.sort(key=lambda box: box.x0)
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert len(boxes) >= (span > 3)
