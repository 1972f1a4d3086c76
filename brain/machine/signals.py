"""Ctrl-C, SIGTERM and a terminal that goes away: between two ticks, never in the middle of one; and
no signal at all between a patch and the account of it.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal has gone; Windows has none
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else []))
HELD_OFF = (*SIGNALS, *(getattr(signal, name) for name in ("SIGALRM",) if hasattr(signal, name)))
"""Signals whose handlers may raise: Ctrl-C, SIGTERM, and a time limit."""


class Asked:
    """Whether the program was asked to stop, when called. ``to_end``: by more than Ctrl-C."""

    def __init__(self) -> None:
        self._event, self.to_end = threading.Event(), False

    def __call__(self) -> bool:
        """Whether it was asked."""
        return self._event.is_set()

    def set(self, number: int) -> None:
        """Notes a signal."""
        self.to_end = self.to_end or number != signal.SIGINT
        self._event.set()


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """Gives a function that returns whether the program was asked to stop. A second request is a
    KeyboardInterrupt at once, but that the terminal has gone is heard once: shell and system both
    say so. Only the main thread gets signals; elsewhere it returns False.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            signal.signal(number, signal.SIG_IGN)
        elif asked():
            raise KeyboardInterrupt
        asked.set(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS if _is_heard(number)}
    try:
        yield asked
    finally:
        _hear_as(before)


@contextmanager
def endings_raise(error: type[BaseException]) -> Iterator[None]:
    """Makes SIGTERM, and that the terminal has gone, this error, within a ``with`` statement: where
    Ctrl-C means less than they do. Only in the main thread.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            signal.signal(number, signal.SIG_IGN)
        raise error

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, end) for n in SIGNALS[1:] if _is_heard(n)}
    try:
        yield
    finally:
        _hear_as(before)


@contextmanager
def endings_are_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM, and the first word that the terminal has gone, a KeyboardInterrupt, as Ctrl-C
    is, within a ``with`` statement.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hang_up(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before: dict[int, Any] = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.default_int_handler)
    }
    if HANGUP and _is_heard(HANGUP):
        before[HANGUP] = signal.signal(HANGUP, hang_up)
    try:
        yield
    finally:
        _hear_as(before)


def _hear_as(before: Mapping[int, Any]) -> None:
    """Gives signals the handlers that they had. That the terminal has gone is heard once."""
    for number, handler in before.items():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _is_heard(number: signal.Signals) -> bool:
    """False where ``nohup`` has the program outlive its terminal."""
    return number != HANGUP or signal.getsignal(number) != signal.SIG_IGN


class Uninterrupted:
    """``with Uninterrupted(): …`` delays signals: those that come within it are handled after it.

    Python runs the handlers of signals between any two instructions, and some of them raise.
    Delaying them costs microseconds, so it is for what is short and must be whole. Only the main
    thread gets signals; in any other it does nothing. A signal without a handler in Python acts as
    it always does.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._came: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in HELD_OFF:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
        try:
            for number in self._handlers:
                signal.signal(number, self._hear_later)
        except BaseException:  # of a handler that was still in place
            self._hear_again()
            raise

    def __exit__(self, *_: object) -> None:
        self._hear_again()
        for number, frame in self._came:
            self._handlers[number](number, frame)

    def _hear_again(self) -> None:
        try:
            self._restore()
        except BaseException:  # of a handler that is back already
            self._restore()
            raise

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _hear_later(self, number: int, frame: FrameType | None) -> None:
        self._came.append((number, frame))
