"""A model that has been found, checked and loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from brain.tokens import Tokenizer
from compiled.llama import LlamaConfig, Weights


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
