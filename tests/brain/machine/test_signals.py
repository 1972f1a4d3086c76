"""Signals that wait until what must be whole is whole."""

import signal
from collections.abc import Iterator

import pytest

from brain.machine.signals import Uninterrupted, asked_to_stop, endings_are_ctrl_c


def test_signals_are_heard_after_what_must_be_whole() -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with Uninterrupted():
            with Uninterrupted():
                signal.raise_signal(signal.SIGINT)
                told.append("inner")
            told.append("outer")
        told.append("never")
    assert told == ["inner", "outer"]
    with pytest.raises(KeyboardInterrupt) as both, Uninterrupted():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("out of memory")
    assert isinstance(both.value.__context__, RuntimeError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def hangup() -> Iterator[int]:
    """The signal of a terminal that goes away, heard as at first afterwards."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("Windows has no SIGHUP")
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield signal.SIGHUP
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_goes_away_is_heard_once(hangup: int) -> None:
    with pytest.raises(KeyboardInterrupt), endings_are_ctrl_c():
        signal.raise_signal(hangup)
    signal.raise_signal(hangup)  # the shell says it, too: the process does not die of it


def test_a_run_is_asked_once_by_a_terminal_that_goes_away(hangup: int) -> None:
    with endings_are_ctrl_c(), asked_to_stop() as asked:
        assert not asked()
        for _ in range(2):
            signal.raise_signal(hangup)
            assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(hangup)


def test_nohup_is_respected(hangup: int) -> None:
    signal.signal(hangup, signal.SIG_IGN)
    with endings_are_ctrl_c(), asked_to_stop() as asked:
        signal.raise_signal(hangup)
        assert not asked()
    assert signal.getsignal(hangup) == signal.SIG_IGN
