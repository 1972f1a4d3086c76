"""Which tokens have followed each other: what the host knows of a text without searching it.

A search on the device costs a tick of text that does not repeat a few percent, most of it for code
and numbers that have left the processor's caches. Nothing is ever found unless the last two tokens
have stood side by side before; and on a CPU the host has every token at once.
"""

from collections.abc import Iterable

import torch

from compiled.state import Cursor, State


class Neighbours:
    """Of one text, as far as the cursor's token."""

    def __init__(self, state: State, cursor: Cursor) -> None:
        told = state.valid & (state.position < cursor.position)
        order = torch.argsort(state.position[told])
        tokens = [*state.token_id[told][order].tolist(), int(cursor.token)]
        positions = [*state.position[told][order].tolist(), int(cursor.position)]
        self._pairs: set[tuple[int, int]] = set()
        self._last: tuple[int, int] | None = None
        self._token = tokens[0]
        for token, before, position in zip(tokens[1:], positions[:-1], positions[1:], strict=True):
            self._follow(token, position == before + 1)

    def follow(self, tokens: Iterable[int]) -> None:
        """These were said behind the cursor's token, one after another."""
        for token in tokens:
            self._follow(token, True)

    def _follow(self, token: int, beside: bool) -> None:
        if self._last is not None:
            self._pairs.add(self._last)
        self._last = (self._token, token) if beside else None
        self._token = token

    @property
    def repeat(self) -> bool:
        """Whether the last two tokens have stood side by side before."""
        return self._last in self._pairs
