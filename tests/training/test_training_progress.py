"""What a run says while it goes, on a terminal (a real one) and elsewhere."""

import os
import pty
import re
import struct
import subprocess
import sys
import time
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest

from gsa.training import progress
from gsa.training.progress import Display

ROOT = Path(__file__).parent.parent.parent
LINE = {
    "step": 6,
    "loss": 2.345,
    "ppl": 10.43,
    "lr": 3e-4,
    "grad_norm": 0.5312,
    "tokens": 600,
    "tokens_per_s": 123456.7,
    "seconds": 2.0,
    "skipped": 0,
    "data_wait": 0.01,
}


@pytest.fixture
def lines(capsys):
    """A function that returns the lines said so far."""
    return lambda: capsys.readouterr().err.splitlines()


def test_the_numbers_of_a_line(lines):
    with Display(8) as display:
        display.step(8, 2.345, 123456.7)
        display.step(8, 2.345, 123456.7, LINE)
        more = {"seconds": 2.5, "mfu": 0.412, "memory_gib": 61.25, "skipped": 3}
        display.step(8, float("nan"), 9.0, LINE | more)
    short, whole, most = lines()
    assert short == "step 8/8 · loss 2.3450 · 123,457 tokens/s"
    assert whole.startswith(
        "step 8/8 · loss 2.3450 · ppl 10.43 · lr 3.00e-04 · gradient 0.531 · 123,457 tokens/s"
    )
    assert "MFU" not in whole and "skipped" not in whole
    assert most == (
        "step 8/8 · loss nan · ppl 10.43 · lr 3.00e-04 · gradient 0.531 · 3 skipped · 9 tokens/s · "
        "MFU 41.2% · 61.2 GiB · data wait 2.0% · ETA 0:00"
    )


def test_data_wait_is_a_share_of_the_step_and_unknown_right_after_a_resume(lines):
    with Display(5) as display:
        display.step(5, 1.0, 1.0, LINE | {"seconds": 0.04})
    assert "data wait 25.0%" in lines()[0]
    with Display(5) as display:
        display.resumed_at(3)
        display.step(5, 1.0, 1.0, LINE)
        display.step(5, 1.0, 1.0, LINE | {"seconds": 2.02})
    first, second = lines()
    assert "data wait" not in first and "data wait 50.0%" in second


def test_the_time_left_is_that_of_the_steps_after_the_first(lines, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Display(100) as display:
        display.resumed_at(10)
        now[0] += 300  # compiling
        display.step(11, 1.0, 1.0)
        now[0] += 20
        display.step(12, 1.0, 1.0)
        now[0] += 20
        display.step(13, 1.0, 1.0)
    said = lines()
    assert "ETA" not in said[0]
    assert said[1].endswith("ETA 29:20") and said[2].endswith("ETA 29:00")


def test_lines_are_seldom_and_more_so_later(lines, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Display(2000) as display:
        for step in range(1, 2001):
            now[0] += 1
            display.step(step, 1.0, 1.0)
    steps = [int(re.match(r"step (\d+)/2000", line).group(1)) for line in lines()]
    assert steps[:3] == [1, 11, 21] and steps[-3:-1] == [1911, 1971] and steps[-1] == 2000
    assert len(steps) < 90


PROGRAM = """
from gsa.training.progress import Display
with Display(20) as display:
    display.say("going on from [bold]here[/bold]")
    display.resumed_at(5)
    line = {"ppl": 10.43, "lr": 3e-4, "grad_norm": 0.5, "seconds": 1.0, "data_wait": 0.0}
    for step in range(6, 13):
        display.step(step, 2.345, 123456.7, line | {"mfu": 0.412, "memory_gib": 61.25})
"""


def on_a_terminal(kind, columns):
    """What a program writes to a terminal of that kind and width."""
    leader, follower = pty.openpty()
    ioctl(follower, TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    unset = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment | {"TERM": kind},
        stderr=follower,
    )
    os.close(follower)
    written, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(leader)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode()).replace("\r", "\n")


def test_on_a_terminal_the_numbers_stand_below_the_bar():
    text = on_a_terminal("xterm", 150)
    assert "going on from [bold]here[/bold]" in text
    bar, numbers = [line.strip() for line in text.splitlines() if line.strip()][-2:]
    assert re.match(r"step 12/20 ━.* 60% 0:00:0\d$", bar)
    assert re.fullmatch(
        r"loss 2\.3450 · ppl 10\.43 · lr 3\.00e-04 · gradient 0\.5 · 123,457 tokens/s · "
        r"MFU 41\.2% · 61\.2 GiB · data wait 0\.0% · ETA 0:00",
        numbers,
    )
    narrow = on_a_terminal("xterm", 40)
    for part in ("step 12/20", "123,457", "41.2%", "61.2 GiB"):
        assert part in narrow


def test_a_terminal_that_cannot_move_its_cursor_gets_lines():
    text = on_a_terminal("dumb", 120)
    assert "step 6/20 · loss 2.3450" in text and "━" not in text
