"""Prompt lookup: what may come next, where text repeats.

    propose(state, cursor, lookup, ends) → Proposal

The last tokens, the cursor's included, are looked for among the remembered rows, in text order;
what followed them there is proposed to follow them here (Saxena 2023, "Prompt lookup decoding"). A
proposal is a guess, never a decision: ``speculate.py`` draws every token as if none had been
made. It is a function of the memory alone, so that a brain which was saved, killed or edited looks
up the same.

A guess that fails costs a wide read. So lookup is trusted as far as it deserves: the same search is
made for each of the last ``window`` tokens, whose successors are known, and nothing is proposed
unless the share of guesses that were right, counting one right and one wrong to begin with, is at
least ``trust``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled.state import NOWHERE, Cursor, State

_LAST_POSITION = torch.iinfo(torch.int64).max


WIDEST = 31
"""Tokens proposed, and tokens that must match, at most: a graph holds a choice for each."""
LONGEST_WINDOW = 1024
"""Tokens for which the search is tried, at most."""


@dataclass(frozen=True)
class Lookup:
    """How to look up: at most ``width`` tokens are proposed, after a match of ``longest`` down to
    ``shortest`` tokens.
    """

    width: int = 7
    longest: int = 3
    shortest: int = 2
    window: int = 32
    trust: float = 0.7

    def __post_init__(self) -> None:
        """Raises ValueError, beginning with the name of what is wrong."""
        if not 1 <= self.width <= WIDEST:
            raise ValueError(f"width must be between 1 and {WIDEST}, not {self.width}")
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"shortest must be at least 1 and at most the longest, {self.longest}, not "
                f"{self.shortest}"
            )
        if self.longest > WIDEST:
            raise ValueError(f"longest must be at most {WIDEST}, not {self.longest}")
        if not 0 <= self.window <= LONGEST_WINDOW:
            raise ValueError(f"window must be between 0 and {LONGEST_WINDOW}, not {self.window}")
        if not 0 <= self.trust <= 1:
            raise ValueError(f"trust must be between 0 and 1, not {self.trust}")


class Proposal(NamedTuple):
    """Tokens that may follow the cursor's. From ``length`` on they are padding, and zero."""

    tokens: Tensor  # [width] int64
    length: Tensor  # [] int64


def propose(state: State, cursor: Cursor, lookup: Lookup, ends: tuple[int, ...] = ()) -> Proposal:
    """What followed the latest of the longest matches of the last tokens.

    Tokens match where they stand at consecutive positions: nothing is found across a row that was
    forgotten, until re-basing closes the gap. What is found may reach up to the cursor's token;
    then it goes round, as text of that period would.

    Args:
        state: The memory.
        cursor: The token that is read next.
        lookup: How to look up.
        ends: Tokens that end a text: none of them is ever proposed.
    """
    text, position, count = _in_order(state, cursor)
    found, after = _matches(text, position, count, lookup)

    truth = _successors(text, position, count, lookup)
    tried = found & (truth != NOWHERE)
    right = tried & (text[after] == truth)
    trusted = right.sum() + 1 >= lookup.trust * (tried.sum() + 2)

    first = after[-1:]  # [1]
    period = count + 1 - first  # tokens from the first that is proposed to the cursor's
    index = torch.arange(lookup.width, device=text.device)
    step = index % period.clamp(min=1)  # [width]
    place = first + step
    good = position[place] == position[first] + step
    for end in ends:
        good = good & (text[place] != end)
    unbroken = torch.where(good, lookup.width, index).amin()
    length = torch.where(found[-1] & trusted, unbroken, 0)
    return Proposal(torch.where(index < length, text[place], 0), length)


def _in_order(state: State, cursor: Cursor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and positions up to the cursor's, in text order, and the index of the cursor's token.

    ``[capacity + 1]`` int64 each, filled up with NOWHERE; the index is [] int64.
    """
    earlier = state.valid & (state.position < cursor.position)
    order = torch.argsort(torch.where(earlier, state.position, _LAST_POSITION))
    count = earlier.sum()
    index = torch.arange(earlier.shape[0] + 1, device=earlier.device)
    nowhere = torch.full_like(cursor.token, NOWHERE)

    def column(rows: Tensor, last: Tensor) -> Tensor:
        held = torch.cat([torch.where(earlier, rows, NOWHERE)[order], nowhere])
        return torch.where(index == count, last, held)

    return column(state.token_id, cursor.token), column(state.position, cursor.position), count


def _ends(count: Tensor, window: int) -> Tensor:
    """Indexes of the tokens whose successor is looked up: the last ``window``, then the cursor's.
    Those before the text begins are negative. [window + 1]
    """
    return count - window + torch.arange(window + 1, device=count.device)


def _matches(
    text: Tensor, position: Tensor, count: Tensor, lookup: Lookup
) -> tuple[Tensor, Tensor]:
    """For each of the ends, whether the tokens up to it occur earlier, and the index of what
    followed them in the best such place (0 if there is none): [window + 1] bool and int64.
    """
    ends = _ends(count, lookup.window)
    size = text.shape[0]
    index = torch.arange(size, dtype=torch.int32, device=text.device)
    before = _before(text, position, lookup.longest)  # [longest, size]
    mine = before.index_select(1, ends.clamp(min=0))  # [longest, window + 1]
    mine = torch.where(mine == NOWHERE, NOWHERE - 1, mine)  # a gap is like no other
    matched = torch.zeros(ends.shape[0], size, dtype=torch.int32, device=text.device)
    running = ends.to(torch.int32)[:, None] > index  # earlier, and not before the text
    for back in range(lookup.longest):
        running = running & (mine[back, :, None] == before[back])
        matched = matched + running
    followed = F.pad(position[1:] == position[:-1] + 1, (0, 1)) & (position != NOWHERE)
    usable = followed & (matched >= lookup.shortest)
    # Of the longest the latest. All of this is small enough for 32 bits, and twice as fast in them.
    best = torch.where(usable, matched * size + index, -1).amax(1).to(torch.int64)
    found = best >= 0
    return found, torch.where(found, best % size + 1, 0)


def _before(text: Tensor, position: Tensor, longest: int) -> Tensor:
    """The tokens that stand 0, 1, … positions before each: [longest, capacity + 1] int32, NOWHERE
    where there is a gap or the text begins.
    """
    short, size = text.to(torch.int32), text.shape[0]
    rows = [short]
    for back in range(1, min(longest, size)):
        unbroken = position[back:] == position[: size - back] + back
        known = torch.where(unbroken, short[: size - back], NOWHERE)
        rows.append(F.pad(known, (back, 0), value=NOWHERE))
    rows += [torch.full_like(short, NOWHERE)] * (longest - len(rows))
    return torch.stack(rows)


def _successors(text: Tensor, position: Tensor, count: Tensor, lookup: Lookup) -> Tensor:
    """The token that came after each of the ends, NOWHERE for none: [window + 1] int64."""
    ends = _ends(count, lookup.window).clamp(min=0)
    behind = (ends + 1).clamp(max=text.shape[0] - 1)
    return torch.where(position[behind] == position[ends] + 1, text[behind], NOWHERE)
