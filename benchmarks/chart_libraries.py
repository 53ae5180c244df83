"""Compare libraries that could draw the report: bytes, and time to draw many steps.

    npm pack uplot && npm pack plotly.js-basic-dist-min  # and so on, unpacked
    python benchmarks/chart_libraries.py uplot=uPlot.js plotly=plotly-basic.js

Each library draws in Chromium, from a page with the content security policy of the
report: scripts by hash alone, so no `eval`. Needs Playwright and Chromium.
"""

import base64
import hashlib
import pathlib
import statistics
import sys
import tempfile

from playwright.sync_api import sync_playwright

# What draws `count` series `ys` over `x`; the last statement may return a promise.
DRAW = {
    "uplot": """
        const series = [{}, ...ys.map((_, i) => ({stroke: colors[i % 4], width: 1}))];
        new uPlot({width: 900, height: 400, scales: {x: {time: false}}, series},
                  [x, ...ys], place);""",
    "plotly": """
        return Plotly.newPlot(place, ys.map(y => ({x, y, mode: "lines"})),
                              {width: 900, height: 400});""",
    "bokeh": """
        const figure = Bokeh.Plotting.figure({width: 900, height: 400});
        ys.forEach(y => figure.line(Array.from(x), Array.from(y)));
        return Bokeh.Plotting.show(figure, place);""",
    "vega": """
        const values = [];
        ys.forEach((y, k) => x.forEach((step, i) => values.push({step, k, y: y[i]})));
        const q = {type: "quantitative"};
        return vegaEmbed(place, {width: 900, height: 400, data: {values}, mark: "line",
          encoding: {x: {field: "step", ...q}, y: {field: "y", ...q},
                     color: {field: "k", type: "nominal"}}}, {ast: true});""",
}
PAGE = """
  const steps = STEPS, count = COUNT, colors = ["#06c", "#c60", "#093", "#609"];
  const x = Float64Array.from({length: steps}, (_, i) => i);
  const ys = Array.from({length: count}, (_, k) =>
    Float64Array.from(x, i => k + Math.sin(i * (k + 1) / 700) + (i * 7919 % 97) / 97));
  const place = document.getElementById("place");
  const frame = () => new Promise(requestAnimationFrame);
  async function draw() { DRAW }
  (async () => {
    try {
      const start = performance.now();
      await draw(); await frame(); await frame();
      window.took = performance.now() - start;
    } catch (error) { window.took = String(error); }
  })();
"""
CASES = {"20,000 steps x 12": (20_000, 12), "1,000,000 steps x 1": (1_000_000, 1)}
REPEATS = 3


def page_of(library: str, name: str, steps: int, count: int) -> str:
    script = PAGE.replace("STEPS", str(steps)).replace("COUNT", str(count))
    scripts = [library, script.replace("DRAW", DRAW[name])]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:"
    )
    body = "".join(f"<script>{s}</script>" for s in scripts)
    return (
        '<!DOCTYPE html><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<div id="place"></div>{body}'
    )


def main() -> None:
    folder = pathlib.Path(tempfile.mkdtemp())
    print(f"{'library':10} {'bytes':>10}", *(f"{case:>22}" for case in CASES))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        for argument in sys.argv[1:]:
            name, _, path = argument.partition("=")
            library = pathlib.Path(path).read_text().replace("</script", "<\\/script")
            cells = []
            for steps, count in CASES.values():
                file = folder / "page.html"
                file.write_text(page_of(library, name, steps, count))
                cells.append(measured(browser, file))
            size = len(library.encode())
            print(f"{name:10} {size:10,}", *(f"{cell:>22}" for cell in cells))


def measured(browser, file: pathlib.Path) -> str:
    times = []
    for _ in range(REPEATS):
        page = browser.new_page()
        try:
            page.goto(file.as_uri(), timeout=90_000)
            took = "window.took !== undefined"
            page.wait_for_function(f"() => {took}", timeout=90_000)
            found = page.evaluate("window.took")
        except Exception as error:  # a time-out, or a page that ran out of memory
            found = type(error).__name__
        page.close()
        if isinstance(found, str):
            return found[:22]
        times.append(found)
    return f"{statistics.median(times):,.0f} ms"


if __name__ == "__main__":
    main()
