"""`examples/notebooks`: committed as `run.py` writes them, and run as it runs them."""

import copy
import importlib.util
import itertools
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

import optaxclip

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = [
    "bad_batches",
    "choosing_a_threshold",
    "clip_in_five_minutes",
    "many_devices",
    "the_cliff",
    "which_layer_explodes",
]
COLAB = (
    "https://colab.research.google.com/github/optaxclip/optaxclip/blob/main/"
    "examples/notebooks"
)
MAIN = "https://github.com/optaxclip/optaxclip/blob/main/"
INSTALL = (
    '%pip install -q "optaxclip[examples] @ git+https://github.com/optaxclip/optaxclip"'
)


def load_run():
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load_run()


@pytest.fixture(params=NAMES)
def path(request):
    return FOLDER / f"{request.param}.ipynb"


@pytest.fixture
def cells(path):
    return run.load(path).cells


def of_kind(kind, cells):
    return [cell for cell in cells if cell.cell_type == kind]


def has_picture(cell):
    return any("image/png" in x.get("data", {}) for x in cell.get("outputs", []))


def stderr(cells):
    outputs = [x for cell in of_kind("code", cells) for x in cell.outputs]
    return "".join(x.text for x in outputs if x.get("name") == "stderr")


def test_these_are_all():
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == NAMES


def test_a_notebook_starts_with_title_badge_and_installation(path, cells):
    title, install = cells[:2]
    assert re.match(r"# \S.*\n\n\S", title.source)
    assert f"({COLAB}/{path.name})" in title.source
    assert install.source.startswith("try:\n    import optaxclip\nexcept ImportError:")
    assert INSTALL in install.source
    assert "jax.devices()" in install.source
    text = "\n".join(cell.source for cell in of_kind("markdown", cells))
    assert len(re.findall(r"^# ", text, re.M)) == 1


def test_outputs_are_those_of_the_cells_run_once_from_top_to_bottom(cells):
    code = of_kind("code", cells)
    assert [x.execution_count for x in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [x for x in outputs if x.output_type == "error"]
    assert not stderr(cells)


def test_it_is_as_run_py_wrote_it(path):
    """So its hash is that of the cells, and nothing volatile is left."""
    notebook = run.load(path)
    normal = copy.deepcopy(notebook)
    run.normalize(normal)
    assert normal.metadata == notebook.metadata
    assert nbformat.writes(normal).rstrip("\n") + "\n" == path.read_text("utf-8")
    assert path.stat().st_size < 600_000


def test_a_caption_in_words_follows_each_picture(cells):
    captions = [
        after.source for cell, after in itertools.pairwise(cells) if has_picture(cell)
    ]
    assert captions
    for caption in captions:
        assert caption.startswith("**What to see.** ")


def test_links_into_the_repository_lead_somewhere(cells):
    text = "\n".join(cell.source for cell in of_kind("markdown", cells))
    links = re.findall(r"\]\(([^)#]+)", text)
    beside = [FOLDER / link for link in links if "://" not in link]
    # Pages and scripts have whole addresses: Colab knows nothing of the folder.
    from_root = [ROOT / x.removeprefix(MAIN) for x in links if x.startswith(MAIN)]
    assert from_root
    assert not [path for path in beside + from_root if not path.is_file()]


# XLA ends a process whose devices wait 40 s for each other.
PATIENT = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)


def executed(notebook):
    """Its cells after a run that shows every warning."""
    run.execute(
        notebook,
        sys.path,  # import the package under test, which need not be installed
        JAX_PLATFORMS="cpu",
        PYTHONWARNINGS="default",
        XLA_FLAGS=PATIENT,
    )
    return notebook.cells


def warnings_of_ours(text):
    """Lines that warn of a cell or of the library, and not of another package."""
    library = re.escape(str(Path(optaxclip.__file__).parent))
    return re.findall(rf"^.*(?:ipykernel_\d+|{library})[/\\].*Warning.*$", text, re.M)


@pytest.mark.slow
def test_it_runs_in_a_fresh_kernel_without_a_warning_of_ours(path, cells):
    again = executed(run.load(path))
    assert not warnings_of_ours(stderr(again))
    assert [has_picture(cell) for cell in again] == [has_picture(x) for x in cells]


@pytest.mark.slow
def test_the_cliff_has_sliders_where_they_are_asked_for():
    notebook = run.load(FOLDER / "the_cliff.ipynb")
    (box,) = [x for x in notebook.cells if x.source.startswith("interactive = False")]
    box.source = "interactive = True"
    cells = executed(notebook)
    data = [x.get("data", {}) for x in cells[cells.index(box) + 1].outputs]
    assert any("application/vnd.jupyter.widget-view+json" in x for x in data)


@pytest.mark.slow
def test_an_error_in_a_cell_is_raised_and_a_warning_is_seen():
    raising = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("import warnings; warnings.warn('careful')"),
            nbformat.v4.new_code_cell("1 / 0"),
        ]
    )
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        executed(raising)
    assert len(warnings_of_ours(stderr(raising.cells))) == 1
