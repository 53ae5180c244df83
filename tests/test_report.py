"""The report says what the log says, in one well-formed page that a browser shows."""

import html.parser
import pathlib
import re
import shutil
import subprocess

import logs
import numpy as np
import pytest

from optaxclip.audit import LogData, read, report

VOID = {"meta", "link", "img", "source", "br", "hr", "input"}
BROWSER = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])),
    None,
)


class Page(html.parser.HTMLParser):
    """Checks the nesting of tags, and keeps what tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def long_log(tmp_path_factory):
    return read(logs.long_run(tmp_path_factory.mktemp("log") / "run.jsonl", 3000))


@pytest.fixture(scope="module")
def page(long_log, tmp_path_factory):
    path = report(long_log, tmp_path_factory.mktemp("report") / "new" / "report.html")
    return path


def short_log(norms, **changes):
    norms = np.asarray(norms, float)
    scale = np.where(np.isfinite(norms), 1 / np.maximum(norms, 1), np.nan)
    fields = {
        "metadata": {},
        "step": np.arange(len(norms)),
        "norm": norms,
        "threshold": np.ones(len(norms)),
        "scale": scale,
        "loss": np.full(len(norms), np.nan),
        "clipped": scale < 1,
        "skipped": np.zeros(len(norms), bool),
    }
    return LogData(**fields | changes)


def test_it_is_one_well_formed_page_that_loads_nothing(page):
    text = page.read_text()
    parsed = Page(text)
    assert not re.search(r"(src|href|srcset)=[\"']?(https?:|//|file:)", text)
    assert not re.search(r"@import|url\(", text)
    assert not parsed.attributes("script")
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in parsed.attributes("a")} == {f"#{i}" for i in ids}
    images = parsed.attributes("img")
    assert len(images) == 5
    assert all(len(image["alt"]) > 40 for image in images)
    assert all(heading.get("scope") for heading in parsed.attributes("th"))
    assert list(page.parent.iterdir()) == [page]  # no draft is left


def test_its_numbers_are_those_of_the_log(page, long_log):
    text = Page(page.read_text()).text
    finite = np.isfinite(long_log.norm)
    norms = long_log.norm[finite]
    largest = int(long_log.step[finite][np.argmax(norms)])
    clipped = np.mean(long_log.clipped & finite)
    for fact in [
        "3,000 steps (0 to 2999)",
        f"{100 * clipped:.1f} % clipped, {long_log.skipped.sum()} skipped",
        f"{np.sum(~finite)} not finite",
        f"median {np.median(norms):.3g}",
        f"95 % below {np.percentile(norms, 95):.3g}",
        f"largest {norms.max():.3g} at step {largest}",
        f"Mean scale {long_log.scale[finite].mean():.3f}",
        "124,439,808",
        "learning_rate",
    ]:
        assert fact in text, fact
    for step in long_log.step[~finite]:
        assert str(step) in text


def test_the_largest_events_stand_in_their_table(page, long_log):
    text = page.read_text()
    first = re.search(r"<tbody>\n<tr>(.*?)</tr>", text, re.DOTALL).group(1)
    cells = [re.sub("<.*?>", "", cell) for cell in first.split("</t")]
    finite = np.where(np.isfinite(long_log.norm), long_log.norm, 0)
    usual = np.array(
        [np.nanmedian(long_log.norm[max(0, i - 150) : i + 150]) for i in range(3000)]
    )
    step = int(np.argmax(finite / usual))
    assert cells[0].endswith(str(step))
    leaf = long_log.leaf_names[int(np.argmax(long_log.leaf_norms[step]))]
    assert leaf in first


def test_what_is_recorded_stands_beside_what_others_would_have_done(page, long_log):
    text = page.read_text()
    recorded = re.search(r"as recorded</th>(.*?)</tr>", text).group(1)
    finite = np.isfinite(long_log.norm)
    share = np.mean(long_log.clipped[finite])
    assert f">{100 * share:.1f} %<" in recorded
    assert f">{long_log.scale[finite].mean():.3f}<" in recorded
    assert "clip_by_percentile(95" in text
    assert "clip_by_global_norm(" in text


def test_without_losses_and_leaves_there_is_no_picture_of_them(tmp_path):
    path = report(short_log(np.linspace(0.5, 2, 300)), tmp_path / "r.html")
    parsed = Page(path.read_text())
    assert len(parsed.attributes("img")) == 3
    assert "largest leaf" not in parsed.text


ODD = {
    "one step": [2.0],
    "all NaN": [np.nan] * 5,
    "all zero": [0.0] * 5,
    "infinite": [1.0, np.inf, 2.0],
    "huge": [1e-30, 1e38, 3.0],
}


@pytest.mark.parametrize("norms", ODD.values(), ids=ODD)
def test_odd_logs(norms, tmp_path):
    data = short_log(norms, missed=((7, 9), (12, 12)), rewritten=3, torn=1)
    text = Page(report(data, tmp_path / "r.html", title="Odd").read_text()).text
    assert f"{len(norms):,} step" in text
    assert "4 (7 to 9, 12 to 12)" in text
    assert "Odd" in text


def test_what_is_in_a_log_is_text_and_no_markup(tmp_path):
    evil = "<script>alert('x')</script>&\"'"
    data = short_log(
        np.linspace(0.5, 9, 200),
        metadata={"transform": evil, "hyperparameters": {evil: [evil, {evil: 1}]}},
        leaf_names=(evil, "b"),
        leaf_norms=np.ones((200, 2)),
    )
    text = report(data, tmp_path / "r.html", title=evil).read_text()
    assert "<script" not in text
    assert evil in Page(text).text


def test_no_steps_and_no_place(tmp_path):
    with pytest.raises(ValueError, match="must hold a step, the log has none"):
        report(short_log([]), tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"`report\(path=\.\.\.\)` cannot be written"):
        report(short_log([1.0]), tmp_path / "file" / "r.html")


CHECK = """<script>window.addEventListener("load", () => {
  const images = [...document.images];
  const loaded = images.filter(i => i.complete && i.naturalWidth > 0).length;
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  document.title = `loaded ${loaded} of ${images.length}, over by ${Math.max(0, wide)}`;
});</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_every_picture_and_reports_no_error(page, width, tmp_path):
    """In a frame of this width, as browsers have windows of at least 500."""
    text = page.read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy".*?>', text).group()
    inner = tmp_path / "page.html"
    inner.write_text(text.replace(policy, "").replace("</body>", CHECK))
    plain = tmp_path / "plain.html"
    plain.write_text(text)
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!DOCTYPE html><title>waiting</title><body>"
        f'<iframe width="{width}" height="900" src="page.html"></iframe>'
        '<script>setInterval(() => { const d = document.querySelector("iframe")'
        ".contentDocument; if (d) document.title = d.title; }, 50);</script>"
    )
    assert inner.read_text().count("<script>") == 1

    def browse(path):
        return subprocess.run(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--allow-file-access-from-files",
                "--enable-logging=stderr",
                "--virtual-time-budget=3000",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--dump-dom",
                pathlib.Path(path).as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )

    shown = browse(outer)
    title = re.search("<title>(.*?)</title>", shown.stdout).group(1)
    assert title == "loaded 5 of 5, over by 0"
    for done in (shown, browse(plain)):
        assert not re.search(r"CONSOLE.*", done.stderr), done.stderr
