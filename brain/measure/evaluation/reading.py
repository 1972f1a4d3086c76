"""A text read by a brain, for the sake of what the brain makes of it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from brain.brain import Brain

Progress = Callable[[int], object]
"""Told how much has been done since it was last told."""


def numbers(plain: Sequence[Any]) -> list[float]:
    """Numbers as JSON has them. Raises ValueError or TypeError for something else."""
    found = [float(number) for number in plain]
    if not found or not all(map(math.isfinite, found)):
        raise ValueError("there must be numbers, and finite ones")
    return found


def begin(brain: Brain, ids: Sequence[int]) -> None:
    """Lets a brain forget everything and read the first token of a text. The rest is to be fed, so
    that every policy knows all of it as it will know what comes later.
    """
    brain.prime(ids[:1])


def feed(brain: Brain, ids: Sequence[int], progress: Progress) -> list[float]:
    """Reads tokens by chunks; the negative log-likelihood of each, in nats. Raises NotFinite."""
    nats: list[float] = []
    for part in brain.feed_in_chunks(ids) if ids else ():
        nats += part
        progress(len(part))
    return nats


def logits_behind(brain: Brain, ids: Sequence[int]) -> Tensor:
    """Logits after the pending token and after each of ``ids`` behind it, which are read and not
    remembered: [1 + len(ids), vocab] float32.
    """
    brain.loop.settle()
    pending, first = int(brain.cursor.token[0]), brain.memory.account.position
    asked = [pending, *ids]
    return brain.read(asked, range(first, first + len(asked))).logits
