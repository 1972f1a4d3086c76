"""What follows the read of a chunk of a text: several ticks at once that are told what to speak.

It does what single ticks would do, one after another, with three differences. All tokens of the
chunk see the memory as it was before the chunk, and all of those before them in it. Rows go once,
after the last token: as many as single ticks would have let go, by what a policy says then, and no
row of the chunk itself. And sums are added up in another order.

Everything else is stepped token by token: the brightness of every row, which has bounds, the tick
of birth and the tick in which a row last drew more than its share of attention. What a later token
of the chunk gives an earlier one is that one's. Novelty is a sum, and is computed as one.

Nothing here writes.
"""

import torch
from torch import Tensor

from compiled.choose import Eviction, Look
from compiled.finite import not_finite
from compiled.plan import Plan, new_rows
from compiled.read import ChunkReading
from compiled.read_cpu import MOST_TOKENS
from compiled.score import brighten, cull_lowest, echo, running_novelty, seed_brightness
from compiled.state import Cursor, State

MOST_IN_CHUNK = MOST_TOKENS
"""Tokens of a chunk."""


def follow_chunk(
    state: State,
    cursor: Cursor,
    reading: ChunkReading,
    told: Tensor,
    source: Tensor,
    going: Tensor,
    eviction: Eviction,
) -> Plan:
    """What becomes of every row once a chunk has been read: steps 2 and 3 of T ticks.

    Args:
        state: The memory that was read.
        cursor: The first token that was read, which has no row yet.
        reading: Of that token and the first T - 1 of ``told``.
        told: [T] int64, what the ticks speak.
        source: [1] uint8, who says it.
        going: [] int64, how many rows go.
        eviction: What decides which.
    """
    width = len(told)
    step = torch.arange(width, device=told.device)
    ticks, positions = cursor.tick + 1 + step, cursor.position + step  # [T]
    sources = torch.cat([cursor.source, source.expand(width - 1)])
    surprise = torch.cat([cursor.surprise, reading.surprises[:-1]])  # of each on arrival
    means, echoes, strength = _novelties(cursor.novelty, surprise, eviction)
    bright, lit = _brightened(state, reading, sources, ticks, eviction)
    updates = {
        "brightness": torch.where(state.valid, bright[: state.capacity], 0.0),
        "lit": lit[: state.capacity],
        "novelty": echo(state, positions[0], strength, eviction.novelty),
    }
    look = Look(reading.mass.sum(0), positions[-1], step[-1] + 1, ticks[-1])
    scores = eviction.keep_score(state._replace(**updates), look)
    newest = cursor._replace(position=positions[-1:])
    return Plan(
        keys=reading.new_keys,
        values=reading.new_values,
        rows=new_rows(
            width,
            told.device,
            token_id=torch.cat([cursor.token, told[:-1]]),
            position=positions,
            brightness=bright[state.capacity :],
            surprise=surprise,
            novelty=means + echoes,
            source=sources,
            born=ticks,
            lit=lit[state.capacity :],
        ),
        length=step[-1] + 1,
        cull=cull_lowest(state, newest, scores, going, eviction.culling),
        updates=updates,
        cursor=Cursor(
            token=told[-1:] + 0,
            position=positions[-1:] + 1,
            surprise=reading.surprises[-1:] + 0,
            novelty=running_novelty(means[-1:], reading.surprises[-1:], eviction.novelty),
            source=source + 0,
            uncommitted=torch.ones_like(cursor.uncommitted),
            tick=ticks[-1],
        ),
        not_finite=not_finite(
            *(reading.surprises, reading.new_keys, reading.new_values),
            *(torch.zeros_like(strength)[None], reading.mass),  # of logits nothing is kept
        ),
    )


def _novelties(
    before: Tensor, surprise: Tensor, eviction: Eviction
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``running_novelty`` and ``echo`` make of T tokens, in nats.

    Args:
        before: [1], the running mean up to the first of them.
        surprise: [T], of each.
        eviction: Holds the constants.
    Returns:
        The running mean up to each [T], what those after it echo to each [T], and what all of them
        echo to where the first stands: [].
    """
    novelty = eviction.novelty
    step = torch.arange(len(surprise), device=surprise.device)
    distance = step[:, None] - step  # [T, T]
    share = novelty.decay ** distance.abs().float()
    strength = novelty.own_share * surprise
    later = torch.where(distance > 0, share, 0.0)  # [i, j]: that i gives j, which is before it
    # The first one's mean is known. Each of the others is reached by the strengths up to it.
    known = torch.cat([torch.zeros_like(before), strength[1:]])
    means = torch.where(distance >= 0, share, 0.0) @ known + before * share[:, 0]
    return means, strength @ later, strength @ share[:, 0]


def _brightened(
    state: State, reading: ChunkReading, sources: Tensor, ticks: Tensor, eviction: Eviction
) -> tuple[Tensor, Tensor]:
    """What ``brighten`` makes of every row in T ticks, each of which adds a row of the chunk:
    brightness [capacity + T] float32 and lit [capacity + T] int64, the chunk's own rows last.
    """
    step = torch.arange(len(ticks), device=ticks.device)
    masses = torch.cat([reading.mass, reading.own_mass], 1)  # [T, capacity + T]
    rows = state._replace(
        brightness=torch.cat([state.brightness, seed_brightness(sources, eviction.brightness)]),
        lit=torch.cat([state.lit, ticks]),
    )
    for tick, mass, at in zip(ticks, masses, step, strict=True):
        rows = rows._replace(valid=torch.cat([state.valid, step < at]))
        bright, lit = brighten(rows, tick, mass, eviction.brightness)
        # One that has not come yet keeps what it is to come with.
        rows = rows._replace(brightness=torch.where(rows.valid, bright, rows.brightness), lit=lit)
    return rows.brightness, rows.lit
