"""Repair: one token in place of the dimmest pair of neighbours, where that is better than a hole.

    before … [p1 p2] right …     →     before … [token at p1] right …

Everything is found out by reading. A read of the row before the pair, as of its own position, tells
how well the token to the right is predicted with nothing in between, and which tokens the model
itself would put there. Each candidate (these, and the two old tokens) is then read as of p1, where
it sees only what precedes it: that tells how well it predicts the token to the right.

    gain = log p(right | before, candidate) - log p(right | before)        in nats

The candidate with the highest gain is committed if it gains at least ``least_gain``; otherwise
nothing is changed and the tick forgets as usual. A repair frees one slot, so that the tick that
follows it has one row less to forget.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from brain import edits
from brain.actions import Edit, Replace
from brain.config.settings import Settings
from brain.machine.signals import Uninterrupted
from brain.memory import Account, Memory
from brain.mirror import Mirror, mirror_of, source_number
from brain.row_index import RowIndex
from compiled.choose import Look
from compiled.score import cull_count, may_go
from conf.schema import RepairConf

Decode = Callable[[Sequence[int]], str]

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


@dataclass
class _Made:
    """A repair that a tick began with. If the tick is interrupted, the next attempt at it finds the
    memory of ``account`` as it was left, and makes no second one.
    """

    repair: Repair
    account: Account
    reported: bool = False


class Repairs:
    """The repairs of one memory. Attributes: ``on_repair``, called with every one that is made."""

    def __init__(self, memory: Memory, index: RowIndex, settings: Settings, decode: Decode) -> None:
        self.on_repair: Callable[[Repair], None] | None = None
        self._memory, self._index, self._decode = memory, index, decode
        self._conf = settings.conf.repair
        self._culling = settings.culling
        self._keep_score = settings.graphs.eviction.keep_score
        self._made: _Made | None = None

    @property
    def due(self) -> bool:
        """Whether the next tick is one of those that may begin with a repair."""
        every = self._conf.every
        return every > 0 and (self._memory.account.tick + 1) % every == 0

    def make(self) -> tuple[Repair, ...]:
        """Every so many ticks, once there is something to forget: a repair, if one is worth it.
        Every tick before has been waited for.
        """
        if not self.due:
            return ()
        account = self._memory.account
        made = self._made
        if made is None or made.account is not account:
            if cull_count(account.count, self._culling) == 0:
                return ()
            repair = self.best()
            if repair is None:
                return ()
            first, source = repair.positions[0], source_number("repair")
            edit = Edit(cull=set(repair.positions), replacing=[(repair.token, first, source)])
            with Uninterrupted():
                edits.edit(self._memory, self._index, edit)
                made = self._made = _Made(repair, self._memory.account)
        if self.on_repair is not None and not made.reported:
            self.on_repair(made.repair)
            made.reported = True
        return (made.repair,)

    def best(self) -> Repair | None:
        """The repair of the dimmest pair of rows that may go, if it gains enough; makes none."""
        memory, state = self._memory, self._memory.state
        mirror = mirror_of(state, self._decode)
        candidates = may_go(state, memory.cursor, self._culling)
        no_look = Look(  # a policy is asked between two ticks: no token looks
            mass=torch.zeros_like(state.brightness),
            newest=memory.cursor.position[0],
            queries=memory.int64(0),
            tick=memory.cursor.tick,
        )
        scores = self._keep_score(state, no_look)
        pair = dimmest_pair(
            scores.cpu().numpy()[mirror.slot], candidates.cpu().numpy()[mirror.slot]
        )
        if pair is None:
            return None
        return best_repair(mirror, pair, memory.account.tick + 1, self._conf, self._following)

    def _following(self, token: int, position: int) -> torch.Tensor:
        """Log-probabilities of what follows a token read as of a position: [vocab] on the host."""
        return torch.log_softmax(self._memory.logits_after(token, position)[-1], -1).cpu()
