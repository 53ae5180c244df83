"""Every docstring example and every Python block of the pages runs."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import pytest

import optaxclip

ROOT = pathlib.Path(__file__).parents[2]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(optaxclip.__path__, "optaxclip.")
    if not module.name.endswith("__main__")
]


def python_blocks(page):
    return re.findall(
        r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    )


PAGES = [
    str(page.relative_to(ROOT))
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    if python_blocks(page)
]


@pytest.mark.parametrize("name", MODULES)
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


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_of_a_page_run_in_order(page):
    program = "\n".join(python_blocks(ROOT / page))
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
