"""Differences between two that were measured on the same texts."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

BLOCK = 64
"""Tokens whose differences are averaged before a standard error is taken: neighbours are alike."""


class Difference(NamedTuple):
    """``error`` is the standard error of the mean; None where there is one stream alone, which
    says nothing about others.
    """

    mean: float
    error: float | None


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Difference:
    """Of numbers token by token, stream by stream: ours less theirs, its error over blocks."""
    blocks = [
        fmean(apart[start : start + size])
        for apart in map(_apart, ours, theirs)
        for size in [min(BLOCK, len(apart))]
        for start in range(0, len(apart) - size + 1, size)
    ]
    mean = fmean(one for apart in map(_apart, ours, theirs) for one in apart)
    return Difference(mean, standard_error(blocks) if len(ours) > 1 else None)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None of a single one."""
    return float(stdev(values) / len(values) ** 0.5) if len(values) > 1 else None


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]
