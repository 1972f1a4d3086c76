"""Standard output and error as they may be: closed, full, or left by whoever read them.

The text goes to standard output, and losing that ends the program. Notes go to standard error, and
what cannot be written there is dropped.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

from brain.errors import OutputLost, Refused

UNWRITABLE = (OSError, ValueError, AttributeError)  # ValueError: closed; AttributeError: None


class _Stream:
    """Another stream, but for what a subclass does."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Notes(_Stream):
    """A stream for notes, which drops what cannot be written."""

    def write(self, text: str) -> int:
        """Writes what it can."""
        with suppress(*UNWRITABLE):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is left, if that can be."""
        with suppress(*UNWRITABLE):
            self._stream.flush()


class Text(_Stream):
    """A stream for the text. Raises OutputLost where it cannot be written, BrokenPipeError where
    its reader has left. Python flushes it once more when it ends: that is then no second error.
    """

    _lost: BaseException | None = None

    def write(self, text: str) -> int:
        """Writes all of it."""
        if self._lost is not None:
            raise self._lost
        return int(self._try(self._stream.write, text))

    def flush(self) -> None:
        """Writes what is left."""
        if self._lost is None:
            self._try(self._stream.flush)

    def require_written(self) -> None:
        """Raises what was raised when something was lost, in case nobody heard of it: the standard
        library's logging does not tell.
        """
        if self._lost is not None:
            raise self._lost

    def _try(self, write: Any, *text: str) -> Any:
        try:
            return write(*text)
        except BrokenPipeError as error:
            self._lost = error
            raise
        except OSError as error:
            self._lost = OutputLost(f"standard output cannot be written ({error.strerror})")
            raise self._lost from None


def take_streams() -> Text:
    """Makes standard error drop what it cannot take, and standard output, which is returned, say
    that it is lost. To be called before any file is opened: it would get the number of a closed
    stream, and the text. Raises Refused where standard output is closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    closed = sys.stdout is None
    if closed or sys.stderr is None:
        nowhere = io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8")
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    sys.stderr = cast(TextIO, Notes(sys.stderr))
    if closed:
        raise Refused("standard output is closed: the text goes there, so give it a file or a pipe")
    if hasattr(os, "set_blocking"):
        with suppress(*UNWRITABLE):  # what is written to no file
            os.set_blocking(sys.stdout.fileno(), True)  # a reader may be slower than the text
    text = Text(sys.stdout)
    sys.stdout = cast(TextIO, text)
    return text
