"""The defaults that the documentation and the study speak of."""

import inspect

import pytest

import optaxclip

DEFAULTS = {
    "clip_by_percentile": "10.0 1000 1.5 100 True 1",
    "autoclip": "10.0 10000",
    "zclip": "2.5 0.97 25",
    "adagc": "1.05 0.98 100 1.0",
    "skip_spikes": "6.0 128 64",
}


@pytest.mark.parametrize(("name", "expected"), DEFAULTS.items())
def test_defaults(name, expected):
    parameters = inspect.signature(getattr(optaxclip, name)).parameters.values()
    shown = [str(p.default) for p in parameters]
    assert " ".join(x for x in shown if x[0].isdigit() or x == "True") == expected
