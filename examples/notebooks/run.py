"""Executes the notebooks and writes their outputs back, free of whatever is volatile.

    pip install -e ".[test]"                 # in a checkout
    python examples/notebooks/run.py         # all of them, some minutes
    python examples/notebooks/run.py the_cliff.ipynb many_devices.ipynb

Edit a notebook in Jupyter or Colab, then run this and commit what it wrote. Each
notebook runs from top to bottom in a fresh kernel of this Python, in an empty folder.
The first error ends the program, and the notebook stays as it was. Execution times,
kernel versions and the like are removed. The metadata get a hash of all cells, so that
`tests/examples/test_notebooks.py` notices outputs that belong to other cells.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TIMEOUT = 600  # seconds a cell: two slow cores may be busy with something else
# Devices and drawing as another program has set them: not for the kernel.
FORGET = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "MPLBACKEND")


def load(path: Path) -> NotebookNode:
    """A notebook, checked against its format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def source_hash(notebook: NotebookNode) -> str:
    """Of the cells as they are written, whatever came out of them."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def execute(notebook: NotebookNode, import_from: Sequence[str], **env: str) -> None:
    """Runs all cells in place; raises `CellExecutionError` at the first that fails."""
    inherited = {key: value for key, value in os.environ.items() if key not in FORGET}
    # Absolute paths, since the kernel works in a folder of its own.
    folders = [str(Path(folder).resolve()) for folder in import_from if folder]
    env = inherited | {"PYTHONPATH": os.pathsep.join(folders)} | env
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            startup_timeout=TIMEOUT,
            kernel_name=KERNEL["name"],
            resources={"metadata": {"path": folder}},
            coalesce_streams=True,
            record_timing=False,
        )
        client.execute(env=env)


def normalize(notebook: NotebookNode) -> None:
    """Leaves what a reader sees, and nothing that differs from one run to the next."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": KERNEL,
            "language_info": {"name": "python"},
            "source_sha256": source_hash(notebook),
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in ("tags",) if key in cell.metadata}
        )
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
            data = output.get("data", {})
            if "image/png" in data:  # "<Figure size 640x400 with 1 Axes>" is no news
                data.pop("text/plain", None)


def write(notebook: NotebookNode, path: Path) -> None:
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="names in this folder; else all")
    names = parser.parse_args().notebooks
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        start = time.monotonic()
        notebook = load(path)
        # This checkout, whatever is installed.
        execute(notebook, [str(ROOT)])
        normalize(notebook)
        write(notebook, path)
        seconds, kilobytes = time.monotonic() - start, path.stat().st_size / 1e3
        print(f"{path.name:<32} {seconds:4.0f} s  {kilobytes:4.0f} kB", flush=True)


if __name__ == "__main__":
    main()
