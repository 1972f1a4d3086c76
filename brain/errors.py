"""Messages for the person who uses the program: refusals and warnings, one line each."""

import difflib
import warnings
from collections.abc import Iterable


class Refused(ValueError):
    """Input that cannot be used.

    Its message is one line: what is wrong, where, and what would be right. The command line prints
    it and exits with 2. Line breaks in the given message become spaces. Other characters that
    cannot be printed are escaped, because a file could control the terminal with them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(as_line(message))


class MemoryFull(Refused):
    """A memory with cull=none has no room for another row."""


class NotFinite(Refused):
    """A read made NaN or infinity. Nothing of it is remembered: the memory is as before it."""


class OutputLost(Refused):
    """Standard output cannot be written."""


class Unwritten(Refused):
    """The record of a run could not be written: only what was written before counts."""


LONGEST = 4000  # characters of a refusal


def one_line(error: BaseException) -> str:
    """A library's error as the end of a one-line message: at most 200 characters, never empty."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def as_line(message: str) -> str:
    """A message as one printable line of at most LONGEST characters."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def printable(text: str) -> str:
    """The text with characters that cannot be printed written as escape sequences."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """Any value as part of a message: as Python writes it, at most 80 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"{type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def did_you_mean(given: object, known: Iterable[str], within: str = "") -> str:
    """The end of a message about an unknown word: the nearest of those that are known ``within`` a
    group, or nothing where none is near.
    """
    words = {word.lower(): word for word in known}
    near = difflib.get_close_matches(str(given).lower(), words, 1)
    return f"; did you mean {within}{words[near[0]]}?" if near else ""


def unknown(key: str, given: object, known: Iterable[str]) -> Refused:
    """The refusal of a word that is none of those that a key knows."""
    known = list(known)
    hint = did_you_mean(given, known)
    return Refused(f"{key}: {shown(given)} is unknown; use {', '.join(known)}{hint}")


class BrainWarning(UserWarning):
    """Something works, but perhaps not as expected."""


def warn(message: str) -> None:
    """Warns in one line; the command line prints it on standard error."""
    warnings.warn(message, BrainWarning, stacklevel=3)
