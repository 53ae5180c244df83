"""How Sphinx builds the site: `sphinx-build -W --keep-going docs docs/_build/html`.

Three kinds of pages live outside this folder, where people read them on GitHub, too:
the changelog, the gallery of examples and the notebooks. They are copied here first.
"""

import inspect
import re
from pathlib import Path

from sphinx.util.inspect import stringify_signature

import optaxclip

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "optaxclip"
author = "The optaxclip authors"
copyright = author
release = version = optaxclip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute"]
nitpicky = True

# Pages and notebooks.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs
nb_merge_streams = True

# The API.
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
# Types of other projects, and names that annotations use inside the package.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxlib|np|numpy|optax|collections|typing|pathlib|os)\..*"),
    ("py:class", "PyTree|Leaf|Path|Apply|Number|Ord|Ax(es|is|isFunction)"),
    ("py:class", "Start|Outlying|Scale"),
    ("py:class", "Figure"),  # of Matplotlib
]

# The look.
html_theme = "furo"
html_title = "optaxclip"
pygments_dark_style = "github-dark"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": "https://github.com/optaxclip/optaxclip",
    "source_branch": "main",
    "source_directory": "docs/",
}

# Links to files of the repository that are not pages.
FILES = "https://github.com/optaxclip/optaxclip/blob/main"
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}


def link(match):
    """A link from a page to a file outside `docs`: to its page here, or on GitHub."""
    target, _, anchor = match[1].partition("#")
    anchor = f"#{anchor}" if anchor else ""
    if page := PAGES.get(target):
        return f"]({page}{anchor})"
    return f"]({FILES}/{target}{anchor})"


def links_from_docs(app, name, source):
    """`../benchmarks/README.md` works on GitHub; on the site it needs an address."""
    source[0] = re.sub(r"\]\(\.\./([^)]*)\)", link, source[0])


def links_from_root(text, folder=""):
    """The same for a page that stands in the root, or in another folder of it."""

    def moved(match):
        target = match[1]
        if re.match(r"(https?:|mailto:|#)", target):
            return match[0]
        path = (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()
        inside = path.startswith("docs/")
        return f"]({path.removeprefix('docs/')})" if inside else f"](../{path})"

    return re.sub(r"\]\(([^)]*)\)", moved, text)


def write(path, text):
    """Writes a page if it changed, so that Sphinx reads no page again without need."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def gather(app):
    """Copies the pages from outside, and forgets notebooks that are gone."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        write(HERE / page, links_from_root(text, Path(source).parent))
    notebooks = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
    folder = HERE / "notebooks"
    for stale in set(folder.glob("*.ipynb")) - {folder / x.name for x in notebooks}:
        stale.unlink()
    for notebook in notebooks:
        write(folder / notebook.name, notebook.read_text(encoding="utf-8"))


def signature(app, what, name, value, options, signature, returns):
    """Types as the source names them: `Threshold`, not the fifteen that it stands for.

    Annotations of the package are strings. Sphinx would evaluate them.
    """
    if what not in ("function", "method"):
        return None
    found = inspect.signature(value)
    if what == "method":
        found = found.replace(parameters=[*found.parameters.values()][1:])  # no `self`
    shown = stringify_signature(found.replace(return_annotation=found.empty))
    if found.return_annotation in (found.empty, None):
        return shown, None
    return shown, stringify_signature(found).rpartition(" -> ")[2]


def setup(app):
    app.connect("autodoc-process-signature", signature)
    app.connect("builder-inited", gather)
    app.connect("source-read", links_from_docs)
