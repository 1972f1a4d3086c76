"""What every tokenizer format is reduced to."""

from collections.abc import Callable
from dataclasses import dataclass

MOST_TOKENS = 1 << 22  # higher ids are mistakes: a table of them would take gigabytes


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer's vocabulary and its two ways of splitting text.

    ``split`` maps text to ids with literal special-token text becoming that one id;
    ``split_plain`` treats such text as ordinary characters. Neither ever adds a token.

    ``spelling[id]`` is the UTF-8 (or a fragment of it) that the id stands for, ``None`` where the
    id names nothing. ``leading_space`` is true where splitting puts one space before a text.
    ``lossless`` is true where the joined spellings of a text's ids must be the text's own bytes; a
    text for which they are not cannot be represented. ``id_of`` gives a token's id.
    ``prepended``: ids that the reference tokenizer puts before a text unless told not to.
    ``bos_text``, ``eos_text``: the format's own idea of these tokens, where it has one.
    """

    split: Callable[[str], list[int]]
    split_plain: Callable[[str], list[int]]
    spelling: tuple[bytes | None, ...]
    leading_space: bool
    lossless: bool
    id_of: Callable[[str], int | None]
    prepended: tuple[int, ...] = ()
    bos_text: str | None = None
    eos_text: str | None = None
