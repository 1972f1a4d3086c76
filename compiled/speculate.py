"""What follows a read of several proposed tokens: the choices of as many ticks as come true, in one
graph. It only returns; the patch writes.

    choose_ahead(state, cursor, proposal, reading, sampling, forced) → Accepted

Choice i is that of the tick i ticks from now: the same draw (a draw depends on the seed and the
number of the tick alone), from the logits behind the i-th token, on a memory to which the i tokens
before it have been added. It holds if those tokens were chosen as they were proposed. The first
token that was not proposed is accepted, too, and ends the pass. Nothing is ever taken back, because
nothing that was not accepted has been written.

The caller makes sure that none of these ticks forgets a row: the tokens behind it would have seen
what is forgotten.
"""

import dataclasses
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from compiled.choose import Choice, Eviction, Forced, Look, Spoken, follow
from compiled.draw_cpu import Draw
from compiled.lookup import Proposal
from compiled.plan import Plan
from compiled.read import AheadReading, Reading
from compiled.sample import Sampling, SamplingMethod, sample, seen_tokens, surprises
from compiled.score import IN_TENSORS, Culling, Scoring
from compiled.state import Cursor, State, lowest_free_slots

Held = TypeVar("Held", State, Cursor)


class Accepted(NamedTuple):
    """The choices that came true. Of T tokens the first ``number`` are accepted."""

    tokens: Tensor  # [T] int64
    surprise: Tensor  # [T] float32, nats, under the raw logits
    number: Tensor  # [] int64, at least 1
    rows: dict[str, Tensor]  # [T] each, of the tokens that were read: ``length`` have a row now
    length: Tensor  # [] int64
    updates: dict[str, Tensor]  # [capacity] each: columns of the rows that are already there
    cursor: Cursor  # standing at the last token that was accepted
    not_finite: Tensor  # [] int64: what of the first token's reading was not

    def plan(self, reading: AheadReading) -> Plan:
        """The patch of these ticks: the choices with the keys and values that were read."""
        return Plan(
            keys=reading.new_keys,
            values=reading.new_values,
            rows=self.rows,
            length=self.length,
            cull=torch.zeros_like(self.updates["brightness"], dtype=torch.bool),
            updates=self.updates,
            cursor=self.cursor,
            not_finite=self.not_finite,
        )


def choose_ahead(
    state: State,
    cursor: Cursor,
    proposal: Proposal,
    reading: AheadReading,
    sampling: Sampling,
    forced: Forced,
    *,
    method: SamplingMethod,
    eviction: Eviction,
    native: Draw | None = None,
    scoring: Scoring = IN_TENSORS,
) -> Accepted:
    """Chooses from the reading of the cursor's token and those proposed behind it.

    The cursor's token must have no row yet, at least T slots must be free, and T rows more must
    not make a tick forget any.

    Args:
        state: The memory that was read.
        cursor: The first token that was read.
        proposal: The T - 1 tokens behind it.
        reading: What the read returned.
        sampling: Settings of the draw.
        forced: [T] tokens to take instead of draws, as in ``choose``.
        method: What shapes the draw.
        eviction: What decides which rows stay.
        native: The operator that draws, if any.
        scoring: What steps 2 and 3 are made of.
    """
    width = reading.logits.shape[0]
    eviction = dataclasses.replace(eviction, culling=Culling(target=0), keep_score=_no_score)
    slots = lowest_free_slots(state.valid, width)  # [T]
    if native is not None:
        told = torch.cat([cursor.token, proposal.tokens])
        tokens, surprise, extremes = native(
            reading.logits, state, told, cursor.tick, forced.token, method, sampling
        )
    else:
        drawn = _draw(state, cursor, proposal, reading, sampling, method)
        tokens = torch.where(forced.token >= 0, forced.token, drawn)  # [T]
        surprise, extremes = surprises(reading.logits, tokens), reading.logits

    alive = torch.ones((), dtype=torch.bool, device=tokens.device)
    number = torch.zeros_like(proposal.length)
    choices: list[Choice] = []
    for i in range(width):
        one = slice(i, i + 1)
        spoken = Spoken(tokens[one], forced.source[one], surprise[one], extremes[one])
        looked = _reading_of(reading, slots, i)
        choice = follow(state, cursor, looked, spoken, eviction, scoring)
        choices.append(choice)
        if i:  # what is not finite is told by the pass that begins with it
            alive = alive & (choice.not_finite == 0)
        later = _with_row(state, choice, slots[i : i + 1])
        state, cursor = _where(alive, later, state), _where(alive, choice.cursor, cursor)
        number = number + alive
        if i + 1 < width:
            alive = alive & (i < proposal.length) & (proposal.tokens[i] == tokens[i])
    updated = choices[0].updates
    rows = {
        # A row that was there when a later token was chosen has been updated since.
        name: getattr(state, name)[slots]
        if name in updated
        else torch.cat([choice.rows[name] for choice in choices])
        for name in choices[0].rows
    }
    return Accepted(
        tokens=tokens + 0,
        surprise=torch.cat([choice.surprise for choice in choices]),
        number=number,
        rows=rows,
        length=number + 0,
        updates={name: getattr(state, name) + 0 for name in updated},
        cursor=Cursor(*(tensor + 0 for tensor in cursor)),
        not_finite=choices[0].not_finite,
    )


def _no_score(state: State, look: Look) -> Tensor:
    """In place of a policy, where nothing is forgotten."""
    return state.brightness


def _draw(
    state: State,
    cursor: Cursor,
    proposal: Proposal,
    reading: AheadReading,
    sampling: Sampling,
    method: SamplingMethod,
) -> Tensor:
    """What each of the ticks draws if the tokens before it are accepted: [T] int64."""
    width, vocab_size = reading.logits.shape
    remembered = seen_tokens(vocab_size, state.token_id, state.valid, cursor.token)
    every_token = torch.arange(vocab_size, device=remembered.device)
    seen = [remembered]
    for i in range(width - 1):
        seen.append(seen[-1] | (every_token == proposal.tokens[i]))
    ticks = cursor.tick + torch.arange(width, device=remembered.device)[:, None]  # [T, 1]
    return sample(reading.logits, torch.stack(seen), ticks, method, sampling)[:, 0]


def _reading_of(reading: AheadReading, slots: Tensor, i: int) -> Reading:
    """Tick i's reading, as if the i tokens before it had their rows already."""
    own = reading.own_mass[i]  # [T]
    return Reading(
        logits=reading.logits[i : i + 1],
        new_keys=reading.new_keys[:, :, i : i + 1],
        new_values=reading.new_values[:, :, i : i + 1],
        mass=reading.mass[i].scatter(0, slots[:i], own[:i]),
        own_mass=own[i : i + 1],
    )


def _with_row(state: State, choice: Choice, slot: Tensor) -> State:
    """The columns that the next choice looks at, after this one's patch. ``slot`` [1] int64."""
    columns = {
        name: updated.scatter(0, slot, choice.rows[name])
        for name, updated in choice.updates.items()
    }
    return state._replace(
        valid=state.valid.scatter(0, slot, torch.ones_like(slot, dtype=torch.bool)),
        position=state.position.scatter(0, slot, choice.rows["position"]),
        **columns,
    )


def _where(alive: Tensor, then: Held, otherwise: Held) -> Held:
    """Column by column; keys and values, which are in both, are left alone."""
    return type(then)(
        *(
            new if new is old else torch.where(alive, new, old)
            for new, old in zip(then, otherwise, strict=True)
        )
    )
