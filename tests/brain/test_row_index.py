"""The index of rows is what the mirror says, and follows every patch without another look at it."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brain import Append, Boost, Brain, Cull, Pin, Redact, Refused, Replace
from brain.actions import Action
from brain.errors import NotFinite
from brain.row_index import RowIndex
from captured_graphs import Watched
from compiled.score import echo
from fixture_types import OpenTiny
from histories import IDS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever an index looks at the mirror."""
    seen: list[int] = []
    look = RowIndex._look

    def counted(index: RowIndex) -> None:
        seen.append(1)
        look(index)

    monkeypatch.setattr(RowIndex, "_look", counted)
    return seen


def agrees(b: Brain) -> bool:
    """Whether the index is that of the mirror."""
    b.loop.settle()
    index, mirror = b.loop.index, b.mirror
    index.update()
    positions = mirror.position.tolist()
    free = torch.nonzero(~b.state.valid)[:, 0].tolist()
    return (
        index.positions == positions
        and [index.slot_of(position) for position in positions] == mirror.slot.tolist()
        and index.pinned == set(mirror.position[mirror.pinned].tolist())
        and index.lowest_free(len(free)) == free
    )


def some_edit(b: Brain, draw: random.Random) -> list[Any]:
    """One row or two of what is remembered."""
    positions = b.mirror.position.tolist()
    at = draw.randrange(len(positions) - 1)
    return draw.choice(
        [
            [Cull([positions[at]])],
            [Redact([positions[at]])],
            [Pin([positions[at]], pinned=draw.random() < 0.3)],
            [Boost([positions[at]], 2.0)],
            [Replace(positions[at : at + 2], [draw.randrange(300)])],
            [Append([5, 6]), Cull([positions[at]])],
        ]
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"cull.at_once": True}, {"repair.every": 3, "repair.least_gain": -9.0}],
    ids=str,
)
def test_it_follows_ticks_and_edits(
    options: dict[str, Any], open_tiny: OpenTiny, looks: list[int]
) -> None:
    b, draw = open_tiny(**options), random.Random(1)
    b.prime(IDS[:22])
    assert agrees(b)
    for _ in range(40):
        for _ in range(draw.randrange(12)):  # more than may wait
            b.tick()
        if len(b) > 6 and draw.random() < 0.6:
            with contextlib.suppress(Refused):  # more pins than may be
                b.patch(some_edit(b, draw))
        assert agrees(b)
    assert len(looks) == 1


def test_it_follows_passes_of_several_tokens(open_parrot: OpenTiny, looks: list[int]) -> None:
    options = {"lookup": "ngram", "lookup.width": 3, "lookup.window": 8, "sampler": "greedy"}
    b = open_parrot(capacity=160, **{"cull": "none", "cull.target": None}, **options)
    b.prime([12, 13, 14, 10, 11, 7, 70, 170, 34, 9, 12, 13, 14])
    b.patch([Cull([3])])
    for _ in range(12):
        b.speak()
        assert agrees(b)
    assert b.lookahead.counts.accepted > 3
    assert not looks  # a prompt of one patch begins an index


def rebased(b: Brain) -> None:
    b.memory.rebase()


def primed(b: Brain) -> None:
    b.prime(IDS[50:61])


def primed_at_length(b: Brain) -> None:
    b.prime(IDS[50:80])


def put_back(b: Brain) -> None:
    snapshot = b.snapshot()
    b.tick()
    b.patch([Cull([3])])
    b.resume(snapshot)


def text_begun_anew(b: Brain) -> None:
    b.tick()
    b.resume_text(b"")


def refused(b: Brain) -> None:
    with pytest.raises(Refused):
        b.patch([Cull([5]), Append([7]), Cull([5])])


def failed(b: Brain) -> None:
    keep, b.graphs.uncaptured.patch = b.graphs.uncaptured.patch, fail  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        b.patch([Cull([5]), Append([7, 8])])
    b.graphs.uncaptured.patch = keep  # type: ignore[method-assign]


def fail(plan: object) -> None:
    raise MemoryError


def appended_at_length(b: Brain) -> None:
    b.patch([Append(IDS[:19])])


def taken_back_at_length(b: Brain) -> None:
    patch, calls = b.graphs.uncaptured.patch, [0]

    def second(plan: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        patch(plan)

    b.graphs.uncaptured.patch = second  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        b.patch([Append(IDS[:19])])
    b.graphs.uncaptured.patch = patch  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        *(rebased, primed, primed_at_length, put_back, text_begun_anew),
        *(refused, failed, appended_at_length, taken_back_at_length),
    ],
)
def test_it_is_right_after_anything_unusual(
    change: Callable[[Brain], None], open_tiny: OpenTiny
) -> None:
    b = open_tiny(**{"engine.chunk": 16})
    b.prime(IDS[:20])
    b.patch([Cull([4]), Pin([6])])
    b.tick()
    b.tick()
    change(b)
    b.tick()
    assert agrees(b)
    b.patch([Cull(b.mirror.position[2:4].tolist()), Append([9])])
    assert agrees(b)


def test_ticks_that_have_not_happened_are_not_followed(
    open_tiny: OpenTiny, looks: list[int]
) -> None:
    b = open_tiny()
    b.prime(IDS[:26])
    b.patch([Cull([4])])
    b.tick()
    slot = int(b.mirror.slot[-1])  # of a row that no tick forgets yet
    held = b.state.values[0, 0, slot, 0].clone()
    b.state.values[0, 0, slot, 0] = float("nan")
    voids = [b.tick(), b.tick()]
    with pytest.raises(NotFinite):
        _ = voids[1].token
    b.state.values[0, 0, slot, 0] = held
    b.tick()
    assert agrees(b)
    assert len(looks) == 1


def test_a_long_life_does_not_make_it_longer(
    open_tiny: OpenTiny, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brain.row_index.FEW", 0)
    b = open_tiny()
    b.prime(IDS[:26])
    b.patch([Cull([4]), Pin([2])])
    for _ in range(260):
        b.tick()
    assert agrees(b)
    assert len(b.loop.index._position) <= 2 * b.capacity
    assert len(looks) == 1


@given(st.lists(st.integers(0, 60), min_size=1, unique=True).map(sorted), st.data())
def test_neighbours_and_order(
    eager_brain: Brain, positions: list[int], data: st.DataObject
) -> None:
    index = RowIndex(eager_brain.memory)
    positions = positions[: eager_brain.capacity]
    index.put(positions)
    gone = data.draw(st.sets(st.sampled_from(positions)))
    index.forget(gone)
    kept = [position for position in positions if position not in gone]
    assert index.positions == kept
    assert index.last() == (kept[-1] if kept else None)
    for position in range(62):
        before = [other for other in kept if other < position]
        assert index.before(position) == (before[-1] if before else None)
        since = [index.slot_of(other) for other in kept if other >= position]
        assert index.slots_since(position).tolist() == since
        if position not in kept:
            with pytest.raises(Refused, match=f"no row is remembered at position {position}"):
                index.slot_of(position)
    for first in range(len(kept)):
        for last in range(first + 1, len(kept) + 1):
            assert index.are_neighbours(kept[first:last])
    if len(kept) > 2:
        assert not index.are_neighbours([kept[0], kept[2]])


@pytest.mark.parametrize("act", [Cull([3]), Redact([3]), Pin([3]), Boost([3], 2.0)], ids=str)
def test_an_edit_makes_nothing_as_long_as_the_capacity(act: Action, open_tiny: OpenTiny) -> None:
    """Cull, redact, pin and boost cost the rows that they name."""
    seen = []
    for capacity in (1000, 3000):
        b = open_tiny(capacity=capacity, **{"cull.target": 900})
        b.prime(IDS[:12])
        b.patch([Boost([1], 1.0)])  # the first edit looks at the mirror
        with Watched() as edit:
            b.patch([act])
        assert edit.largest < 1000
        seen.append((edit.names, edit.largest))
    assert seen[0] == seen[1]
    with Watched() as look:  # the check can fail
        _ = b.mirror
        b.tick()
    assert look.largest >= 3000


def test_an_append_makes_nothing_as_long_as_the_capacity_but_its_read(
    open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = open_tiny(capacity=70_000, **{"cull.target": 900})
    b.prime(IDS[:12])
    b.patch([Boost([1], 1.0)])
    watched = Watched()
    patch = b.graphs.uncaptured.patch

    def within(plan: Any) -> None:
        with watched:
            patch(plan)

    monkeypatch.setattr(b.graphs.uncaptured, "patch", within)
    b.patch([Append([7, 8]), Replace([4, 5], [9])])
    assert "index_copy_" in watched.names
    assert watched.largest < 70_000


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_an_append_adds_to_the_novelty_of_all_that_it_reaches(
    engine: str, request: pytest.FixtureRequest
) -> None:
    """As ``echo`` over every row would."""
    b: Brain = request.getfixturevalue("warm_brain" if engine == "compiled" else "eager_brain")
    b.prime(IDS[:20])
    b.patch([Cull([4])])
    eviction = b.graphs.spec.eviction
    before = b.state._replace(novelty=b.state.novelty.clone(), valid=b.state.valid.clone())
    position = b.state.position.clone()
    b.patch([Append([7])])
    strength = eviction.novelty.own_share * b.mirror.surprise[-1]
    told = echo(
        before._replace(position=position),
        torch.tensor(20),
        torch.tensor(strength),
        eviction.novelty,
    )
    held = before.valid
    torch.testing.assert_close(b.state.novelty[held], told[held], rtol=1e-6, atol=0)
    assert (b.state.novelty[held] > before.novelty[held]).sum() == 19
