"""Which rows every policy keeps, on masses made by hand."""

import pytest
import torch
from torch import Tensor

from brain import Refused
from brain.policies import POLICIES, policy
from compiled.choose import Look
from compiled.read import Reading
from compiled.score import Culling
from compiled.state import State
from toys import digest, toy_config, toy_state

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 12
ROWS = {slot: 3 * slot for slot in range(10)}  # slots 10 and 11 are free
FORGETTING = Culling(target=10, sinks=1, recent=6)


def scene() -> tuple[State, Reading]:
    state = toy_state(toy_config(), CAPACITY, ROWS)
    state.brightness.copy_(torch.arange(CAPACITY) % 5)
    generator = torch.Generator().manual_seed(4)
    reading = Reading(
        logits=torch.zeros(1, 40),
        new_keys=torch.zeros(2, 2, 1, 8),
        new_values=torch.zeros(2, 2, 1, 8),
        mass=torch.rand(CAPACITY, generator=generator),
        own_mass=torch.zeros(1),
    )
    return state, reading


def look_of(state: State, reading: Reading) -> Look:
    """One token looks, right behind the newest row."""
    newest = torch.where(state.valid, state.position, 0).amax() + 1
    return Look(reading.mass, newest, torch.tensor(1), torch.tensor(1))


def scores(name: str, state: State, reading: Reading, share: float = 0.3) -> Tensor:
    return policy(name, FORGETTING, share)(state, look_of(state, reading))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_only_looks_and_slot_order_plays_no_part(name: str) -> None:
    state, reading = scene()
    before = digest(*state, *reading)
    told = scores(name, state, reading)
    assert told.shape == (CAPACITY,)
    assert told.dtype == torch.float32
    assert told[state.valid].isfinite().all()
    assert digest(*state, *reading) == before
    order = torch.randperm(CAPACITY, generator=torch.Generator().manual_seed(1))
    moved = State(*(t.index_select(2 if t.dim() == 4 else 0, order) for t in state))
    again = scores(name, moved, reading._replace(mass=reading.mass[order]))
    torch.testing.assert_close(again[moved.valid], told[order][moved.valid], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_what_lies_in_free_slots_decides_nothing(name: str) -> None:
    state, reading = scene()
    told = scores(name, state, reading)
    for column in (state.keys, state.values):
        column[:, :, 10:] = 1e30
    for column in (state.brightness, state.surprise, state.novelty):
        column[10:] = 1e30
    state.position[10:] = torch.tensor([1 << 40, 5])
    assert torch.equal(scores(name, state, reading)[:10], told[:10])


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("brightness", "brightness"),
        ("h2o", "brightness"),
        ("surprise", "surprise"),
        ("sink_recent", "position"),
    ],
)
def test_a_plain_policy_is_a_column(name: str, column: str) -> None:
    state, reading = scene()
    assert torch.equal(scores(name, state, reading), getattr(state, column).float())


def test_tova_is_the_attention_of_this_tick() -> None:
    state, reading = scene()
    assert torch.equal(scores("tova", state, reading), reading.mass)


def test_keydiff_lets_the_most_ordinary_key_go() -> None:
    state, reading = scene()
    common = torch.randn(8, generator=torch.Generator().manual_seed(2))
    state.keys.copy_(common + 0.1 * state.keys)
    state.keys[:, :, 4] = common  # the very mean
    state.keys[:, :, 7] = -common  # the farthest from it
    told = scores("keydiff", state, reading)[:10]
    assert int(told.argmax()) == 7
    exact = torch.nn.functional.normalize(state.keys[:, :, :10].double(), dim=-1)
    mean = torch.nn.functional.normalize(exact.mean(2, keepdim=True), dim=-1)
    expected = -(exact * mean).sum(-1).mean((0, 1))
    torch.testing.assert_close(told.double(), expected, rtol=0, atol=1e-6)


def test_random_is_new_in_every_tick_and_the_same_in_every_run() -> None:
    state, reading = scene()
    first = scores("random", state, reading)
    assert torch.equal(first, scores("random", state, reading))
    assert len(set(first[:10].tolist())) == 10
    state.position[9] += 1  # a tick later, the newest row stands elsewhere
    later = scores("random", state, reading)
    assert not (later[:9] == first[:9]).any()


def test_novelty_keeps_the_most_novel_settled_rows_whatever_their_brightness() -> None:
    state, reading = scene()
    # Rows 8 and 9 stand within the newest five rows' positions: 24 and 27 of 27, the token that is
    # read standing at 28.
    state.novelty[:10] = torch.tensor([0.0, 5.0, 1.0, 6.0, 2.0, 4.0, 3.0, 0.5, 9.0, 9.0])
    kept = scores("novelty", state, reading) - state.brightness > 1000
    assert torch.nonzero(kept)[:, 0].tolist() == [1, 3, 5]  # 30% of a target of ten
    rest = ~kept & state.valid
    assert torch.equal(scores("novelty", state, reading)[rest], state.brightness[rest])


def test_a_row_is_settled_in_the_tick_in_which_nothing_protects_it_any_more() -> None:
    """One tick later, and nobody would keep it for that tick, however novel it is."""
    state, reading = scene()
    state.novelty[:10] = torch.tensor([0.0, 5.0, 1.0, 6.0, 2.0, 4.0, 3.0, 9.0, 9.0, 9.0])
    for position, kept in ((22, [1, 3, 7]), (23, [1, 3, 5])):  # the newest are 23 to 28
        state.position[7] = position
        told = scores("novelty", state, reading) - state.brightness > 1000
        assert torch.nonzero(told)[:, 0].tolist() == kept


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (1.0, 8)])
def test_novelty_for_nobody_or_for_everybody(share: float, kept: int) -> None:
    state, reading = scene()
    told = scores("novelty", state, reading, share)
    assert int((told - state.brightness > 1000).sum()) == kept  # of eight settled rows


def test_novelty_fades_with_the_ticks_since_birth_if_it_has_a_lifetime() -> None:
    """Whatever the positions say: they are renumbered, and rows of one tick are of one age."""
    state, reading = scene()
    state.novelty[:10] = torch.tensor([0.0, 5.0, 1.0, 6.0, 2.0, 4.0, 3.0, 0.5, 9.0, 9.0])
    state.born[:10] = torch.tensor([0, 40, 0, 0, 40, 40, 40, 0, 40, 40])
    state.born[10:] = 1000  # of nobody

    def kept(lifetime: float | None) -> list[int]:
        told = policy("novelty", FORGETTING, 0.3, lifetime)(state, look_of(state, reading))
        return torch.nonzero(told - state.brightness > 1000)[:, 0].tolist()

    assert kept(None) == kept(1e9) == [1, 3, 5]
    # Row 3 is older by 40 ticks, four lifetimes of a target of ten: 6 counts 6 / e^4, less than 3.
    assert kept(1.0) == [1, 5, 6]
    assert kept(10.0) == [1, 3, 5]  # 6 / e^0.4 = 4.02


def test_a_novelty_that_is_no_number_hides_no_other() -> None:
    state, reading = scene()
    state.novelty[:10] = torch.tensor([0.0, 5.0, 1.0, 6.0, 2.0, 4.0, 3.0, float("nan"), 9.0, 9.0])
    kept = scores("novelty", state, reading) - state.brightness > 1000
    assert torch.nonzero(kept)[:, 0].tolist() == [1, 3, 5]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(Refused, match=r"whim.*novelty"):
        policy("whim", FORGETTING, 0.5)
