"""A model that has been found, checked and loaded."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from brain.chat.template import ChatFormat, chat_format, chatml
from brain.errors import Refused, unknown
from brain.tokens import Tokenizer
from compiled.llama import LlamaConfig, Weights

SAMPLE = 1 << 16  # characters that are split to see how a vocabulary does it


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that defines a model."""

    name: str  # for people: a folder's name or a hub repository
    config: LlamaConfig
    weights: Weights
    tokenizer: Tokenizer
    hash_weights: Callable[[], str]  # computes ``sha256`` when it is first asked for

    @cached_property
    def sha256(self) -> str:
        """Identifies the stored weights, whatever dtype they were loaded in: of one file its
        SHA-256, of several that of their sorted digests. Takes seconds per gigabyte on first use.
        """
        return self.hash_weights()

    def chat_format(
        self, named: str = "auto", *, today: date, variables: Mapping[str, Any] | None = None
    ) -> ChatFormat:
        """How a conversation with this model is written.

        Args:
            named: ``auto`` is the model's own chat template, rendered now, in a process of its own.
                ``chatml`` is that format, whatever the model was trained with.
            today: The date that a template is told, if it asks. A run that is to be reproducible
                keeps it.
            variables: What else it is told, such as ``{"enable_thinking": False}``.
        Raises:
            Refused: The model has no template or one that cannot be used.
        """
        if named == "chatml":
            return chatml(self.tokenizer)
        if named != "auto":
            raise unknown("chat format", named, ("auto", "chatml"))
        return chat_format(self.tokenizer, today=today, variables=variables, where=self.name)

    @cached_property
    def vocabulary_sha256(self) -> str:
        """Identifies what the ids stand for, and how a text is split into them: that of a sample
        from the vocabulary itself.
        """
        vocabulary = self.tokenizer.vocabulary
        digest = hashlib.sha256()
        for spelling in vocabulary.spelling:
            digest.update(b"-" if spelling is None else b"%d:%s" % (len(spelling), spelling))
        words = [spelling.decode(errors="ignore") for spelling in vocabulary.spelling if spelling]
        sample = "".join(words[:: 1 + sum(map(len, words)) // SAMPLE])
        with suppress(Refused):  # it cannot split that
            digest.update(repr(vocabulary.split_plain(sample)).encode())
        return digest.hexdigest()
