"""Streaming negative log-likelihood: how well the model foresees a text with what it remembers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brain.checkpoints import Checkpoint
from brain.measure.evaluation.contestants import FLOOR, Contestant
from brain.measure.evaluation.streams import Progress, Streams

BLOCK = 64
"""Tokens whose differences are averaged before a standard error is taken: neighbours are alike."""


@dataclass(frozen=True)
class Fluency:
    """One policy at one budget. Nats per token, over tokens read with a full memory."""

    policy: str
    budget: int
    nll: Tensor  # [streams, tokens] float32

    def against(self, other: "Fluency") -> tuple[float, float]:
        """Mean difference to another policy on the same tokens, and its standard error."""
        difference = (self.nll - other.nll).double()
        streams, tokens = difference.shape
        size = min(BLOCK, tokens)
        blocks = difference[:, : tokens // size * size].reshape(streams, -1, size).mean(-1)
        error = blocks.std() / blocks.numel() ** 0.5 if blocks.numel() > 1 else torch.tensor(0.0)
        return float(difference.mean()), float(error)


def measure(
    checkpoint: Checkpoint,
    contestant: Contestant,
    budget: int,
    texts: Tensor,
    progress: Progress,
) -> Fluency:
    """Feeds every text tick by tick; scored are the tokens that are read with a full memory, that
    is, from the ``budget``-th on. ``texts`` [streams, more than budget] int64.
    """
    streams = Streams(checkpoint, contestant.eviction(budget), texts)
    streams.feed_until(budget, progress)
    return Fluency(contestant.label, budget, streams.feed_until(texts.shape[1] - 1, progress))


def table(results: Sequence[Fluency]) -> list[dict[str, Any]]:
    """A row for each result, with its difference to sinks and recent rows at the same budget."""
    floors = {result.budget: result for result in results if result.policy == FLOOR}
    rows = []
    for result in results:
        row: dict[str, Any] = {
            "policy": result.policy,
            "budget": result.budget,
            "nll": float(result.nll.double().mean()),
            "tokens": result.nll.numel(),
        }
        if result.budget in floors:
            mean, error = result.against(floors[result.budget])
            row |= {"difference": mean, "standard_error": error}
        rows.append(row)
    return rows
