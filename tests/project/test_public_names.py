"""What a user sees of `optaxclip`: names, help, and what an import brings along."""

import inspect
import os
import pathlib
import pydoc
import re
import subprocess
import sys

import pytest

import optaxclip

ROOT = pathlib.Path(__file__).parents[2]
DOORS = (
    optaxclip,
    optaxclip.audit,
    optaxclip.contrib,
    optaxclip.rules,
    optaxclip.unit_axes,
)
FUNCTIONS = [
    getattr(door, name)
    for door in DOORS
    for name in door.__all__
    if inspect.isfunction(getattr(door, name))
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_name_resolves_once_and_in_order(door):
    assert door.__all__ == sorted(set(door.__all__))
    assert [name for name in door.__all__ if not hasattr(door, name)] == []
    public = {name for name in vars(door) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(door, name))}
    others = {"TYPE_CHECKING", "Any"}  # what `optaxclip` itself needs
    assert public - modules - others <= {*door.__all__}


def test_every_name_is_listed_in_the_docstring():
    _, _, listing = (optaxclip.__doc__ or "").partition("\n\n")
    assert {*optaxclip.__all__} - {*re.findall(r"\w+", listing)} == set()


@pytest.mark.parametrize("value", [*DOORS, *FUNCTIONS], ids=lambda x: x.__name__)
def test_help_shows_no_address(value):
    assert " at 0x" not in pydoc.render_doc(value)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)
def test_signatures_name_types_and_do_not_spell_them_out(function):
    signature = inspect.signature(function)
    parameters = {name: x.annotation for name, x in signature.parameters.items()}
    if optaxclip.__all__.count(function.__name__):
        assert all(isinstance(x, str) for x in parameters.values())
    assert parameters.get("axis_name", "AxisName") == "AxisName"


def test_the_slots_of_a_clip_and_a_skip_are_shown_by_name():
    for function in (optaxclip.clip_by, optaxclip.skip_by, optaxclip.guarded_step):
        parameters = inspect.signature(function).parameters
        assert parameters["norm"].annotation == "Norm"
        assert parameters["threshold"].annotation == "Threshold | Rule"


PROGRAM = """
import sys
import optaxclip

def loaded(name):
    return [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]

assert loaded("optaxclip") and not loaded("optaxclip.audit") + loaded("matplotlib")
assert not loaded("optaxclip.contrib")
assert optaxclip.contrib.clippy and loaded("optaxclip.contrib")
assert optaxclip.audit.read and loaded("optaxclip.audit")
import optaxclip.audit._cli
assert not loaded("matplotlib")
"""


def test_what_is_imported_when():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(
        argv, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_defaults_are_values_for_tools_that_read_them():
    parameters = inspect.signature(optaxclip.clip_by_percentile).parameters
    window, norm = parameters["window"].default, parameters["norm"].default
    assert window == 1000
    assert list(range(window))[-1] == 999
    assert norm == optaxclip.global_norm
    assert repr(norm) == "global_norm"
    assert len({window, 1000}) == 1
    optaxclip.clip_by_percentile(window=window, norm=norm)
