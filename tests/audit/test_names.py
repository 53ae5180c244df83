"""Names of leaves, files and transforms may be anything: what is shown is harmless."""

import base64
import io
import json
import pathlib
import re
import unicodedata
import xml.etree.ElementTree as ET

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import logs
import numpy as np
import pytest
from test_cli import COMMANDS, arguments, failed
from test_report import Page

from optaxclip import History, HistoryState
from optaxclip.audit import ClipLog, LogData, _cli, read, report
from optaxclip.audit._report import page as page_module
from optaxclip.audit._report import stills
from optaxclip.audit._text import printable, shown

# What moves a cursor, turns a direction, ends a line, hides or is no character.
HOSTILE = [
    *map(chr, range(32)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e",
    *"\u2066\u2067\u2068\u2069\ufeff\ufffe\uffff\ud800\udc80\udcff\udfff\U000e0041",
]
FRIENDLY = (
    "w_0/kernel [é ü ñ Å] 梯度 カーネル 기울기 Ωμέγα Привет שלום नमस्ते ½ ∇ 🙂 $x$ \\frac"
)
EVIL = "\x1b]0;mine\x07\x1b[2J\r\x85\u202egolb\u2066\ud800<b>&'\""

characters = st.one_of(st.characters(), st.sampled_from(HOSTILE))
names = st.text(characters, max_size=60)


def is_harmless(text, keep=""):
    return all(
        c in keep or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
        for c in text
    )


@pytest.mark.parametrize("character", HOSTILE)
def test_what_does_not_print_is_escaped(character):
    escaped = character.encode("unicode_escape").decode()
    assert re.fullmatch(r"\\([nrt]|x..|u....|U.{8})", escaped)
    assert printable(f"a{character}b") == shown(f"a{character}b") == f"a{escaped}b"


def test_ordinary_text_stays():
    assert printable(FRIENDLY) == shown(FRIENDLY) == FRIENDLY
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"


def test_a_long_name_keeps_its_ends():
    name = f"first/{'x' * 100_000}/last/kernel"
    assert shown(name, 20) == "firs…xxx/last/kernel"
    assert len(shown(name)) == len(shown("\x1b" * 1000)) == 200


@hypothesis.given(st.text(characters), st.integers(2, 300))
@hypothesis.settings(max_examples=300)
def test_any_text_is_shown_harmless_and_short(text, most):
    assert is_harmless(printable(text))
    assert is_harmless(shown(text, most))
    assert len(shown(text, most)) <= most
    assert shown(shown(text, most), most) == shown(text, most)


def write(path, *leaf_names, text="clip", steps=60):
    """A log in which the first leaf dominates."""
    share = [1.0, *[0.1] * (len(leaf_names) - 1)]
    rows = [
        logs.row(i, 1.0 + i % 7, 3.0, loss=1.0, leaf_norms=share) for i in range(steps)
    ]
    head = {"transform": text, "hyperparameters": {text: [text]}, "started": text}
    return logs.write(path, rows, leaf_names=leaf_names, **head)


def printed(capsys, *argv):
    code = _cli.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert is_harmless(out, keep="\n")
    assert is_harmless(err, keep="\n")
    (out + err).encode()  # no surrogates
    assert code == 0 or (err.count("\n") == 1 and err.startswith("optaxclip: "))
    return out + err


@hypothesis.given(name=names, text=names)
@hypothesis.settings(
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_a_terminal_is_sent_no_control_character(capsys, tmp_path, name, text):
    path = write(tmp_path / "run.jsonl", name, "b", "c", text=text)
    out = printed(capsys, "summary", path)
    assert f"{shown(name)} holds more than " in out
    log = ClipLog(path)
    assert is_harmless(repr(log), keep="\n")
    assert shown(name) in repr(log)
    summary = json.loads(printed(capsys, "summary", path, "--json"))
    assert summary["metadata"] == read(path).metadata


@hypothesis.given(name=st.text(characters, min_size=1))
@hypothesis.settings(
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_not_there_by_any_name(capsys, command, name):
    hypothesis.assume(not name.startswith("-"))
    hypothesis.assume(name.strip("./"))
    printed(capsys, *arguments(command, f"no/such/folder/{name}"))


@pytest.fixture
def evil_path(tmp_path):
    return tmp_path / "run\x1b[2J\u202e\udcff\n.jsonl"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_file_name(capsys, evil_path, command):
    write(evil_path, EVIL, "b", "c")
    out = printed(capsys, *arguments(command, evil_path))
    if command in ("suggest", "report"):
        assert "run\\x1b[2J\\u202e\\udcff\\n.jsonl" in out
    evil_path.write_text("no log\n")
    error = failed(capsys, arguments(command, evil_path))
    assert "run\\x1b[2J\\u202e\\udcff\\n.jsonl, line 1: this is no" in error
    assert is_harmless(error, keep="\n")


@pytest.mark.parametrize(
    "argv",
    [
        ["summary", "run.jsonl", f"--{EVIL}"],
        ["replay", "run.jsonl", "--rule", EVIL],
        ["replay", "run.jsonl", "--rule", f"constant:{EVIL}"],
        [EVIL],
    ],
)
def test_hostile_arguments(capsys, argv):
    with pytest.raises(SystemExit):
        _cli.main(argv)
    assert is_harmless(capsys.readouterr().err, keep="\n")


def test_errors_and_warnings_show_names_harmlessly(evil_path):
    def state(count, *leaf_names):
        x = jnp.ones(4)
        leaves = dict.fromkeys(leaf_names, x)
        return HistoryState(
            jnp.int32(count), History(x, x, x, x, x > 0, x > 2, x > 2, leaves), ()
        )

    log = ClipLog(evil_path)
    log.update(state(1, *[EVIL + str(i) for i in range(500)]))
    with pytest.warns(UserWarning, match="start a new file") as warned:
        log.update(state(2, "a"))
    (warning,) = warned
    assert is_harmless(str(warning.message))
    assert len(str(warning.message)) < 2000
    evil_path.write_text(f"{EVIL.encode(errors='ignore')}\n")
    with pytest.raises(ValueError, match="no optaxclip log") as error:
        ClipLog(evil_path)
    assert is_harmless(str(error.value))


def parsed(path):
    """A page that parses, its pictures too."""
    source = path.read_text(encoding="utf-8")
    assert is_harmless(source, keep="\n")
    page = Page(source)
    kinds = [a.get("type") for a in page.attributes("script")]
    assert kinds == ["application/json", None, None]
    for attributes in page.attributes("img"):
        ET.fromstring(base64.b64decode(attributes["src"].partition(",")[2]))
    return page


@hypothesis.given(leaf_names=st.lists(names, min_size=3, max_size=24), text=names)
@hypothesis.settings(
    max_examples=5,
    phases=[hypothesis.Phase.generate],  # to shrink pages takes minutes
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_a_page_with_any_names(monkeypatch, tmp_path, leaf_names, text):
    monkeypatch.setattr(page_module, "_alternatives", logs.no_alternatives)
    data = read(write(tmp_path / "run.jsonl", *leaf_names, text=text))
    page = parsed(report(data, tmp_path / "page.html", title=text))
    rows = dict(page.table("settings")[1])
    assert rows["transform"] == shown(text)
    assert page.table("largest")[1][0][-1] == (shown(leaf_names[0]) or "-")


@hypothesis.given(leaf_names=st.lists(names, min_size=24, max_size=24))
@hypothesis.settings(max_examples=5)
def test_a_picture_with_any_names(leaf_names):
    norms = np.ones((4, 24))
    flags = np.zeros(4, bool)
    columns = [norms[:, 0]] * 4
    data = LogData({}, np.arange(4), *columns, flags, flags, tuple(leaf_names), norms)
    uri = stills.uri({"": data})
    ET.fromstring(base64.b64decode(uri.partition(",")[2]))


def test_a_name_of_100_000_characters_makes_no_large_page(monkeypatch, tmp_path):
    monkeypatch.setattr(page_module, "_alternatives", logs.no_alternatives)
    name = f"first/{'x' * 100_000}"
    data = read(write(tmp_path / "run.jsonl", name, f"{name}/b", "c", text=name))
    path = report(data, tmp_path / "page.html", title=name)
    short = read(write(tmp_path / "run.jsonl", "first", "b", "c", text="clip"))
    size = report(short, tmp_path / "short.html", title="run").stat().st_size
    assert path.stat().st_size < size + 50_000
    parsed(path)


def test_a_plot_can_be_drawn(tmp_path):
    log = ClipLog(write(tmp_path / "run.jsonl", EVIL, "b", "c", text=EVIL))
    buffer = io.BytesIO()
    log.plot().savefig(buffer, format="svg")
    ET.fromstring(buffer.getvalue())
    assert is_harmless(log._repr_html_(), keep="\n")
    assert is_harmless(log.read()._repr_html_(), keep="\n")
    assert "<b>" not in log.read()._repr_html_()
    assert isinstance(log.path, pathlib.Path)
