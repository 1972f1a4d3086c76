"""Signals that wait until what must be whole is whole."""

import signal

import pytest

from brain.machine.signals import Uninterrupted


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
