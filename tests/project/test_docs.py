"""Every docstring example and every Python block of the pages runs."""

import contextlib
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys
import types

import jax
import pytest

import optaxclip

ROOT = pathlib.Path(__file__).parents[2]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(optaxclip.__path__, "optaxclip.")
    if not module.name.endswith("__main__")
]


# Each takes longer than 5 s: checkpoints, several devices, plots.
SLOW = {
    "docs/checkpoints.md",
    "docs/how_to/equinox.md",
    "docs/how_to/exploding_layer.md",
    "docs/how_to/lstm.md",
    "docs/how_to/per_layer.md",
    "docs/how_to/several_devices.md",
    "docs/log.md",
}


def program(page):
    """The Python blocks of a page, each on the lines that it has there."""
    inside, lines = False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" or (inside and not fence)
    return "\n".join(lines)


PAGES = [
    pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page
    for page in (
        path.relative_to(ROOT).as_posix()
        for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
        if program(path).strip()
    )
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.sample(60)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert doctest.testmod(module).failed == 0


TYPES = ("AxisName", "Norm", "Norms", "Rule", "Threshold")  # aliases have no docstring


@pytest.mark.parametrize("name", sorted({*optaxclip.__all__} - {*TYPES}))
def test_all_that_is_public_has_a_docstring_and_functions_an_example(name):
    value = getattr(optaxclip, name)
    assert value.__doc__
    needs_none = not inspect.isfunction(value) or name in ("rescale", "clamp")
    assert needs_none or ">>>" in value.__doc__


@pytest.fixture
def loggers(monkeypatch):
    """Stand-ins for services, with the calls that the pages make."""
    rows = []

    class Run(contextlib.nullcontext):
        def log(self, values, step):
            rows.append((step, values))

    run = Run()
    run.enter_result = run
    init = {"init": lambda project, mode=None: run}
    logging = {"log": run.log, "finish": lambda: None}
    for name, calls in {"wandb": init, "trackio": init | logging}.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**calls))
    return rows


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.sample(3)
def test_the_python_blocks_of_a_page_run_in_order(page, loggers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # pages write to `runs/`
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))
    text = program(ROOT / page)
    if "jax_num_cpu_devices" in text:  # to be set before JAX starts
        subprocess.run([sys.executable, "-c", text], check=True)
        return
    code = compile(text, ROOT / page, "exec")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, vars(sys.modules["page"]))
    assert len(loggers) == (10 if page == "docs/how_to/loggers.md" else 0)


@pytest.mark.slow
def test_the_page_on_loggers_runs_with_the_real_loggers(monkeypatch, tmp_path):
    for name in ("wandb", "trackio"):
        pytest.importorskip(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    text = program(ROOT / "docs" / "how_to" / "loggers.md")
    subprocess.run([sys.executable, "-c", text], check=True, cwd=tmp_path)
    for pattern in ("wandb/offline-run-*/*.wandb", "trackio/*.db", "runs/*/events*"):
        assert list(tmp_path.glob(pattern)), pattern
