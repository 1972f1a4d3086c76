"""I11: the same seed gives the same tokens, also across a save at any tick."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import brain
from brain import Boost, Brain, Cull, Pin
from compiled.int8 import Int8
from compiled.state import State, addresses, allocate_state
from fixture_types import OpenTiny
from histories import IDS, everything, mixed_up, said
from toys import digest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]


def test_I11_same_seed_same_tokens(open_tiny: OpenTiny) -> None:
    first, again, other, high = (
        mixed_up(open_tiny(seed=seed)) for seed in (3, 3, 4, 3 + (1 << 32))
    )
    tokens = said(first, 40)
    assert said(again, 40) == tokens
    assert everything(first) == everything(again)
    assert said(other, 40) != tokens
    assert said(high, 40) != tokens


def test_I11_priming_again_starts_over(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:20])
    first = said(b, 30)
    assert any(culled for _, _, culled in first)
    b.prime(IDS[50:90])
    said(b, 7)
    b.prime(IDS[:20])
    assert said(b, 30) == first


@pytest.fixture(params=[False, True], ids=["fresh memory", "poisoned memory"])
def poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memories that are full of garbage, so that a restore has to write everything itself."""

    def poisoned_state(*arguments: Any) -> State:
        state = allocate_state(*arguments)
        state.keys.fill_(1e30)
        state.values.fill_(-1e30)
        for column in (state.token_id, state.position, state.born, state.source):
            column.fill_(7)
        for column in (state.brightness, state.surprise):
            column.fill_(1e30)
        state.pinned.fill_(True)
        return state

    if request.param:
        monkeypatch.setattr("brain.memory.allocate_state", poisoned_state)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(
    ticks=st.integers(0, 45),
    prompt=st.integers(1, 48),
    seed=st.integers(0, 2**64 - 1),
    cull=st.lists(st.integers(0, 30), max_size=8, unique=True),
)
def test_I11_a_loaded_brain_goes_on_with_the_same_token(
    open_tiny: OpenTiny,
    tmp_path_factory: pytest.TempPathFactory,
    ticks: int,
    prompt: int,
    seed: int,
    cull: list[int],
) -> None:
    b = open_tiny(seed=seed)
    b.prime(IDS[:prompt])
    for _ in range(ticks):
        b.tick()
    b.patch([Cull([p for p in b.mirror.position.tolist()[:-1] if p in cull])])
    if len(b) > 12:
        b.patch([Pin([int(b.mirror.position[8])]), Boost([int(b.mirror.position[9])], 5.0)])
    folder = tmp_path_factory.mktemp("save") / "brain"
    b.save(folder)
    loaded = brain.load(folder)
    for name in ("slot", "token_id", "position", "brightness", "surprise", "source", "born"):
        assert np.array_equal(getattr(loaded.mirror, name), getattr(b.mirror, name)), name
    assert np.array_equal(loaded.mirror.pinned, b.mirror.pinned)
    assert digest(*loaded.cursor) == digest(*b.cursor)
    assert len(loaded) == int(loaded.state.valid.sum()) == len(b)
    assert said(loaded, 30) == said(b, 30)
    assert digest(*(t[b.state.valid] for t in b.state[2:])) == digest(
        *(t[loaded.state.valid] for t in loaded.state[2:])
    )


@pytest.mark.usefixtures("poisoned")
def test_I11_a_captured_brain_loads_too(warm_brain: Brain, tmp_path: Path) -> None:
    b = mixed_up(warm_brain)
    said(b, 9)
    b.patch([Cull([int(b.mirror.position[4])])])
    b.save(tmp_path / "save")
    loaded = brain.load(tmp_path / "save")
    assert loaded.graphs.compiled
    assert said(loaded, 20) == said(b, 20)


def test_I11_saving_changes_nothing(open_tiny: OpenTiny, tmp_path: Path) -> None:
    b = mixed_up(open_tiny())
    before, where = everything(b), addresses(b.state)
    b.save(tmp_path / "save")
    b.save(tmp_path / "save")  # and replaces what it saved before
    assert everything(b) == before
    assert addresses(b.state) == where


def test_I11_a_saved_brain_rebases_at_the_same_tick(open_short: OpenTiny, tmp_path: Path) -> None:
    b = open_short()
    b.prime([29 * index + 7 for index in range(10)])
    list(b.stream(45))
    b.save(tmp_path / "save")
    told = [(t.token, t.position, t.rebased) for t in b.stream(30)]
    assert any(rebased for _, _, rebased in told)
    again = brain.load(tmp_path / "save")
    assert [(t.token, t.position, t.rebased) for t in again.stream(30)] == told


def test_I11_a_save_in_eight_bits_goes_on_with_the_same_tokens(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    b = open_tiny(weights="int8", dtype="bfloat16", seed=5)
    b.prime([7 * token for token in range(20)])
    for _ in range(3):
        b.tick()
    b.save(tmp_path / "save")
    expected = [b.tick().token for _ in range(8)]
    again = brain.load(tmp_path / "save")
    assert isinstance(again.checkpoint.weights.qkv, Int8)
    assert [again.tick().token for _ in range(8)] == expected
