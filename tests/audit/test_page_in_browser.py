"""The page of a report in Chromium: what the eye, the mouse and the keyboard meet."""

import contextlib
import shutil

import logs
import numpy as np
import pytest

from optaxclip.audit import read, report
from optaxclip.audit._report import page as page_module
from optaxclip.audit._report import statistics as stats

sync_api = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium or Chrome")

# Every pixel of a plot that is not the background.
INK = """canvas => { const {data} = canvas.getContext("2d")
  .getImageData(0, 0, canvas.width, canvas.height); let ink = 0;
  for (let i = 3; i < data.length; i += 4) ink += data[i] > 0; return ink; }"""
TOP = "plot => plot.getBoundingClientRect().top + scrollY"
SEEN = "[...document.images].map(image => image.offsetWidth > 0)"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A log of 1,000 steps with skips and spikes, and its page."""
    folder = tmp_path_factory.mktemp("browser")
    data = read(logs.long_run(folder / "run.jsonl", steps=1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "_alternatives", logs.no_alternatives)
        return data, report(data, folder / "page.html")


@contextlib.contextmanager
def opened(browser, path, width=1200, **options):
    """The page, which says nothing on the console and asks for nothing else."""
    said, asked = [], []
    context = browser.new_context(
        viewport={"width": width, "height": 900}, offline=True, **options
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    if options.get("java_script_enabled", True):
        page.wait_for_selector(".panel canvas")
    yield page
    context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}


def plots(page):
    return page.locator(".u-over")


def read_at(page, plot, share):
    """What the page says of the step at a share of the width of a plot."""
    width = plot.evaluate("plot => plot.clientWidth")
    plot.hover(position={"x": 1 + share * (width - 2), "y": 30})
    return page.inner_text("#readout")


def first_and_last(page):
    """The steps at the two ends of what is seen."""
    return [step_of(read_at(page, plots(page).first, share)) for share in (0, 1)]


def step_of(text):
    return int(text.partition(":")[0].removeprefix("step "))


def drag(page, plot, start, end):
    read_at(page, plot, start)
    page.mouse.down()
    read_at(page, plot, (start + end) / 2)
    read_at(page, plot, end)
    page.mouse.up()


def test_pointing_at_a_plot_reads_the_row_of_the_step(browser, run):
    data, path = run
    with opened(browser, path) as page:
        assert plots(page).count() == 5
        assert all(page.eval_on_selector_all("canvas", f"all => all.map({INK})"))
        text = read_at(page, plots(page).last, 0.4)
        row = step_of(text)
        assert abs(row - 400) < 5
        for name in ("norm", "threshold", "scale", "loss"):
            value = float(getattr(data, name)[row])
            shown = float(
                text.split(f"· {name} " if name != "norm" else "norm ")[1].split()[0]
            )
            assert shown == pytest.approx(value, rel=0.006)
        largest = stats.largest_leaf(data, row)
        assert f"largest parameter {largest} (" in text
        assert page.evaluate(SEEN) == [False]  # the still picture


@pytest.mark.slow
def test_a_drag_zooms_all_plots_and_a_double_click_ends_it(browser, run):
    with opened(browser, run[1]) as page:
        assert first_and_last(page) == [
            pytest.approx(0, abs=2),
            pytest.approx(999, abs=2),
        ]
        drag(page, plots(page).nth(3), 0.2, 0.5)
        low, high = first_and_last(page)
        assert (low, high) == (pytest.approx(200, abs=6), pytest.approx(500, abs=6))
        # Each plot reads the same steps: their axes line up.
        boxes = [plots(page).nth(i).bounding_box() for i in range(5)]
        assert len({(box["x"], box["width"]) for box in boxes}) == 1
        plots(page).first.dblclick()
        assert first_and_last(page)[1] > 990


@pytest.mark.slow
def test_a_click_on_an_event_or_finding_goes_there(browser, run):
    data, path = run
    with opened(browser, path) as page:
        for place in (".finding a[data-step]", "table a[data-step]"):
            link = page.locator(place).first
            step = int(link.inner_text())
            link.click()
            assert step_of(page.inner_text("#readout")) == step
            low, high = first_and_last(page)
            assert low <= step <= high
            assert high - low <= 101
        text = page.inner_text("#readout")
        page.locator('table a[data-step="250"]').click()
        text = page.inner_text("#readout")
        assert "norm NaN" in text
        assert "skipped" in text
        assert f"NaN or infinite in {data.leaf_names[3]}" in text


@pytest.mark.slow
def test_the_keyboard_moves_and_zooms(browser, run):
    with opened(browser, run[1]) as page:
        page.locator("#panels").focus()
        page.keyboard.press("Home")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Shift+ArrowRight")
        assert step_of(page.inner_text("#readout")) == 13
        page.keyboard.press("+")
        low, high = first_and_last(page)
        assert high - low < 600
        page.get_by_role("button", name="All steps").click()
        assert first_and_last(page)[1] > 990


@pytest.mark.slow
def test_the_step_that_was_read_stays_where_it_is_when_plots_are_drawn_again(
    browser, run
):
    line = ".panel:first-child .u-cursor-x"
    with opened(browser, run[1]) as page:
        page.locator("#panels").focus()
        page.keyboard.press("Home")
        for _ in range(30):
            page.keyboard.press("Shift+ArrowRight")
        place = page.locator(line).bounding_box()["x"]
        page.get_by_label("Log norms").uncheck()
        page.get_by_label("Smoothing").select_option("30 steps")
        assert step_of(page.inner_text("#readout")) == 300
        assert page.locator(line).bounding_box()["x"] == pytest.approx(place, abs=1)


@pytest.mark.slow
def test_log_linear_smoothing_and_hiding_change_the_plot(browser, run):
    with opened(browser, run[1]) as page:
        picture = plots(page).first.locator("xpath=../..")
        seen = [picture.screenshot()]
        page.get_by_label("Log norms").uncheck()
        seen.append(picture.screenshot())
        page.get_by_label("Smoothing").select_option("100 steps")
        assert page.get_by_role("button", name="median of 100 steps").count() == 2
        seen.append(picture.screenshot())
        line = page.get_by_role("button", name="norm before clipping")
        line.click()
        assert line.get_attribute("aria-pressed") == "false"
        page.mouse.move(0, 0)
        seen.append(picture.screenshot())
        assert len(set(seen)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_by_the_setting_of_the_reader(scheme, browser, run):
    with opened(browser, run[1], color_scheme=scheme) as page:
        style = "getComputedStyle(document.body)"
        channels = "color => color.match(/\\d+/g).slice(0, 3).map(Number)"
        paper = page.evaluate(f"({channels})({style}.backgroundColor)")
        ink = page.evaluate(f"({channels})({style}.color)")
        assert (np.mean(paper) < 60) == (np.mean(ink) > 200) == (scheme == "dark")
        assert contrast(paper, ink) > 7
        page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        page.wait_for_function(f"({channels})({style}.color)[0] != {ink[0]}")


def contrast(a, b):
    """The contrast of two colors as WCAG has it."""

    def luminance(color):
        part = np.asarray(color) / 255
        linear = np.where(part > 0.04045, ((part + 0.055) / 1.055) ** 2.4, part / 12.92)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
def test_on_a_phone_nothing_is_wider_than_the_screen(browser, run):
    with opened(browser, run[1], width=400, has_touch=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        plots(page).first.tap()
        assert step_of(page.inner_text("#readout")) >= 0
        wide = "all => all.filter(x => x.scrollWidth > x.clientWidth).length"
        assert page.eval_on_selector_all("div.scroll", wide) >= 1  # by itself


@pytest.mark.slow
def test_on_paper_the_still_picture_stands_for_the_plots(browser, run):
    with opened(browser, run[1]) as page:
        page.emulate_media(media="print")
        assert page.evaluate(SEEN) == [True]
        assert not page.locator("#live").is_visible()
        assert page.pdf().startswith(b"%PDF")


@pytest.mark.slow
def test_a_page_of_a_run_that_goes_on_loads_itself_again(browser, run, tmp_path):
    def write(title):
        return report(run[0], tmp_path / "page.html", title=title, refresh=1)

    title = "() => document.title === '{}'".format
    with (
        pytest.MonkeyPatch.context() as patch,
        opened(browser, write("first")) as page,
    ):
        patch.setattr(page_module, "_alternatives", logs.no_alternatives)
        write("second")
        page.wait_for_function(title("second"))
        page.wait_for_selector(".panel canvas")
        page.get_by_role("button", name="Zoom in").click()
        write("third")
        page.wait_for_timeout(2500)
        assert page.title() == "second"  # not under the hands of a reader
        page.get_by_role("button", name="All steps").click()
        page.wait_for_function(title("third"))


@pytest.mark.slow
def test_without_scripts_the_still_picture_remains(browser, run):
    with opened(browser, run[1], java_script_enabled=False) as page:
        image = page.locator(".still img")
        assert image.is_visible()
        assert image.bounding_box()["height"] > 300
        assert not page.locator("#live").is_visible()
        assert page.locator(".finding").count() >= 1


@pytest.mark.slow
def test_a_script_that_is_not_of_the_page_does_not_run(browser, run, tmp_path):
    source = run[1].read_text(encoding="utf-8")
    copy = tmp_path / "copy.html"
    copy.write_text(
        source.replace("</body>", "<script>document.title = 1</script></body>")
    )
    with (
        pytest.raises(AssertionError, match="Content Security Policy"),
        opened(browser, copy) as page,
    ):
        assert page.title() == "Gradient clipping report"


@pytest.mark.slow
def test_several_runs_lie_over_each_other(browser, tmp_path):
    hostile = "<img src=x onerror=alert(1)>"
    for name, steps in [("a", 300), ("b", 200)]:
        rows = [logs.row(i, 2.0 + i % 5, 4.0, loss=1.0) for i in range(steps)]
        logs.write(tmp_path / f"{name}.jsonl", rows)
    runs = {"a": tmp_path / "a.jsonl", hostile: tmp_path / "b.jsonl"}
    with opened(browser, report(runs, tmp_path / "page.html")) as page:
        legend = page.locator(".legend").first
        assert [b.inner_text() for b in legend.locator("button").all()] == [
            "a",
            hostile,
        ]
        dashes = [
            path.get_attribute("stroke-dasharray")
            for path in legend.locator("path").all()
        ]
        assert len(set(dashes)) == 2
        top = plots(page).first.evaluate(TOP)
        first, second = read_at(page, plots(page).first, 0.33).splitlines()
        assert plots(page).first.evaluate(TOP) == top  # still under the mouse
        assert first.startswith("a: step 10") or first.startswith("a: step 9")
        assert second.startswith(f"{hostile}: step ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm", [[np.nan] * 30, [1.5], [0.0] * 40, [np.inf, 1e-30, 1e30]]
)
def test_poor_logs_are_drawn_without_an_error(norm, browser, tmp_path):
    rows = [
        logs.row(i + 2**62, x, leaf_norms=[logs.number(x)]) for i, x in enumerate(norm)
    ]
    path = logs.write(tmp_path / "run.jsonl", rows, leaf_names=["a"])
    with opened(browser, report(path)) as page:
        page.locator("#panels").focus()
        page.keyboard.press("End")
        assert step_of(page.inner_text("#readout")) == 2**62 + len(norm) - 1


@pytest.mark.slow
def test_a_step_is_gone_to_by_its_number(browser, run):
    with opened(browser, run[1]) as page:
        field = page.get_by_label("Go to step")
        for typed, step in [("640", 640), ("640", 640), ("1,000,000", 999)]:
            page.get_by_label("Show all steps").click()
            field.fill(typed)
            field.press("Enter")
            assert step_of(page.inner_text("#readout")) == step
            assert field.get_attribute("aria-invalid") == "false"
        assert first_and_last(page)[0] == pytest.approx(949, abs=1)
        for typed, invalid in [("the last", "true"), ("", "false")]:
            field.fill(typed)
            field.press("Enter")
            assert field.get_attribute("aria-invalid") == invalid


@pytest.mark.slow
def test_a_run_that_never_clipped_has_no_plots_of_the_clip(browser, tmp_path):
    rows = [logs.row(i, 3.2 + 0.7 * (i % 2), 40.0) for i in range(100)]
    path = report(logs.write(tmp_path / "run.jsonl", rows))
    with opened(browser, path) as page:
        assert plots(page).count() == 1
        assert "No step was clipped, rescaled or skipped" in page.inner_text("#notes")


@pytest.mark.slow
def test_a_run_says_where_it_ends(browser, tmp_path):
    for name, first, steps in [("a", 0, 300), ("b", 100, 100)]:
        rows = [logs.row(first + i, 2.0 + i % 5, 4.0) for i in range(steps)]
        logs.write(tmp_path / f"{name}.jsonl", rows)
    runs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with opened(browser, report(runs, tmp_path / "page.html")) as page:
        for share, said in [(0.1, "starts at step 100"), (0.9, "ends at step 199")]:
            first, second = read_at(page, plots(page).first, share).splitlines()
            assert first.startswith("a: step ")
            assert second == f"b: {said}"
        page.locator("#panels").focus()
        page.keyboard.press("End")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#readout").startswith("a: step 298:")


# What a plot writes beside its axis, and where.
LABELS = """() => { const seen = []; const fill = CanvasRenderingContext2D.prototype;
  const before = fill.fillText;
  fill.fillText = function (text, x, y) { seen.push([text, x]);
    return before.call(this, text, x, y); };
  return new Promise((done) => {
    document.querySelector("[aria-label='Zoom in']").click();
    setTimeout(() => { fill.fillText = before; done(seen); }, 300); }); }"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("low", "high"), [(3.2, 3.9), (0.00311, 0.00312), (2.0e5, 9.0e8)]
)
def test_a_logarithmic_axis_always_has_numbers(low, high, browser, tmp_path):
    rows = [logs.row(i, (low, high)[i % 2], np.inf) for i in range(100)]
    with opened(browser, report(logs.write(tmp_path / "run.jsonl", rows))) as page:
        labels = {text for text, x in page.evaluate(LABELS) if x < 80}
        numbers = [float(text.replace(",", "")) for text in labels - {"", "step"}]
        assert len([x for x in numbers if low / 1.2 <= x <= high * 1.2]) >= 2
