"""What follows the read of a chunk, beside the ticks that it stands for, in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled.choose import Eviction, Look
from compiled.chunk import follow_chunk
from compiled.read import ChunkReading
from compiled.score import Brightness, Culling, Novelty
from compiled.state import State
from toys import digest, toy_config, toy_cursor, toy_state

CAPACITY = 14
LOOKS: list[Look] = []


def dimmest(state: State, look: Look) -> torch.Tensor:
    LOOKS.append(look)
    return state.brightness


EVICTION = Eviction(
    Brightness(decay=0.8, gain=1.5, maximum=6.0, seeds=(1.0, 2.0, 3.0)),
    Novelty(decay=0.7),
    Culling(target=8, sinks=2, recent=3),
    dimmest,
)


def reading(width: int, seed: int) -> ChunkReading:
    generator = torch.Generator().manual_seed(seed)
    config = toy_config()
    shape = (config.num_layers, config.num_kv_heads, width, config.head_dim)
    own = torch.rand(width, width, generator=generator).tril()
    return ChunkReading(
        surprises=5 * torch.rand(width, generator=generator),
        new_keys=torch.randn(shape, generator=generator),
        new_values=torch.randn(shape, generator=generator),
        mass=torch.rand(width, CAPACITY, generator=generator),
        own_mass=own,
    )


@settings(max_examples=60, deadline=None)
@given(
    slots=st.lists(st.integers(0, CAPACITY - 1), min_size=3, max_size=9, unique=True),
    width=st.integers(2, 7),
    going=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_it_is_ticks_in_plain_python(slots: list[int], width: int, going: int, seed: int) -> None:
    rows = {slot: 3 * place for place, slot in enumerate(slots)}
    state = toy_state(toy_config(), CAPACITY, rows, seed=seed)
    newest = 3 * len(slots)
    cursor = toy_cursor(newest, 7)._replace(
        surprise=torch.tensor([2.5]),
        novelty=torch.tensor([1.5]),
        source=torch.tensor([1], dtype=torch.uint8),
        uncommitted=torch.tensor(1),
        tick=torch.tensor(40),
    )
    read, told = reading(width, seed), torch.arange(20, 20 + width)
    before = digest(*state, *cursor, *read)
    user = torch.tensor([2], dtype=torch.uint8)
    plan = follow_chunk(state, cursor, read, told, user, torch.tensor(going), EVICTION)
    assert digest(*state, *cursor, *read) == before

    held = {slot: float(state.brightness[slot]) for slot in rows}
    lit = {slot: int(state.lit[slot]) for slot in rows}
    novelty = {slot: float(state.novelty[slot]) for slot in rows}
    at = dict(rows)
    mean, surprise = 1.5, 2.5
    for i in range(width):  # the chunk's rows are CAPACITY + i here
        for row in held:
            mass = read.mass[i, row] if row < CAPACITY else read.own_mass[i, row - CAPACITY]
            scaled = float(mass) * len(held)
            held[row] = min(max(0.8 * held[row] + 1.5 * scaled, 0.0), 6.0)
            lit[row] = 41 + i if scaled > 1.0 else lit[row]
            novelty[row] += 0.3 * surprise * 0.7 ** (newest + i - at[row])
        row = CAPACITY + i
        held[row], lit[row], at[row] = (2.0 if i == 0 else 3.0), 41 + i, newest + i
        novelty[row] = mean
        surprise = float(read.surprises[i])
        mean = 0.7 * mean + 0.3 * surprise
    for name, expected in (("brightness", held), ("lit", lit), ("novelty", novelty)):
        ours = torch.cat([plan.updates[name], plan.rows[name]])
        for row, value in expected.items():
            assert float(ours[row]) == pytest.approx(value, rel=1e-4, abs=1e-4), (name, row)
    assert plan.rows["token_id"].tolist() == [7, *range(20, 19 + width)]
    assert plan.rows["position"].tolist() == list(range(newest, newest + width))
    assert plan.rows["born"].tolist() == list(range(41, 41 + width))
    assert plan.rows["source"].tolist() == [1, *[2] * (width - 1)]
    assert plan.rows["surprise"].tolist() == pytest.approx([2.5, *read.surprises[:-1].tolist()])
    assert float(plan.cursor.novelty[0]) == pytest.approx(mean, rel=1e-4)
    assert (int(plan.cursor.token), int(plan.cursor.position)) == (19 + width, newest + width)
    assert (int(plan.cursor.tick), int(plan.length)) == (40 + width, width)
    may_go = [s for s, p in rows.items() if 2 <= p <= newest + width - 1 - 3]
    lowest = sorted(may_go, key=lambda slot: (float(plan.updates["brightness"][slot]), rows[slot]))
    assert sorted(torch.nonzero(plan.cull)[:, 0].tolist()) == sorted(lowest[:going])
    look = LOOKS[-1]
    assert (int(look.newest), int(look.queries), int(look.tick)) == (
        newest + width - 1,
        width,
        40 + width,
    )
    torch.testing.assert_close(look.mass, read.mass.sum(0))


@pytest.mark.parametrize("part", ["surprises", "new_keys", "new_values", "mass"])
def test_what_is_not_finite_is_told(part: str) -> None:
    read = reading(4, 0)
    broken = getattr(read, part).clone()
    broken.view(-1)[1] = math.nan
    state, cursor = toy_state(toy_config(), CAPACITY, {0: 0, 1: 1}), toy_cursor(2)
    user = torch.tensor([1], dtype=torch.uint8)
    for given_, told in ((read, False), (read._replace(**{part: broken}), True)):
        plan = follow_chunk(state, cursor, given_, torch.arange(4), user, torch.tensor(0), EVICTION)
        assert bool(plan.not_finite) == told
