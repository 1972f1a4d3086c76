"""Repair: one token in place of the dimmest pair of neighbours, where that is better than a hole.

    before … [p1 p2] right …     →     before … [token at p1] right …

Everything is found out by reading. A read of the row before the pair, as of its own position, tells
how well the token to the right is predicted with nothing in between, and which tokens the model
itself would put there. Each candidate (these, and the two old tokens) is then read as of p1, where
it sees only what precedes it: that tells how well it foretells the token to the right.

    gain = log p(right | before, candidate) - log p(right | before)        in nats

The candidate with the highest gain is committed if it gains at least ``least_gain``; otherwise
nothing is changed and the tick forgets as usual. A repair frees one slot, so that the tick that
follows it has one row less to forget.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from brain.actions import Replace
from brain.mirror import Mirror
from conf.schema import RepairConf

LogProbabilities = Callable[[int, int], torch.Tensor]
"""(token, position) → log-probabilities [vocab] of what follows, read as of that position."""


@dataclass(frozen=True)
class Repair:
    """What was replaced, by what, when, and what it gained."""

    tick: int
    positions: tuple[int, int]
    removed: tuple[int, int]  # tokens
    token: int  # at ``positions[0]``
    gain: float  # nats

    @property
    def action(self) -> Replace:
        """The change itself."""
        return Replace(self.positions, [self.token], source="repair")

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "positions": list(self.positions), "removed": list(self.removed)}


def dimmest_pair(scores: npt.NDArray[Any], may_go: npt.NDArray[np.bool_]) -> int | None:
    """Index, in text order, of the first of the two neighbours that both may go and together have
    the lowest keep-scores; the earliest of equals. Both have a neighbour on either side.

    ``scores``, ``may_go`` [rows], in text order.
    """
    pairs = scores[:-1] + scores[1:]
    possible = may_go[:-1] & may_go[1:]
    possible[:1] = possible[-1:] = False  # the first has nothing before it, the last nothing after
    if len(pairs) < 3 or not possible.any():
        return None
    return int(np.where(possible, pairs, math.inf).argmin())


def best_repair(
    mirror: Mirror,
    first: int,
    tick: int,
    settings: RepairConf,
    following: LogProbabilities,
) -> Repair | None:
    """The repair of the pair at index ``first`` of the mirror, if one gains enough."""
    tokens, positions = mirror.token_id.tolist(), mirror.position.tolist()
    before, right = first - 1, tokens[first + 2]
    predicted = following(tokens[before], positions[before])
    nothing = float(predicted[right])
    own = torch.topk(predicted, min(settings.candidates, len(predicted))).indices.tolist()
    gains = {
        candidate: float(following(candidate, positions[first])[right]) - nothing
        for candidate in dict.fromkeys([*tokens[first : first + 2], *own])
    }
    token = max(gains, key=lambda candidate: gains[candidate])
    if not gains[token] >= settings.least_gain:
        return None
    return Repair(
        tick,
        (positions[first], positions[first + 1]),
        (tokens[first], tokens[first + 1]),
        token,
        gains[token],
    )
