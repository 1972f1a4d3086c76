"""Several tokens in one pass: when they are looked up, and what becomes of the memory's account.

A pass of several ticks must be what as many passes of one would have been. So it is made only where
the host knows, without asking, that none of these ticks would forget, repair or renumber anything,
and that every row has a free slot. Near a full memory, and in it, ticks are made one by one.

The search runs right behind the patch, and only the number of tokens that it proposes travels to
the host. On a CPU it is left out where the host knows that it would find nothing: text that does
not repeat costs next to nothing else.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from brain.config.settings import Settings
from brain.errors import Refused
from brain.memory import Memory
from brain.naming import CHOOSE, READ
from brain.neighbours import Neighbours
from brain.tick import HostCopy, Speech, Tick, Uttered, host_copies
from compiled.choose import Forced
from compiled.lookup import Proposal
from compiled.patch import Plan
from compiled.score import cull_count


@dataclass
class Account:
    """How it went: ``passes`` of the loop, ``tokens`` said in them, tokens ``proposed``, and how
    many of those were ``accepted``.
    """

    passes: int = 0
    tokens: int = 0
    proposed: int = 0
    accepted: int = 0

    def add(self, ticks: Sequence[Tick]) -> None:
        """A pass that is done."""
        self.passes += 1
        self.tokens += len(ticks)
        self.accepted += len(ticks) - 1


@dataclass(frozen=True)
class _Search:
    """What was proposed for the memory of one account."""

    account: object
    proposal: Proposal
    length: HostCopy


@dataclass(frozen=True)
class _Known:
    """Neighbours in the text of one account."""

    account: object
    neighbours: Neighbours


class Lookahead:
    """Proposals for one memory. Attributes: ``account``, of all passes."""

    def __init__(self, memory: Memory, settings: Settings, trained: int) -> None:
        self._memory = memory
        self._lookup = settings.lookup
        self._forgetting = settings.conduct.forgetting
        self._last = trained - 1 if settings.rebases else None  # position before renumbering
        self._search: _Search | None = None
        self._known: _Known | None = None
        self.account = Account()

    @property
    def width(self) -> int:
        """Tokens that are read in one pass: the cursor's, and those proposed."""
        return 1 + (self._lookup.width if self._lookup else 0)

    def look(self, ticks: Sequence[Tick]) -> None:
        """Begins to look up what follows these ticks, which were the last pass, if the memory as it
        is now allows several tokens in one. What goes wrong here is not heard: the ticks are done,
        and the next pass looks up again.
        """
        if self._is_possible():
            with contextlib.suppress(RuntimeError, MemoryError):
                if self._may_find(ticks):
                    self._begin()

    def _may_find(self, ticks: Sequence[Tick]) -> bool:
        """Whether a search is worth its while; nothing that it would find is ever missed."""
        if self._memory.device.type != "cpu" or self._lookup is None or self._lookup.shortest < 2:
            return True
        known, self._known = self._known, None
        if known is None or any(tick.rebased or tick.repairs for tick in ticks):
            neighbours = Neighbours(self._memory.state, self._memory.cursor)
        else:
            neighbours = known.neighbours
            neighbours.follow(tick.token for tick in ticks)
        self._known = _Known(self._memory.account, neighbours)
        return neighbours.repeat

    def _begin(self) -> _Search:
        proposal = self._memory.graphs.propose()
        (length,) = host_copies(proposal.length)
        search = _Search(self._memory.account, proposal, length)
        self._search = search
        return search

    def proposal(self, most: int | None) -> Proposal | None:
        """What may be said beside the next token, ``most`` tokens in all; None for nothing."""
        if self._known is not None and self._known.account is not self._memory.account:
            self._known = None  # something has happened since
        if not self._is_possible() or (most is not None and most < 2):
            return None
        if self._known is not None and not self._known.neighbours.repeat:
            return None
        search = self._search
        if search is None or search.account is not self._memory.account:
            self._memory.graphs.begin_step()
            search = self._begin()
        length = int(search.length.wait())
        if length == 0:
            return None
        proposal = search.proposal
        if most is not None and length >= most:
            length = most - 1
            proposal = proposal._replace(length=proposal.length.clamp(max=length))
        self.account.proposed += length
        return proposal

    def told(self, ids: Sequence[int]) -> Proposal:
        """As if all but the last of these tokens had been proposed. Raises Refused if they cannot
        have been said in one pass.
        """
        if not self._is_possible() or len(ids) > self.width:
            raise Refused(f"{len(ids)} tokens cannot have been said in one pass here")
        padding = [0] * (self.width - len(ids))
        device = self._memory.device
        return Proposal(
            torch.tensor([*ids[:-1], *padding], dtype=torch.int64, device=device),
            torch.tensor(len(ids) - 1, dtype=torch.int64, device=device),
        )

    def ticks(
        self, proposal: Proposal, forced: Forced, speech: Speech
    ) -> tuple[Plan, tuple[Tick, ...]]:
        """Steps 1 to 3 of as many ticks as come true, and what the patch is to do. Waits for their
        number; ``begin_step`` comes first.
        """
        memory, graphs = self._memory, self._memory.graphs
        high_water = memory.high_water
        reading = graphs.named(READ, partial(graphs.read_ahead, high_water=high_water), proposal)
        said = graphs.named(CHOOSE, graphs.choose_ahead, proposal, reading, forced)
        copies = host_copies(said.tokens, said.surprise, said.number)
        tokens, surprise, number = (copy.wait() for copy in copies)
        nothing = torch.zeros(0, dtype=torch.int64)
        ticks = tuple(
            Tick(
                memory.tick + 1 + index,
                memory.position + 1 + index,
                memory.count + 1 + index,
                Uttered(tokens[index : index + 1], surprise[index : index + 1], nothing),
                speech,
                width=self.width,
            )
            for index in range(int(number))
        )
        return said.plan(reading), ticks

    def _is_possible(self) -> bool:
        """Whether as many ticks as a pass has tokens would only ever append."""
        if self._lookup is None:
            return False
        memory, width = self._memory, self.width
        return (
            memory.uncommitted
            and memory.state.capacity - memory.count >= width
            and cull_count(memory.count + width - 1, self._forgetting) == 0
            and (self._last is None or memory.position + width - 1 <= self._last)
        )
