"""Size of a report's page, and time to write it and to draw it in Chromium.

    python benchmarks/report_page.py

Needs Playwright and Chromium for the last column.
"""

import pathlib
import shutil
import tempfile
import time

import numpy as np
from playwright.sync_api import sync_playwright

from optaxclip.audit import LogData, report

CASES = {
    "20,000 steps x 12 parameters": (20_000, 12),
    "1,000,000 steps": (1_000_000, 0),
}
DRAWN = "() => document.querySelectorAll('.panel canvas').length > 0"
ZOOM = """() => { const start = performance.now();
  document.querySelector('[aria-label="Zoom in"]').click();
  return Promise.resolve().then(() => performance.now() - start); }"""


def run(steps: int, leaves: int) -> LogData:
    rng = np.random.default_rng(0)
    norm = rng.lognormal(sigma=0.3, size=steps)
    norm[rng.integers(0, steps, steps // 1000)] *= 50
    norm[[steps // 4, steps // 2]] = np.nan
    threshold = 1.5 * (1 + 0.1 * np.sin(np.arange(steps) * 10 / steps))
    scale = np.minimum(1, threshold / norm)
    shares = rng.dirichlet(np.full(leaves, 3.0), steps) if leaves else None
    return LogData(
        metadata={},
        step=np.arange(steps),
        norm=norm,
        threshold=threshold,
        scale=scale,
        loss=2 + 0.1 * rng.normal(size=steps),
        clipped=scale < 1,
        skipped=~np.isfinite(norm),
        leaf_names=tuple(f"layers_{i}/kernel" for i in range(leaves)),
        leaf_norms=None if shares is None else norm[:, None] * np.sqrt(shares),
    )


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    folder = pathlib.Path(tempfile.mkdtemp())
    report(run(100, 1), folder / "warm.html")  # imports
    print(f"{'run':30} {'bytes':>10} {'CPU to write':>12} {'drawn in':>10} {'zoom':>8}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox"]
        )
        for name, (steps, leaves) in CASES.items():
            data = run(steps, leaves)
            start = time.process_time()
            path = report(data, folder / "page.html")
            took = time.process_time() - start
            page = chromium.new_page()
            page.goto("about:blank")
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_function(DRAWN, timeout=60_000)
            drawn = time.perf_counter() - start
            page.wait_for_timeout(2000)
            zoom = page.evaluate(ZOOM)
            size = path.stat().st_size
            cells = f"{took:>10.1f} s {drawn:>8.1f} s {zoom:>5.0f} ms"
            print(f"{name:30} {size:10,} {cells}")


if __name__ == "__main__":
    main()
