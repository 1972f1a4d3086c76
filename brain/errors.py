"""What a person using the program may be told: refusals and warnings, one line each."""

import warnings


class Refused(ValueError):
    """Input that cannot be used.

    Its message is one line saying what, where, and what would be right; the command line prints it
    and exits with 2. Line breaks in the given message become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Unwritten(Refused):
    """What has happened could not be written down: only what was written before counts."""


def one_line(error: BaseException) -> str:
    """A library's error as the end of a one-line message: at most 200 characters, never empty."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class BrainWarning(UserWarning):
    """Something works, but not as one might think."""


def warn(message: str) -> None:
    """Warns in one line; the command line prints it on standard error."""
    warnings.warn(message, BrainWarning, stacklevel=3)
