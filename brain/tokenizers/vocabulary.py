"""What every tokenizer format is reduced to."""

from collections.abc import Callable
from dataclasses import dataclass

from brain.errors import warn

MOST_TOKENS = 1 << 22  # higher ids are mistakes: a table of them would take gigabytes


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer's vocabulary and its two ways of splitting text.

    ``split`` maps text to ids with literal special-token text becoming that one id;
    ``split_plain`` treats such text as ordinary characters. Neither ever adds a token. Where it is
    ``lossless``, the joined spellings of a text's ids must be the text's own bytes: a text for
    which they are not cannot be represented.
    """

    split: Callable[[str], list[int]]
    split_plain: Callable[[str], list[int]]
    spelling: tuple[bytes | None, ...]  # by id: UTF-8 or a fragment of it; None: no such token
    leading_space: bool  # splitting puts one space before a text
    lossless: bool
    id_of: Callable[[str], int | None]  # of a token's text
    prepended: tuple[int, ...] = ()  # what the reference tokenizer puts before a text by default
    appended: tuple[int, ...] = ()  # and after it
    bos_text: str | None = None  # the format's own idea of these tokens, where it has one
    eos_text: str | None = None


class WarnOnce:
    """A warning that is given the first time it is called for. Attributes: ``given``."""

    def __init__(self, message: str) -> None:
        self._message, self.given = message, False

    def __call__(self) -> None:
        """Gives it, unless it was given."""
        if not self.given:
            self.given = True
            warn(self._message)
