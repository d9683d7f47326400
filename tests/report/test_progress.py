"""Pace and time left by a clock in hand; plain text where there is no terminal; text as it is."""

import io
import sys

import pytest

from lmlab.report.progress import LINE_SECONDS, Progress

AWKWARD = ["x[i] [red]y[/red] [/] [bold", "d[:x:2] = {a:smile:b}", "a\n  b\n", "y" * 300]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def run(total, times):
    """A display that saw the given (step, time) pairs."""
    clock = iter([time for _, time in times])
    with Progress(total, 0, lambda: next(clock)) as shown:
        for step, _ in times:
            shown.update(step, {"loss": 2.5, "bits_per_byte": 1.25}, 12345.6)
    return shown


@pytest.mark.parametrize(
    ("times", "left"),
    [
        ([], 0),
        ([(1, 100.0)], 0),  # compilation tells nothing of the pace
        ([(1, 100.0), (2, 102.0)], 98 * 2.0),
        ([(1, 0.0), (5, 2.0)], 95 * 0.5),
        ([(1, 0.0), (2, 2.0), (4, 4.0)], 96 * (0.95 * 2 + 0.05 * 1)),
        ([(1, 0.0), (100, 99.0)], 0),
    ],
)
def test_time_left_is_steps_left_times_the_recent_pace(times, left):
    assert run(100, times).seconds_left() == pytest.approx(left)


@pytest.mark.parametrize(
    ("pace", "eta"), [(0.1, "ETA 0m10s"), (1, "ETA 1m38s"), (37, "ETA 1h00m"), (3600, "ETA 98h00m")]
)
def test_eta_is_said_in_minutes_or_hours(capsys, pace, eta):
    run(100, [(1, 0.0), (2, float(pace)), (2, 1e6)])
    assert eta in capsys.readouterr().out.splitlines()[-1]


def test_without_a_terminal_there_is_a_line_now_and_then_and_at_the_end(capsys):
    run(40, [(step, step * 1.0) for step in range(1, 41)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in out.splitlines()]
    assert steps == [1, 11, 21, 31, 40]
    assert LINE_SECONDS == 10
    assert "loss 2.500  1.250 bits/byte  12,346 tok/s" in out.splitlines()[-1]


@pytest.mark.parametrize("text", AWKWARD)
def test_text_is_shown_as_it_is(capsys, text):
    with Progress(10, 0) as shown:
        shown.say(text)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("text", AWKWARD[:2])
def test_text_is_shown_as_it_is_in_a_terminal_too(monkeypatch, text):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with Progress(10, 0) as shown:
        shown.update(1, {"loss": 2.5}, 0.0)
        shown.say(text)
    assert text in screen.getvalue()
    assert "1/10" in screen.getvalue()
    # The cursor that the bar hid is shown again.
    assert screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l")
