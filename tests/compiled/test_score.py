"""Brightness and the choice of what to forget, against plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiled.score import (
    MOST_CULLED,
    Brightness,
    Culling,
    Novelty,
    brighten,
    cull_count,
    decide_cull,
    echo,
    running_novelty,
    seed_brightness,
)
from compiled.state import NOWHERE, Cursor, State
from toys import digest, toy_config, toy_cursor, toy_state

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 12
TICK = torch.tensor(77)


@pytest.mark.parametrize(
    ("count", "target", "culled"),
    [(0, 10, 0), (9, 10, 0), (10, 10, 1), (11, 10, 2), (999, 10, 2), (999, 0, 0)],
)
def test_how_many_are_culled(count: int, target: int, culled: int) -> None:
    assert cull_count(count, Culling(target)) == culled


@pytest.mark.parametrize(
    ("count", "target", "culled"),
    [(0, 10, 0), (9, 10, 0), (10, 10, 1), (11, 10, 2), (999, 10, 990), (999, 0, 0)],
)
def test_how_many_are_culled_at_once(count: int, target: int, culled: int) -> None:
    """So many that the target is what is left when the tick's own row is there."""
    assert cull_count(count, Culling(target, at_once=True)) == culled
    assert not culled or count - culled + 1 == target


def test_novelty_is_a_running_mean_of_surprise() -> None:
    constants = Novelty(decay=0.75)
    assert running_novelty(2.0, 6.0, constants) == 3.0
    assert running_novelty(torch.tensor([2.0]), torch.tensor([6.0]), constants).tolist() == [3.0]
    told = 0.0
    for _ in range(100):
        told = running_novelty(told, 5.0, constants)
    assert told == pytest.approx(5.0, abs=1e-9)


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.99])
def test_an_echo_is_nothing_from_its_reach_on(decay: float) -> None:
    """An edit leaves those rows out, and every bit is as if it had not."""
    constants = Novelty(decay)
    reach = constants.reach
    state = toy_state(toy_config(), 4, {0: 0, 1: 1, 2: 2, 3: reach + 1})
    state.novelty.zero_()
    told = echo(state, torch.tensor(reach + 2), torch.tensor(1e6), constants)
    assert told[:3].tolist() == [0.0, 0.0, 0.0]
    assert told[3] > 0
    assert reach < 1.02 * 150 * math.log(2) / -math.log(decay) + 1  # no further than need be


def test_an_echo_reaches_the_rows_before_it_and_fades_with_distance() -> None:
    state = toy_state(toy_config(), CAPACITY, {1: 5, 2: 6, 4: 8, 9: 30})
    told = echo(state, torch.tensor(8), torch.tensor(2.0), Novelty(decay=0.5))
    expected = state.novelty.clone()
    expected[1] += 2.0 * 0.5**3
    expected[2] += 2.0 * 0.5**2
    torch.testing.assert_close(told, expected, rtol=1e-6, atol=0)
    far = echo(state, torch.tensor(1 << 40), torch.tensor(2.0), Novelty(decay=0.5))
    assert torch.equal(far, state.novelty)


def test_brightness_decays_and_gains_by_attention() -> None:
    state = toy_state(toy_config(), CAPACITY, {1: 5, 2: 6, 4: 7, 9: 8})
    state.brightness.copy_(torch.arange(CAPACITY))
    mass = torch.zeros(CAPACITY)
    mass[[1, 2, 4]] = torch.tensor([0.5, 0.25, 0.0])
    bright, lit = brighten(state, TICK, mass, Brightness(decay=0.5, gain=2.0, maximum=5.0))
    expected = torch.zeros(CAPACITY)
    expected[1] = 0.5 * 1 + 2.0 * (0.5 * 4)  # 4 valid rows: average attention counts 1
    expected[2] = 0.5 * 2 + 2.0 * (0.25 * 4)
    expected[4] = 0.5 * 4
    expected[9] = 0.5 * 9
    torch.testing.assert_close(bright, expected.clamp(max=5.0), rtol=1e-6, atol=0)
    assert bright[1] == 4.5
    assert bright[9] == 4.5
    expected_lit = state.lit.clone()
    expected_lit[1] = 77  # twice the average attention; slot 2 drew just the average
    assert torch.equal(lit, expected_lit)


def test_average_attention_gains_one_a_tick_and_settles() -> None:
    rows = {slot: slot for slot in range(8)}
    state = toy_state(toy_config(), CAPACITY, rows)
    state.brightness.zero_()
    constants, mass = Brightness(decay=0.9), state.valid / 8
    for _ in range(300):
        state.brightness.copy_(brighten(state, TICK, mass, constants)[0])
    # gain / (1 - decay); 0.9 is rounded to float32, so 10 is off by some 10 * 2^-24 / 0.1.
    torch.testing.assert_close(state.brightness[:8], torch.full((8,), 10.0), rtol=1e-5, atol=0)
    assert (state.brightness[8:] == 0).all()


def test_brightness_stays_within_its_bounds() -> None:
    state = toy_state(toy_config(), CAPACITY, {0: 0, 1: 1})
    state.brightness[:2] = torch.tensor([300.0, -40.0])
    bright, lit = brighten(state, TICK, torch.zeros(CAPACITY), Brightness())
    assert bright[:2].tolist() == [255.0, 0.0]
    assert torch.equal(lit, state.lit)


def test_seeds_go_by_source() -> None:
    seeds = Brightness(seeds=(100.0, 50.0, 25.0))
    source = torch.tensor([2, 0, 1, 1, 7], dtype=torch.uint8)
    assert seed_brightness(source, seeds).tolist() == [25.0, 100.0, 50.0, 50.0, 0.0]


def plain_decision(
    rows: dict[int, int], pinned: set[int], scores: list[float], at: int, forgetting: Culling
) -> list[int]:
    """Positions to forget, in order. ``rows``: slot → position; ``pinned``: slots."""
    candidates = [
        (scores[slot], position)
        for slot, position in rows.items()
        if slot not in pinned
        and position >= forgetting.sinks
        and not position > at - forgetting.recent
    ]
    return [position for _, position in sorted(candidates)[: cull_count(len(rows), forgetting)]]


def decide(
    state: State, at: int, scores: Tensor, forgetting: Culling
) -> tuple[list[int], list[int]]:
    """Positions that are told, and positions of the rows that are marked."""
    cull, positions = decide_cull(state, toy_cursor(at), scores, forgetting)
    assert positions.shape == ((CAPACITY,) if forgetting.at_once else (MOST_CULLED,))
    marked = state.position[cull].tolist()
    assert bool(state.valid[cull].all())
    return [p for p in positions.tolist() if p != NOWHERE], sorted(marked)


@settings(max_examples=300)
@given(st.data())
def test_the_decision_is_that_of_plain_python(data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, CAPACITY - 1), unique=True), "slots")
    where = data.draw(
        st.lists(st.integers(0, 25), min_size=len(slots), max_size=len(slots), unique=True)
    )
    rows = dict(zip(slots, where, strict=True))
    pinned = data.draw(st.sets(st.sampled_from(slots)) if slots else st.just(set()), "pinned")
    # Few different scores, so that ties are common; infinite ones too.
    value = st.sampled_from([0.0, 1.0, 2.0, -1.5, math.inf, -math.inf])
    scores = data.draw(st.lists(value, min_size=CAPACITY, max_size=CAPACITY))
    at = data.draw(st.integers(0, 27), "cursor")
    forgetting = Culling(
        target=max(0, len(slots) + data.draw(st.integers(-2, 1), "above or below")),
        sinks=data.draw(st.integers(0, 4)),
        recent=data.draw(st.integers(1, 5)),
        at_once=data.draw(st.booleans(), "at once"),
    )
    state = toy_state(toy_config(), CAPACITY, rows)
    state.pinned[list(pinned)] = True
    before = digest(*state)
    told, marked = decide(state, at, torch.tensor(scores), forgetting)
    expected = plain_decision(rows, pinned, scores, at, forgetting)
    assert told == expected if not forgetting.at_once else set(told) == set(expected)
    assert marked == sorted(told)
    assert digest(*state) == before

    order = torch.tensor(data.draw(st.permutations(range(CAPACITY)), "order"))
    moved = State(*(t.index_select(2 if t.dim() == 4 else 0, order) for t in state))
    again, marked_again = decide(moved, at, torch.tensor(scores)[order], forgetting)
    assert (sorted(again), marked_again) == (sorted(told), marked)


@pytest.mark.parametrize("score", [0.0, math.nan, math.inf])
def test_the_count_is_culled_whatever_the_scores(score: float) -> None:
    """The host counts on it: it never asks the device how many rows went."""
    state = toy_state(toy_config(), CAPACITY, {slot: slot for slot in range(10)})
    scores = torch.full((CAPACITY,), score)
    told, marked = decide(state, 9, scores, Culling(target=9, sinks=1, recent=2))
    assert told == marked == [1, 2]


def test_the_cursor_is_only_read() -> None:
    state = toy_state(toy_config(), CAPACITY, {slot: slot for slot in range(10)})
    cursor: Cursor = toy_cursor(9)
    before = digest(*cursor)
    decide_cull(state, cursor, state.brightness, Culling(target=5, sinks=1, recent=1))
    assert digest(*cursor) == before
