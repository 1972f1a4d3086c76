"""Steps 2 to 4 on a CPU where nothing is captured, beside their twins in PyTorch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brain.machine.cpu_operator import native_libraries
from compiled.finite import not_finite
from compiled.patch import patch
from compiled.read_cpu import Formats
from compiled.score import IN_TENSORS, Brightness, Culling, Novelty
from compiled.state import State
from compiled.tick_cpu import Steps, steps
from toys import UPDATED_BY_TICKS, digest, toy_config, toy_cursor, toy_plan, toy_state

CAPACITY = 14
ODD = [0.0, 1.0, 1.0, -3.5, 1e30, math.nan, math.inf, -math.inf]


@pytest.fixture(scope="module")
def native() -> Steps:
    return steps(native_libraries(Formats("float", "float")).tick)


@st.composite
def memories(draw: st.DrawFn) -> State:
    """Random columns; some slots have rows, at distinct positions in any order, some pinned."""
    slots = draw(st.lists(st.integers(0, CAPACITY - 1), unique=True))
    places = draw(st.permutations(range(3 * CAPACITY)))
    rows = dict(zip(slots, places, strict=False))
    state = toy_state(toy_config(), CAPACITY, rows, seed=draw(st.integers(0, 99)))
    for slot in draw(st.lists(st.sampled_from(slots), unique=True)) if slots else ():
        state.pinned[slot] = True
    return state


numbers = st.lists(st.sampled_from(ODD) | st.floats(0, 9, width=32), min_size=14, max_size=14)


def same(ours: Tensor, twin: Tensor) -> None:
    """A product and a sum, perhaps in one rounding: two units in the last place of the larger
    addend, and no addend is more than about 300. Integers and flags are equal.
    """
    assert ours.dtype == twin.dtype
    torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-4, equal_nan=True)


@settings(max_examples=150)
@given(state=memories(), mass=numbers, before=numbers, decay=st.sampled_from([0.0, 0.7, 1.0]))
def test_brightness(
    native: Steps, state: State, mass: list[float], before: list[float], decay: float
) -> None:
    given = state._replace(brightness=torch.tensor(before).clamp(max=300.0))
    arguments = (given, torch.tensor(77), torch.tensor(mass), Brightness(decay=decay, gain=1.5))
    twins = zip(native.scoring.brighten(*arguments), IN_TENSORS.brighten(*arguments), strict=True)
    for ours, twin in twins:
        same(ours, twin)


@settings(max_examples=150)
@given(
    state=memories(),
    at=st.integers(-1, 10**7),
    strength=st.floats(0, 20, width=32),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.9999]),
)
def test_echo(native: Steps, state: State, at: int, strength: float, decay: float) -> None:
    arguments = (state, torch.tensor(at), torch.tensor([strength]), Novelty(decay))
    same(native.scoring.echo(*arguments), IN_TENSORS.echo(*arguments))


def test_scoring_writes_no_byte_of_what_it_is_given(native: Steps) -> None:
    state, cursor = (
        toy_state(toy_config(), CAPACITY, {s: 50 - s for s in range(12)}),
        toy_cursor(90),
    )
    mass, strength = torch.rand(CAPACITY), torch.rand(1)
    before = digest(*state, *cursor, mass, strength)
    native.scoring.brighten(state, torch.tensor(3), mass, Brightness())
    native.scoring.echo(state, cursor.position[0], strength, Novelty())
    cull, culled = native.scoring.decide_cull(state, cursor, mass, Culling(10, recent=5))
    native.scoring.not_finite(mass, state.keys)
    assert int(cull.sum()) == len(culled) == 2
    assert digest(*state, *cursor, mass, strength) == before


def test_brightness_at_birth(native: Steps) -> None:
    constants = Brightness(seeds=(1.0, 3.0, 0.5))
    source = torch.arange(5, dtype=torch.uint8)
    assert native.scoring.seed_brightness(source, constants).tolist() == [1.0, 3.0, 0.5, 0.0, 0.0]


@settings(max_examples=300)
@given(
    state=memories(),
    scores=numbers,
    target=st.integers(0, CAPACITY),
    recent=st.integers(0, 20),
    at_once=st.booleans(),
)
def test_what_is_forgotten(
    native: Steps, state: State, scores: list[float], target: int, recent: int, at_once: bool
) -> None:
    culling = Culling(target, sinks=3, recent=recent, at_once=at_once)
    arguments = (state, toy_cursor(3 * CAPACITY), torch.tensor(scores), culling)
    twins = zip(
        native.scoring.decide_cull(*arguments), IN_TENSORS.decide_cull(*arguments), strict=True
    )
    for ours, twin in twins:
        assert ours.dtype == twin.dtype
        assert torch.equal(ours, twin)


@settings(max_examples=100)
@given(
    numbers=numbers,
    part=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_is_not_finite(
    native: Steps, numbers: list[float], part: int, dtype: torch.dtype
) -> None:
    parts = [torch.ones(2, 7), torch.ones(7, 4, dtype=dtype).t(), torch.ones(2, 7)]
    parts[part] = torch.tensor(numbers).to(parts[part].dtype).view(2, 7)
    assert native.scoring.not_finite(*parts).equal(not_finite(*parts))


@settings(max_examples=200)
@given(
    state=memories(),
    width=st.integers(1, 3),
    length=st.integers(0, 3),
    cull=st.lists(st.integers(0, CAPACITY - 1), max_size=3),
    broken=st.sampled_from([0, 0, 0, 5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_patch(
    native: Steps,
    state: State,
    width: int,
    length: int,
    cull: list[int],
    broken: int,
    dtype: torch.dtype,
) -> None:
    """Byte by byte what its twin writes, wherever it writes."""
    state = state._replace(keys=state.keys.to(dtype), values=state.values.to(dtype))
    cursor = toy_cursor(9)
    plan = toy_plan(state, cursor, width, 0)
    going = torch.zeros_like(state.valid)
    going[cull] = True
    free = CAPACITY - int((state.valid & ~going).sum())
    plan = plan._replace(
        length=torch.tensor(min(length, width, free)),
        cull=going,
        updates={name: getattr(state, name).flip(0) for name in UPDATED_BY_TICKS},
        cursor=toy_cursor(10, 7),
        not_finite=torch.tensor(broken),
    )
    twin = state._replace(**{name: held.clone() for name, held in state._asdict().items()})
    twin_cursor = type(cursor)(*(held.clone() for held in cursor))
    native.patch(state, cursor, plan)
    patch(twin, twin_cursor, plan)
    for ours, theirs in zip((*state, *cursor), (*twin, *twin_cursor), strict=True):
        assert torch.equal(ours, theirs)
