"""What follows a read of one token, in one graph: the next token, how bright every row is now,
what to forget, and where the next read stands. It only returns; the patch writes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compiled.patch import Plan, RowColumns
from compiled.read import Reading
from compiled.sample import Sampling, SamplingMethod, draw, penalize_some, surprises
from compiled.score import (
    Brightness,
    Forgetting,
    Novelty,
    brighten,
    decide_cull,
    echo,
    running_novelty,
    seed_brightness,
)
from compiled.state import Cursor, State

KeepScore = Callable[[State, Reading], Tensor]
"""A policy: (state, reading) → keep-scores [capacity] float32; the state's ``brightness`` is that
after the reading. Rows with the lowest scores are forgotten first."""

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
    rows: RowColumns  # the row of the token that was read
    cull: Tensor  # [capacity] bool
    culled: Tensor  # int64: positions of those rows, filled up with NOWHERE
    brightness: Tensor  # [capacity] float32
    lit: Tensor  # [capacity] int64
    novelty: Tensor  # [capacity] float32
    cursor: Cursor  # standing at ``token``

    def plan(self, reading: Reading) -> Plan:
        """The patch of this tick: this choice with the keys and values that were read."""
        return Plan(
            reading.new_keys,
            reading.new_values,
            self.rows,
            self.cull,
            self.brightness,
            self.lit,
            self.novelty,
            self.cursor,
        )


@dataclass(frozen=True)
class Conduct:
    """What decides, after a read, which rows stay: constants and policy."""

    brightness: Brightness
    novelty: Novelty
    forgetting: Forgetting
    keep_score: KeepScore


def choose(
    state: State,
    cursor: Cursor,
    reading: Reading,
    sampling: Sampling,
    forced: Forced,
    *,
    method: SamplingMethod,
    conduct: Conduct,
) -> Choice:
    """Chooses from the reading of the cursor's token (T = 1)."""
    logits = reading.logits[0]  # [vocab]
    ids = torch.cat([torch.where(state.valid, state.token_id, cursor.token), cursor.token])
    sampled = draw(
        penalize_some(logits, ids, sampling.repetition_penalty), cursor.tick, method, sampling
    )
    token = torch.where(forced.token >= 0, forced.token, sampled)
    return follow(state, cursor, reading, Forced(token, forced.source), conduct)


def follow(
    state: State, cursor: Cursor, reading: Reading, spoken: Forced, conduct: Conduct
) -> Choice:
    """What becomes of every row once the token is known: steps 2 and 3, and the patch they ask
    for. ``spoken.token`` is the token itself.
    """
    token = spoken.token
    surprise = surprises(reading.logits, token)
    bright, lit = brighten(state, cursor.tick + 1, reading.mass, conduct.brightness)
    # The token that was read gets its row now, and is heard by the rows before it.
    strength = conduct.novelty.fresh * cursor.surprise[0] * cursor.uncommitted
    novelty = echo(state, cursor.position[0], strength, conduct.novelty)
    now = state._replace(brightness=bright, lit=lit, novelty=novelty)
    keep_scores = conduct.keep_score(now, reading)
    cull, culled = decide_cull(state, cursor, keep_scores, conduct.forgetting)
    tick = cursor.tick + 1
    rows = RowColumns(
        token_id=cursor.token + 0,
        position=cursor.position + 0,
        brightness=seed_brightness(cursor.source, conduct.brightness),
        surprise=cursor.surprise + 0,
        novelty=cursor.novelty + 0,
        source=cursor.source + 0,
        born=tick[None] + 0,
        lit=tick[None] + 0,
        pinned=torch.zeros_like(cursor.source, dtype=torch.bool),
        length=cursor.uncommitted + 0,
    )
    following = Cursor(
        token=token + 0,
        position=cursor.position + 1,
        surprise=surprise + 0,
        novelty=running_novelty(cursor.novelty, surprise, conduct.novelty),
        source=spoken.source + 0,
        uncommitted=torch.ones_like(cursor.uncommitted),
        tick=tick,
    )
    return Choice(token + 0, surprise, rows, cull, culled, bright, lit, novelty, following)
