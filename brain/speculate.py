"""Several tokens in one pass: when they are looked up.

A pass of several ticks must be what as many passes of one would have been. So it is made only where
the host knows, without asking, that none of these ticks would forget, repair or renumber anything,
and that every row has a free slot. Near a full memory, and in it, ticks are made one by one.

The search runs right behind the patch, and only the number of tokens that it proposes travels to
the host. On a CPU it is left out where the host knows that it would find nothing: text that does
not repeat costs next to nothing else.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from brain.config.settings import Settings
from brain.errors import Refused
from brain.memory import Account, Memory
from brain.tick import HostCopy, Tick, host_copies
from compiled.lookup import Proposal
from compiled.score import cull_count
from compiled.state import Cursor, State


@dataclass
class LookupCounts:
    """Counts of ``passes`` of the loop, ``tokens`` spoken in them, tokens ``proposed``, and how
    many of those were ``accepted``.
    """

    passes: int = 0
    tokens: int = 0
    proposed: int = 0
    accepted: int = 0

    def add(self, ticks: Sequence[Tick]) -> None:
        """Counts a pass that is done."""
        self.passes += 1
        self.tokens += len(ticks)
        self.accepted += len(ticks) - 1


class Neighbours:
    """Which tokens have followed each other in a text, as far as the cursor's token.

    A search on the device costs a tick of text that does not repeat a few percent. It finds nothing
    unless the last two tokens have stood side by side before, and on a CPU the host has every
    token at once.
    """

    def __init__(self, state: State, cursor: Cursor) -> None:
        earlier = state.valid & (state.position < cursor.position)
        order = torch.argsort(state.position[earlier])
        tokens = [*state.token_id[earlier][order].tolist(), int(cursor.token)]
        positions = [*state.position[earlier][order].tolist(), int(cursor.position)]
        self._pairs: set[tuple[int, int]] = set()
        self._last: tuple[int, int] | None = None
        self._token = tokens[0]
        for token, before, position in zip(tokens[1:], positions[:-1], positions[1:], strict=True):
            self._follow(token, position == before + 1)

    def follow(self, tokens: Iterable[int]) -> None:
        """Adds tokens that were spoken behind the cursor's token, one after another."""
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


@dataclass(frozen=True)
class _Search:
    """What was proposed for the memory of one account."""

    account: Account
    proposal: Proposal
    length: HostCopy


@dataclass(frozen=True)
class _Known:
    """Neighbours in the text of one account."""

    account: Account
    neighbours: Neighbours


class Lookahead:
    """Proposals for one memory. Attributes: ``counts``, of all passes."""

    def __init__(self, memory: Memory, settings: Settings, trained: int) -> None:
        """``trained``: positions the model was trained on."""
        self._memory = memory
        self._lookup = settings.graphs.lookup
        self._culling = settings.culling
        self._last = trained - 1 if settings.graphs.rebases else None  # before renumbering
        self._search: _Search | None = None
        self._known: _Known | None = None
        self.counts = LookupCounts()

    @property
    def width(self) -> int:
        """Tokens that are read in one pass: the cursor's, and those proposed."""
        return 1 + (self._lookup.width if self._lookup else 0)

    def look(self, ticks: Sequence[Tick]) -> None:
        """Begins to look up what follows these ticks, which were the last pass, if the memory as it
        is now allows several tokens in one. An error here is dropped: the ticks are done, and the
        next pass looks up again.
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
        self._search = _Search(self._memory.account, proposal, length)
        return self._search

    def proposal(self, most: int | None) -> Proposal | None:
        """Tokens that may follow the next one, ``most - 1`` at most; None where there are none."""
        if self._lookup is None:
            return None
        account = self._memory.account
        if self._known is not None and self._known.account is not account:
            self._known = None  # something has happened since
        if not self._is_possible() or (most is not None and most < 2):
            return None
        if self._known is not None and not self._known.neighbours.repeat:
            return None
        search = self._search
        if search is None or search.account is not account:
            self._memory.graphs.begin_step()
            search = self._begin()
        length = int(search.length.wait())
        if length == 0:
            return None
        proposal = search.proposal
        if most is not None and length >= most:
            length = most - 1
            proposal = proposal._replace(length=proposal.length.clamp(max=length))
        self.counts.proposed += length
        return proposal

    def replayed(self, ids: Sequence[int]) -> Proposal:
        """As if all but the last of these tokens had been proposed. Raises Refused if they cannot
        have been spoken in one pass.
        """
        if not self._is_possible() or len(ids) > self.width:
            raise Refused(f"{len(ids)} tokens cannot have been spoken in one pass here")
        padding = [0] * (self.width - len(ids))
        return Proposal(self._memory.int64([*ids[:-1], *padding]), self._memory.int64(len(ids) - 1))

    def _is_possible(self) -> bool:
        """Whether as many ticks as a pass has tokens would only ever append."""
        if self._lookup is None:
            return False
        account, width = self._memory.account, self.width
        return (
            account.uncommitted
            and self._memory.state.capacity - account.count >= width
            and cull_count(account.count + width - 1, self._culling) == 0
            and (self._last is None or account.position + width - 1 <= self._last)
        )
