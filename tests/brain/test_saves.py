"""Saves: found whole or refused in one line; loadable into a memory of another size."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import brain
from brain.actions import Pin
from brain.brain import Brain
from brain.errors import Refused
from brain.saves import sealed
from fixture_types import OpenTiny
from toys import digest

IDS = [int(n) for n in torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(3))]
TENSORS, DESCRIPTION = "state.safetensors", "brain.json"


@pytest.fixture
def saved(open_tiny: OpenTiny, tmp_path: Path) -> tuple[Brain, Path]:
    b = open_tiny(capacity=64)
    b.prime(IDS[:30])
    list(b.stream(12))
    b.save(tmp_path / "save")
    return b, tmp_path / "save"


@pytest.mark.parametrize("capacity", [24, 25, 48, 200])
def test_another_capacity_goes_on_with_the_same_tokens(
    capacity: int, saved: tuple[Brain, Path]
) -> None:
    b, folder = saved
    assert len(b) == 24
    loaded = brain.load(folder, capacity=capacity)
    assert loaded.capacity == capacity
    assert loaded.mirror.token_id.tolist() == b.mirror.token_id.tolist()
    # Sums over other slots round otherwise, which changes no token here.
    assert [t.token for t in loaded.stream(20)] == [t.token for t in b.stream(20)]


def test_a_memory_too_small_is_refused(saved: tuple[Brain, Path], open_tiny: OpenTiny) -> None:
    b, folder = saved
    b.feed(IDS[:3])
    with pytest.raises(Refused, match=r"24 rows but capacity is 20|target"):
        brain.load(folder, capacity=20)


def test_more_pins_than_a_smaller_memory_may_have_are_refused(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    """Nothing would be left that a tick may forget: it would write over a pinned row."""
    b = open_tiny(capacity=64, **{"cull.target": None, "cull.recent": 4})
    b.prime(IDS)
    assert b.most_pinned == 64 - 4 - 4 - 2  # sinks, the newest, the most in a tick
    b.patch([Pin(range(5, 36))])
    b.save(tmp_path / "save")
    smaller = brain.load(tmp_path / "save", capacity=44)
    assert smaller.most_pinned == 34
    list(smaller.stream(20))
    assert smaller.mirror.pinned.sum() == 31
    assert set(range(4)) < set(smaller.mirror.position.tolist())
    with pytest.raises(Refused, match=r"31 pinned rows, but of 40 no more than 30 may be"):
        brain.load(tmp_path / "save", capacity=40)


def test_every_damaged_byte_is_found(saved: tuple[Brain, Path]) -> None:
    _, folder = saved
    content = (folder / TENSORS).read_bytes()
    for place in range(0, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (folder / TENSORS).write_bytes(damaged)
        with pytest.raises(Refused, match="damaged"):
            brain.load(folder)
    (folder / TENSORS).write_bytes(content[:-1])
    with pytest.raises(Refused, match="damaged"):
        brain.load(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(Refused, match="cannot be read"):
        brain.load(folder)


def test_a_description_that_was_altered_is_refused(saved: tuple[Brain, Path]) -> None:
    _, folder = saved
    described = json.loads((folder / DESCRIPTION).read_text("utf-8"))
    for key in described:
        altered = {**described, key: "something else"}
        (folder / DESCRIPTION).write_text(json.dumps(altered), "utf-8")
        with pytest.raises(Refused):
            brain.load(folder)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_description_is_loaded_or_refused(
    data: st.DataObject, saved: tuple[Brain, Path], tmp_path: Path
) -> None:
    _, folder = saved
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    described: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text("utf-8"))
    key = data.draw(st.sampled_from(sorted(described.keys() - {"seal"})))
    if key == "conf" and data.draw(st.booleans()):
        described[key][data.draw(st.sampled_from(sorted(described[key])))] = data.draw(ANYTHING)
    else:
        described[key] = data.draw(ANYTHING)
    (copy / DESCRIPTION).write_text(json.dumps(sealed(described)), "utf-8")
    with contextlib.suppress(Refused), contextlib.chdir(tmp_path):  # any cache_dir is made
        brain.load(copy)
        assert key in ("torch", "notes", "unfinished", "high_water", "conf", "vocabulary_sha256")


def test_a_character_goes_on_where_it_stopped(open_tiny: OpenTiny, tmp_path: Path) -> None:
    b = open_tiny()
    b.prime(IDS[:20])
    one, *rest = b.encode("é")
    assert len(rest) > 0
    text = [b.tick(one).text]
    b.save(tmp_path / "save")
    assert b.unfinished == "é".encode()[:1]
    loaded = brain.load(tmp_path / "save")
    text += [loaded.tick(token).text for token in rest]
    assert "".join(text) == "é"


def test_a_tick_that_is_told_its_token_is_the_tick_that_drew_it(
    open_: Callable[[], Brain],
) -> None:
    first, second = open_(), open_()
    for b in (first, second):
        b.prime(IDS[:20])
    for _ in range(30):
        drawn = first.tick()
        told = second.tick(drawn.token)
        assert (told.token, told.surprise, told.culled) == (
            drawn.token,
            drawn.surprise,
            drawn.culled,
        )
    assert digest(*first.state, *first.cursor) == digest(*second.state, *second.cursor)
    with pytest.raises(Refused, match="tick"):
        first.tick(10**9)


@pytest.fixture
def open_(open_tiny: OpenTiny) -> Callable[[], Brain]:
    return lambda: open_tiny(seed=9)


def test_nothing_is_left_beside_a_save(saved: tuple[Brain, Path]) -> None:
    b, folder = saved
    b.save(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION, TENSORS]
