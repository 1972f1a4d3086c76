"""Bars that move while they are waited for, on a terminal, in a log and on a lost stream."""

import io
import sys
import threading

import pytest

from brain.machine import progress
from brain.machine.progress import progress_bar

PATIENCE = 60  # seconds until a test gives up; nothing takes that long


class Watched(io.StringIO):
    """A stream that says when it has been written to a few times."""

    def __init__(self, *, terminal: bool, after: int) -> None:
        super().__init__()
        self.reached = threading.Event()
        self._terminal, self._left = terminal, after

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        if text.strip():
            self._left -= 1
        if self._left == 0:
            self.reached.set()
        return super().write(text)


class Broken(io.StringIO):
    """A terminal whose every write fails."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_bar_moves_while_nothing_reports_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BAR_EVERY", 0.001)
    terminal = Watched(terminal=True, after=5)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("capturing graphs", 3, "graph") as bar:
        bar.set_postfix_str("read 256")
        assert terminal.reached.wait(PATIENCE)
        bar.update(3)
    assert "capturing graphs:   0%" in terminal.getvalue()
    assert "read 256" in terminal.getvalue()
    assert terminal.getvalue().splitlines()[-1].count("3/3") == 1


def test_a_wait_without_a_measure_shows_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BAR_EVERY", 0.001)
    terminal = Watched(terminal=True, after=2)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("reading the prompt"):
        assert terminal.reached.wait(PATIENCE)
    assert "reading the prompt: 00:00" in terminal.getvalue()


def test_a_short_wait_without_a_measure_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BAR_EVERY", 1e6)
    terminal = Watched(terminal=True, after=1)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("reading the prompt"):
        pass
    assert not terminal.getvalue().strip()


def test_a_log_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.001)
    log = Watched(terminal=False, after=3)
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar("converting", 3, "tensor") as bar:
        bar.update()
        assert log.reached.wait(PATIENCE)
    assert "\r" not in log.getvalue()
    assert log.getvalue().endswith("\n")
    assert "converting:  33%" in log.getvalue()


def test_a_log_hears_of_nothing_that_is_over_before_a_line_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert progress.LINE_EVERY >= 10  # seconds: a log is not to be filled
    monkeypatch.setattr(progress, "LINE_EVERY", 1e6)
    log = Watched(terminal=False, after=1)
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar("converting", 10_000, "tensor") as bar:
        for _ in range(10_000):
            bar.update()
    assert log.getvalue() == ""


@pytest.mark.parametrize("stream", [None, Broken()], ids=["none", "broken"])
def test_a_lost_stream_ends_nothing(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("hashing", 2) as bar:
        bar.update(2)


def test_a_machine_without_another_thread_has_a_bar_that_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    terminal = Watched(terminal=True, after=1)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with progress_bar("hashing", 2) as bar:
        bar.update(2)
    assert "2/2" in terminal.getvalue()


def test_nothing_is_shown_of_a_bar_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "BAR_EVERY", 0.001)
    terminal = Watched(terminal=True, after=1)
    monkeypatch.setattr(sys, "stderr", terminal)
    before = threading.active_count()
    with progress_bar("hashing", 2, disable=True) as bar:
        bar.update(2)
        assert threading.active_count() <= before
    assert terminal.getvalue() == ""
