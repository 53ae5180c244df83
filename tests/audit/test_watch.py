"""`optaxclip watch`: what a terminal shows of a run that goes on."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import logs
import numpy as np
import pytest
from rich.console import Console
from test_names import EVIL, is_harmless

from optaxclip.audit import _cli, read
from optaxclip.audit._log import Follower
from optaxclip.audit._watch import HEIGHT, chart, view, watch


def rows(start, end, norm=1.0):
    return [logs.row(i, norm, 2.0, loss=3.0) for i in range(start, end)]


def append(path, new):
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in new)


def shown(path, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(view(str(path), Follower(path).look(), width))
    return console.file.getvalue()


def test_a_follower_reads_what_is_new(tmp_path):
    path = logs.write(tmp_path / "run.jsonl", rows(0, 50))
    follower = Follower(path)
    assert len(follower.look().step) == 50
    assert follower.look() is None
    append(path, rows(50, 60))
    with path.open("a") as file:
        file.write('{"step":60,"norm":1.0,"thr')  # half a line is left for later
    assert len(follower.look().step) == 60
    with path.open("a") as file:
        file.write('eshold":2.0,"scale":1.0,"clipped":false,"skipped":false}\n')
    append(path, [{"rewound_to": 55}, *rows(55, 56, 9.0)])
    data = follower.look()
    expected = read(path)
    np.testing.assert_array_equal(data.norm, expected.norm)
    assert (data.step[-1], data.rewritten) == (55, expected.rewritten)
    logs.write(path, rows(0, 3))  # begun anew
    assert len(follower.look().step) == 3
    other = logs.write(tmp_path / "other.jsonl", rows(0, 90, 7.0))
    other.replace(path)  # by a longer one
    assert follower.look().norm.tolist() == [7.0] * 90
    logs.write(path, rows(0, 3))
    follower.look()
    append(path, [{"step": "x"}])
    with pytest.raises(ValueError, match=r"run\.jsonl, line 5: "):
        follower.look()


@pytest.mark.parametrize("width", [80, 200, 40])
def test_numbers_chart_and_events(tmp_path, width):
    norms = np.where(np.arange(400) % 100 == 60, 90.0, 1 + 0.01 * (np.arange(400) % 7))
    norms[300] = np.nan
    steps = [
        logs.row(i, x, 2.0, loss=3.0, leaf_norms=[logs.number(x)])
        for i, x in enumerate(norms.tolist())
    ]
    text = shown(logs.write(tmp_path / "run.jsonl", steps, leaf_names=[EVIL]), width)
    assert max(map(len, text.splitlines())) == width
    assert is_harmless(text, keep="\n")
    words = " ".join(text.replace("│", " ").split())
    assert "step 399 norm 1 threshold 2 scale 1 loss 3" in words
    if width >= 80:
        assert "clipped: 1.0% of the last 100 steps, 1.0% of all 400" in words
        assert "skipped: 1 NaN or infinite norm: 1" in words
        assert "step 360 90 2 clipped" in words
        assert "step 300 NaN 2 skipped" in words


def test_the_chart_has_the_largest_norm_of_each_stretch(tmp_path):
    norms = np.ones(1000)
    norms[505] = 100.0
    path = logs.write(
        tmp_path / "run.jsonl", [logs.row(i, x) for i, x in enumerate(norms.tolist())]
    )
    lines = chart(read(path), 50).plain.splitlines()
    assert len(lines) == HEIGHT + 1
    top = lines[0][10:]
    assert len(top.rstrip()) - 1 == 25  # of 50 columns the one of steps 500 to 519
    assert top.strip() != ""


@pytest.mark.parametrize("norm", [float("nan"), 0.0, 1e-300, 1e300])
def test_runs_of_one_norm(tmp_path, norm):
    path = logs.write(tmp_path / "run.jsonl", [logs.row(i, norm) for i in range(9)])
    assert "step 8" in shown(path)
    assert ("loss" in shown(path), "the last 9 steps, " in shown(path)) == (False, True)
    assert "No steps yet." in shown(logs.write(tmp_path / "none.jsonl", []))


def test_without_a_terminal_it_says_it_once(tmp_path, capsys):
    path = logs.write(tmp_path / "run.jsonl", rows(0, 9))
    assert _cli.main(["watch", str(path)]) == 0
    assert "step 8" in capsys.readouterr().out
    for name, message in [("none.jsonl", "No such file"), (".", "Is a directory")]:
        assert _cli.main(["watch", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err
    path.write_text("no log\n")
    assert _cli.main(["watch", str(path)]) == 1
    assert "run.jsonl, line 1: this is no optaxclip log" in capsys.readouterr().err


def test_ctrl_c_ends_it(tmp_path, monkeypatch):
    path = logs.write(tmp_path / "run.jsonl", rows(0, 9))
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        append(path, rows(8 + len(looks), 9 + len(looks)))

    monkeypatch.setattr(time, "sleep", sleep)
    watch(str(path), 5.0, console)
    assert looks == [5.0] * 3
    text = console.file.getvalue()
    assert "step 10" in text
    assert text.rindex("\x1b[?1049l") < text.rindex(
        "step 10"
    )  # the screen is given back


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # the child starts Python
@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_in_a_terminal(tmp_path, key):
    path = logs.write(tmp_path / "run.jsonl", rows(0, 9))
    ours, its = pty.openpty()
    argv = [sys.executable, "-m", "optaxclip", "watch", str(path), "--every", "0.2"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        argv,
        stdin=its,
        stdout=its,
        stderr=its,
        env=env,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(its)
    seen = _until(ours, b"step 8")
    append(path, rows(9, 12))
    seen += _until(ours, b"step 11")
    os.write(ours, key)
    assert process.wait(20) == 0
    assert b"Traceback" not in seen
    os.close(ours)


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # whose Ctrl-C is a signal


def _until(terminal, expected):
    seen, end = b"", time.monotonic() + 60
    while expected not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 65536)
    assert expected in seen, seen
    return seen
