"""positions=rebase: a loop that never leaves the range its model was trained on."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch

import brain
from brain import Append, Boost, Cull, Pin, Redact, Refused, Replace
from fixture_types import OpenTiny
from toy_models import TRAINED
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [(29 * index + 7) % 300 for index in range(100)]


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_no_position_ever_leaves_the_trained_range(engine: str, open_short: OpenTiny) -> None:
    b = open_short(engine=engine)
    before = digest(*b.state, *b.cursor)
    for _ in b.warm_up():
        pass
    assert before == digest(*b.state, *b.cursor)
    b.prime(IDS[:10])
    rebased = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tick in b.stream(300):
            ids = b.mirror.token_id.tolist()
            assert 0 < tick.position <= TRAINED
            assert int(b.cursor.position) == b.memory.account.position < TRAINED + 1
            assert b.mirror.position.max() < TRAINED
            if tick.rebased:
                rebased += 1
                # Dense, and the tick's own row behind them.
                assert b.mirror.position.tolist() == sorted(
                    set(range(tick.position)) - set(tick.culled)
                )
            assert len(ids) == len(b)
    assert rebased >= 300 // TRAINED
    assert len(b) == 20
    if engine == "compiled":
        assert "rebase" in b.graphs.captured
        assert all(capture.compilations == 1 for capture in b.graphs.captured.values())
        assert tuple(b.graphs.captured) == b.graphs.expected()


def test_warming_up_renumbers_nothing(open_short: OpenTiny) -> None:
    b = open_short(engine="compiled")
    b.prime(IDS[:10])
    b.patch([Cull([3, 4])])
    before = digest(*b.state, *b.cursor)
    assert "rebase" in list(b.warm_up())
    assert digest(*b.state, *b.cursor) == before


def test_the_text_stays_the_same_rows_in_the_same_order(open_short: OpenTiny) -> None:
    b = open_short()
    b.prime(IDS[:10])
    while b.memory.account.position + 1 < TRAINED:
        b.tick()
    before = b.mirror
    b.memory.rebase()
    after = b.mirror
    assert after.position.tolist() == list(range(len(before)))
    for name in ("token_id", "slot", "brightness", "surprise", "novelty", "source", "born", "lit"):
        assert getattr(after, name).tolist() == getattr(before, name).tolist(), name


def test_a_rebased_memory_reads_as_if_it_had_been_written_there(open_short: OpenTiny) -> None:
    """Dense rows that moved as one: relative positions are the same, so are the logits."""
    b = open_short(**{"cull": "none"})
    b.prime(IDS[:12])
    b.patch([Cull(list(range(6)))])
    told = b.read().logits
    b.memory.rebase()
    assert b.mirror.position.tolist() == list(range(6))
    torch.testing.assert_close(b.read().logits, told, rtol=1e-4, atol=1e-4)


def test_positions_of_a_batch_mean_those_before_it_even_if_it_rebases(
    open_short: OpenTiny,
) -> None:
    b = open_short()
    b.prime(IDS[:10])
    while b.memory.account.position + 1 < TRAINED:
        b.tick()
    rows = list(zip(b.mirror.position.tolist(), b.mirror.token_id.tolist(), strict=True))
    gone, erased, first, second, pinned = (rows[index] for index in (5, 8, 10, 11, 14))
    bright, before = rows[13], float(b.mirror.brightness[13])
    b.patch(
        [
            Cull([gone[0]]),
            Redact([erased[0]]),
            Replace([first[0], second[0]], [299]),
            Pin([pinned[0]]),
            Boost([bright[0]], 100.0),
            Append([1, 2], source="tool"),
        ]
    )
    mirror = b.mirror
    expected = [token for _, token in rows]
    expected[10] = 299
    expected = [t for index, t in enumerate(expected) if index not in (5, 8, 11)]
    assert mirror.token_id.tolist()[: len(expected)] == expected
    assert mirror.token_id.tolist()[-2:] == [1, 2]
    assert mirror.position.max() < TRAINED
    held = {int(p): int(t) for p, t in zip(mirror.position, mirror.token_id, strict=True)}
    assert [held[int(p)] for p in mirror.position[mirror.pinned]] == [pinned[1]]
    assert mirror.token_id[10] == bright[1]  # three rows before it are gone
    assert float(mirror.brightness[10]) == pytest.approx(min(before + 100, 255))


def test_a_batch_that_fails_after_it_rebased_says_so(
    open_short: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What positions meant before the batch is gone: the same call would mean other rows."""
    b = open_short()
    b.prime(IDS[:10])
    while b.memory.account.position + 1 < TRAINED:
        b.tick()
    tokens = b.mirror.token_id.tolist()

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("brain.edits.edit", fail)
    with pytest.raises(MemoryError) as failed:
        b.patch([Append([1, 2])])
    assert failed.value.__notes__ == [
        "positions have been renumbered before that: look at the mirror"
    ]
    assert b.mirror.token_id.tolist() == tokens
    with pytest.raises(MemoryError) as failed:
        b.patch([Append([1, 2])])  # they are dense now
    assert not hasattr(failed.value, "__notes__")


def test_a_refused_batch_rebases_nothing(open_short: OpenTiny) -> None:
    b = open_short()
    b.prime(IDS[:10])
    while b.memory.account.position + 1 < TRAINED:
        b.tick()
    before = digest(*b.state, *b.cursor)
    with pytest.raises(Refused):
        b.patch([Append(IDS[:5]), Cull([TRAINED + 5])])
    assert digest(*b.state, *b.cursor) == before


def test_a_capacity_that_cannot_be_rebased_into_the_range_is_refused(
    open_short: OpenTiny,
) -> None:
    with pytest.raises(Refused, match=r"positions=rebase needs capacity=45 or less"):
        open_short(capacity=TRAINED)


def test_without_rebasing_the_trained_range_is_warned_about(open_short: OpenTiny) -> None:
    b = open_short(positions="keep", **{"cull.chunk": 1})
    b.prime(IDS[:10])
    with pytest.warns(brain.BrainWarning, match="positions=rebase"):
        b.feed(IDS[:70])
    assert b.memory.account.position == 79


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_brain_is_freed_with_its_last_name(engine: str, open_tiny: OpenTiny) -> None:
    """Weights and cache may be most of a device: they do not wait for the garbage collector."""
    b = open_tiny(engine=engine)
    b.prime([5, 6, 7])
    held: list[weakref.ref[Any]] = [weakref.ref(one) for one in (b.memory, b.graphs, b.loop)]
    gc.disable()
    try:
        del b
        assert [one() for one in held] == [None, None, None]
    finally:
        gc.enable()
