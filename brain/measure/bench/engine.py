"""What a benchmark asks of an engine."""

from collections.abc import Callable
from typing import Protocol


class Engine(Protocol):
    """A loaded model with a cache."""

    vocab_size: int
    weight_bytes: int  # of weights, read for every token
    row_bytes: int  # of the cache, read for every remembered row

    def capture(self) -> None:
        """Compiles what can be compiled before the first token."""

    def prime(self, ids: list[int]) -> None:
        """Replaces what is remembered by these tokens, ready to decode."""

    def step(self) -> int:
        """Decodes one token, and waits for it."""


Opener = Callable[[], Engine]
