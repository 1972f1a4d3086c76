"""A model that has been found, checked and loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from brain.tokens import Tokenizer
from compiled.llama import LlamaConfig, Weights


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that defines a model.

    ``name`` is for people: a folder's name or a hub repository. ``hash_weights`` computes
    :attr:`sha256` when it is first asked for.
    """

    name: str
    config: LlamaConfig
    weights: Weights
    tokenizer: Tokenizer
    hash_weights: Callable[[], str]

    @cached_property
    def sha256(self) -> str:
        """Identifies the stored weights, whatever dtype they were loaded in; 64 hex digits.

        Of one weight file its SHA-256, of several that of their digests, sorted. May take seconds
        per gigabyte on first use.
        """
        return self.hash_weights()
