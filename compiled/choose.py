"""What follows a read of one token, in one graph: the next token, how bright every row is now,
what to forget, and where the next read stands. It only returns; the patch writes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compiled.draw_cpu import Draw
from compiled.plan import Plan, new_rows
from compiled.read import Reading
from compiled.sample import Sampling, SamplingMethod, draw, penalize_some, surprises
from compiled.score import IN_TENSORS, Brightness, Culling, Novelty, Scoring, running_novelty
from compiled.state import Cursor, State


class Look(NamedTuple):
    """What a policy is given beside the state: how the newest tokens looked at the memory.

    In a tick one token looks. Where several look at once, in one read, masses are added up and the
    other numbers are those of the last of them; ``queries`` says how many they are. None of them
    has a row in the state yet.
    """

    mass: Tensor  # [capacity] float32: attention each slot drew, a mean over layers and heads
    newest: Tensor  # [] int64: position of the last token that looked
    queries: Tensor  # [] int64: how many tokens looked
    tick: Tensor  # [] int64: the tick being made, counted from 1


KeepScore = Callable[[State, Look], Tensor]
"""A policy: ``(state, look)`` → keep-scores [capacity] float32. The rows with the lowest scores are
forgotten first; scores of protected rows and of slots without a row are not looked at. The state's
``brightness``, ``lit`` and ``novelty`` are those after the read. A policy must be a pure function
of tensors with a fixed shape: it is compiled into the graph that chooses."""

UNFORCED = -1
"""In place of a token id: let the sampler choose."""


class Forced(NamedTuple):
    """A token to take instead of sampling one (UNFORCED for none), and the source it gets."""

    token: Tensor  # [1] int64
    source: Tensor  # [1] uint8


class Choice(NamedTuple):
    """Steps 1 to 3 after the read: what the patch is to do, and what became of every token."""

    token: Tensor  # [1] int64: spoken or fed
    surprise: Tensor  # [1] float32, nats, under the raw logits
    rows: dict[str, Tensor]  # [1] each: the row of the token that was read
    length: Tensor  # [] int64: 1 if that row is new, 0 if the memory has it
    cull: Tensor  # [capacity] bool
    culled: Tensor  # int64: positions of those rows, filled up with NOWHERE
    updates: dict[str, Tensor]  # [capacity] each: columns of the rows that are already there
    cursor: Cursor  # standing at ``token``
    not_finite: Tensor  # [] int64: what of the reading was not (compiled/finite.py)

    def plan(self, reading: Reading) -> Plan:
        """The patch of this tick: this choice with the keys and values that were read."""
        return Plan(
            keys=reading.new_keys,
            values=reading.new_values,
            rows=self.rows,
            length=self.length,
            cull=self.cull,
            updates=self.updates,
            cursor=self.cursor,
            not_finite=self.not_finite,
        )


@dataclass(frozen=True)
class Eviction:
    """What decides, after a read, which rows stay: constants and policy."""

    brightness: Brightness
    novelty: Novelty
    culling: Culling
    keep_score: KeepScore


def choose(
    state: State,
    cursor: Cursor,
    reading: Reading,
    sampling: Sampling,
    forced: Forced,
    *,
    method: SamplingMethod,
    eviction: Eviction,
    native: Draw | None = None,
    scoring: Scoring = IN_TENSORS,
) -> Choice:
    """Chooses from the reading of the cursor's token (T = 1).

    Args:
        state: The memory that was read.
        cursor: The token that was read.
        reading: What the read returned.
        sampling: Settings of the draw.
        forced: The token to take instead of a draw, if any.
        method: What shapes the draw.
        eviction: What decides which rows stay.
        native: The operator that draws, if any.
        scoring: What steps 2 and 3 are made of.
    """
    if native is not None:
        told = native(
            reading.logits, state, cursor.token, cursor.tick, forced.token, method, sampling
        )
        spoken = Spoken(told.token, forced.source, told.surprise, told.extremes)
        return follow(state, cursor, reading, spoken, eviction, scoring)
    logits = reading.logits[0]  # [vocab]
    ids = torch.cat([torch.where(state.valid, state.token_id, cursor.token), cursor.token])
    sampled = draw(
        penalize_some(logits, ids, sampling.repetition_penalty), cursor.tick, method, sampling
    )
    token = torch.where(forced.token >= 0, forced.token, sampled)
    spoken = Spoken(token, forced.source, surprises(reading.logits, token), reading.logits)
    return follow(state, cursor, reading, spoken, eviction, scoring)


class Spoken(NamedTuple):
    """A token that is spoken after some logits, and how."""

    token: Tensor  # [1] int64
    source: Tensor  # [1] uint8
    surprise: Tensor  # [1] float32, nats
    extremes: Tensor  # float32: the logits, or the least and the greatest of them


def follow(
    state: State,
    cursor: Cursor,
    reading: Reading,
    spoken: Spoken,
    eviction: Eviction,
    scoring: Scoring = IN_TENSORS,
) -> Choice:
    """What becomes of every row once the token is known: steps 2 and 3, and the patch they ask for.

    Args:
        state: The memory that was read.
        cursor: The token that was read.
        reading: What the read returned.
        spoken: The token itself.
        eviction: What decides which rows stay.
        scoring: What steps 2 and 3 are made of.
    """
    token, surprise = spoken.token, spoken.surprise
    tick = cursor.tick + 1
    bright, lit = scoring.brighten(state, tick, reading.mass, eviction.brightness)
    # The token that was read gets its row now, and adds to the novelty of the rows before it.
    strength = eviction.novelty.own_share * cursor.surprise[0] * cursor.uncommitted
    novelty = scoring.echo(state, cursor.position[0], strength, eviction.novelty)
    updates = {"brightness": bright, "lit": lit, "novelty": novelty}
    look = Look(reading.mass, cursor.position[0], torch.ones_like(tick), tick)
    keep_scores = eviction.keep_score(state._replace(**updates), look)
    cull, culled = scoring.decide_cull(state, cursor, keep_scores, eviction.culling)
    rows = new_rows(
        1,
        token.device,
        token_id=cursor.token + 0,
        position=cursor.position + 0,
        brightness=scoring.seed_brightness(cursor.source, eviction.brightness),
        surprise=cursor.surprise + 0,
        novelty=cursor.novelty + 0,
        source=cursor.source + 0,
        born=tick[None] + 0,
        lit=tick[None] + 0,
        pinned=torch.zeros_like(cursor.source, dtype=torch.bool),
    )
    following = Cursor(
        token=token + 0,
        position=cursor.position + 1,
        surprise=surprise + 0,
        novelty=running_novelty(cursor.novelty, surprise, eviction.novelty),
        source=spoken.source + 0,
        uncommitted=torch.ones_like(cursor.uncommitted),
        tick=tick,
    )
    return Choice(
        token=token + 0,
        surprise=surprise,
        rows=rows,
        length=cursor.uncommitted + 0,
        cull=cull,
        culled=culled,
        updates=updates,
        cursor=following,
        not_finite=scoring.not_finite(
            surprise, reading.new_keys, reading.new_values, spoken.extremes, reading.mass
        ),
    )
