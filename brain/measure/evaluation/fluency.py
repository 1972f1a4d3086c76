"""Streaming negative log-likelihood: how well the model foresees a text with what it remembers."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from brain.brain import Brain
from brain.measure.evaluation.paired import difference
from brain.measure.evaluation.reading import Progress, begin, feed


@dataclass(frozen=True)
class Fluency:
    """One policy at one budget. Nats per token, over tokens read with a full memory."""

    policy: str
    budget: int
    nats: Sequence[Sequence[float]]  # [streams][tokens]


def measure(brain: Brain, budget: int, text: Sequence[int], progress: Progress) -> list[float]:
    """Reads a text from its first token on. Scored are the tokens that are read with a full memory,
    that is, from the ``budget``-th on.
    """
    begin(brain, text)
    feed(brain, text[1 : budget + 1], progress)
    return feed(brain, text[budget + 1 :], progress)


def table(results: Sequence[Fluency], against: str) -> list[dict[str, Any]]:
    """A row for each result, with its difference to the policy ``against`` at the same budget."""
    others = {result.budget: result for result in results if result.policy == against}
    rows = []
    for result in results:
        row: dict[str, Any] = {
            "policy": result.policy,
            "budget": result.budget,
            "nll": fmean(nats for stream in result.nats for nats in stream),
            "tokens": sum(map(len, result.nats)),
        }
        if result.budget in others:
            mean, error = difference(result.nats, others[result.budget].nats)
            row |= {"difference": mean, "standard_error": error}
        rows.append(row)
    return rows
