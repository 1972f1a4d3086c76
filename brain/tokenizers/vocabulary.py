"""What every tokenizer format is reduced to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Library

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
    controls: Mapping[int, AddedToken]  # by id: what user text must not become
    split_parts: Callable[[Sequence[str | int]], list[int]]
    """The ids of a text in parts: a number is that token, and in a string nothing becomes a control
    token. Strings between two numbers come as one.
    """
    spelling: tuple[bytes | None, ...]  # by id: UTF-8 or a fragment of it; None: no such token
    leading_space: bool  # splitting puts one space before a text
    lossless: bool
    id_of: Callable[[str], int | None]  # of a token's text
    prepended: tuple[int, ...] = ()  # what the reference tokenizer puts before a text by default
    appended: tuple[int, ...] = ()  # and after it
    bos_text: str | None = None  # the format's own idea of these tokens, where it has one
    eos_text: str | None = None


def control_tokens(added: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
    """Which of the added tokens structure a text: all but plain white space. The flag ``special``
    does not tell them: the marks of turns and thoughts of some models (DeepSeek R1, Qwen3) lack it.
    """
    return {
        index: token
        for index, token in added.items()
        if token.special or not token.content.replace("▁", " ").isspace()
    }


def added_tokens_alone(added: Mapping[int, AddedToken]) -> tuple[Library, dict[int, int]]:
    """A tokenizer that knows only these, and the id that each of its own ids stands for. What is
    between added tokens becomes its one unknown word, 0.
    """
    library = Library(models.WordLevel({"": 0}, unk_token=""))
    library.add_tokens(list(added.values()))
    ids = {token.content: index for index, token in added.items()}
    own = library.get_added_tokens_decoder()
    return library, {index: ids[token.content] for index, token in own.items()}


class WarnOnce:
    """A warning that is given the first time it is called for. Attributes: ``given``."""

    def __init__(self, message: str) -> None:
        self._message, self.given = message, False

    def __call__(self) -> None:
        """Gives it, unless it was given."""
        if not self.given:
            self.given = True
            warn(self._message)
