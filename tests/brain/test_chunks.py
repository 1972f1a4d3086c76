"""A text that does not fit: read by chunks, with forgetting."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brain import Brain, Cull, Pin
from brain.errors import MemoryFull, NotFinite, Refused
from brain.mirror import Mirror
from compiled.score import cull_count
from compiled.state import ROW_COLUMNS
from fixture_types import OpenTiny
from toys import digest

IDS = [(7 * n * n + n) % 300 for n in range(400)]
POLICIES = (
    *("novelty", "brightness", "surprise", "sink_recent", "h2o", "tova", "keydiff", "random"),
)


def opened(open_tiny: OpenTiny, chunk: int = 8, **overrides: Any) -> Brain:
    return open_tiny(**{"cull.chunk": chunk, "engine": "eager", **overrides})


def assert_same(a: Mirror, b: Mirror) -> None:
    """Floats are sums of some tens of terms in another order."""
    for name in ("slot", *ROW_COLUMNS):
        one, two = getattr(a, name), getattr(b, name)
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            assert one.tolist() == two.tolist(), name


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_where_nothing_goes_a_chunk_is_its_ticks(engine: str, open_tiny: OpenTiny) -> None:
    chunked = opened(open_tiny, engine=engine, cull="none", capacity=96)
    single = opened(open_tiny, engine=engine, cull="none", capacity=96, chunk=1)
    for b in (chunked, single):
        b.prime(IDS[:10])
        b.patch([Pin([3])])
    ours, theirs = (b.feed(IDS[10:73], "tool") for b in (chunked, single))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert_same(chunked.mirror, single.mirror)
    assert len(chunked) == len(single) == 72
    assert chunked.ticks == single.ticks == 63
    for name, one, two in zip(chunked.cursor._fields, chunked.cursor, single.cursor, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, msg=name)
    assert chunked.tick(5).position == single.tick(5).position


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("engine", ["eager", "native"])
def test_as_many_rows_go_as_single_ticks_let_go(
    policy: str, engine: str, open_tiny: OpenTiny
) -> None:
    b = opened(open_tiny, cull=policy, engine=engine)
    b.prime(IDS[:30])
    b.patch([Pin([5, 12])])
    b.tick(IDS[30])
    expected, start = len(b), 31
    for part in b.feed_in_chunks(IDS[31:200]):
        before = b.ticks - len(part)
        for _ in part:
            expected += 1 - cull_count(expected, b.settings.culling)
        mirror = b.mirror
        positions = mirror.position.tolist()
        newest = int(b.cursor.position) - 1
        assert len(b) == len(mirror) == expected
        assert {0, 1, 2, 3, 5, 12} <= set(positions)  # sinks and pins
        recent = range(newest - b.settings.culling.recent + 1, newest + 1)
        own = range(newest - len(part) + 1, newest + 1)
        assert set(recent) | set(own) <= set(positions)
        born = dict(zip(positions, mirror.born.tolist(), strict=True))
        assert [born[p] for p in own] == list(range(before + 1, b.ticks + 1))
        tokens = dict(zip(positions, mirror.token_id.tolist(), strict=True))
        assert [tokens[p] for p in own] == IDS[own.start : own.stop]
        start += len(part)
        assert int(b.cursor.token) == IDS[start - 1]
    assert start == 200


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_a_long_prompt_is_a_short_one_and_the_rest_fed(engine: str, open_tiny: OpenTiny) -> None:
    whole, parts = (opened(open_tiny, engine=engine) for _ in range(2))
    whole.prime(IDS[:150])
    target = whole.settings.culling.target
    parts.prime(IDS[:target])
    parts.feed(IDS[target:150])
    assert digest(*whole.state, *whole.cursor) == digest(*parts.state, *parts.cursor)
    assert len(whole) == target
    assert whole.ticks == 150 - target
    assert whole.memory.account.uncommitted
    assert [t.token for t in whole.stream(9)] == [t.token for t in parts.stream(9)]


def test_what_fits_is_not_fed(open_tiny: OpenTiny) -> None:
    b = opened(open_tiny)
    b.prime(IDS[:48])
    assert (len(b), b.ticks) == (48, 0)


def test_it_is_refused_where_nothing_is_forgotten(open_tiny: OpenTiny) -> None:
    b = opened(open_tiny, cull="none")
    b.prime(IDS[:5])
    before = digest(*b.state, *b.cursor)
    with pytest.raises(Refused, match=r"49 tokens but .* 48 .*cull=novelty, or capacity=49"):
        b.prime(IDS[:49])
    with pytest.raises(MemoryFull, match="cull=none"):
        b.feed(IDS[:60])
    assert digest(*b.state, *b.cursor) == before


def test_edits_and_ticks_go_on_after_it(open_tiny: OpenTiny) -> None:
    b = opened(open_tiny)
    b.prime(IDS[:120])
    positions = b.mirror.position.tolist()
    b.patch([Cull([positions[6]]), Pin([positions[8]])])
    assert b.mirror.position.tolist() == [*positions[:6], *positions[7:]]
    assert b.tick().position == 120
    b.loop.settle()
    b.loop.index.update()
    assert b.loop.index.last() == b.mirror.position.tolist()[-1]


def test_a_chunk_ends_where_a_repair_is_due(open_tiny: OpenTiny) -> None:
    b = opened(open_tiny, repair="pairs", **{"repair.every": 5})
    b.prime(IDS[:24])
    made: list[int] = []
    b.loop.repairs.on_repair = lambda repair: made.append(repair.tick)
    sizes = [len(part) for part in b.feed_in_chunks(IDS[24:80])]
    assert max(sizes) == 4
    assert sum(sizes) == 56
    assert made
    assert {tick % 5 for tick in made} == {0}


def test_rows_are_renumbered_between_chunks(open_short: OpenTiny) -> None:
    """Even where positions are kept otherwise: a long text must not leave the trained range."""
    b = open_short(positions="keep", **{"cull.chunk": 8})
    trained = b.checkpoint.config.max_position_embeddings
    ids = [n % 300 for n in range(3 * trained)]
    with pytest.warns(UserWarning, match="rows are renumbered"):
        b.prime(ids)
    assert b.ticks == len(ids) - b.settings.culling.target
    assert int(b.mirror.position.max()) < trained
    assert b.mirror.token_id.tolist()[-1] == ids[-2]


def test_a_read_that_is_not_finite_changes_nothing(open_tiny: OpenTiny) -> None:
    b = opened(open_tiny)
    b.prime(IDS[:24])
    b.tick(IDS[24])
    held = b.state.keys.clone()
    b.state.keys[0, 0, 3] = float("inf")
    before = digest(*b.state, *b.cursor)
    with pytest.raises(NotFinite, match="ticks 2 to 9"):
        list(b.feed_in_chunks(IDS[25:60]))
    assert digest(*b.state, *b.cursor) == before
    b.state.keys.copy_(held)
    assert len(b.feed(IDS[25:60])) == 35


@settings(max_examples=20, deadline=None)
@given(
    chunk=st.integers(2, 12),
    policy=st.sampled_from(POLICIES),
    recent=st.integers(1, 12),
    pins=st.lists(st.integers(0, 20), max_size=6, unique=True),
    stops=st.lists(st.integers(0, 6), max_size=3),
    seed=st.integers(0, 99),
)
def test_it_is_resumed_wherever_it_stopped(
    chunk: int,
    policy: str,
    recent: int,
    pins: list[int],
    stops: list[int],
    seed: int,
    open_tiny: OpenTiny,
) -> None:
    """Stopped between chunks and asked again for the rest, it comes to the same bytes."""
    ids = random.Random(seed).choices(range(300), k=120)
    brains = [opened(open_tiny, chunk, cull=policy, **{"cull.recent": recent}) for _ in range(2)]
    for b in brains:
        b.prime(ids[:24])
        b.patch([Pin(pins)] if pins else [])
    whole, stopped = brains
    list(whole.feed_in_chunks(ids[24:]))
    left = ids[24:]
    for stop in stops:
        for number, part in enumerate(stopped.feed_in_chunks(left) if left else ()):
            left = left[len(part) :]
            if number == stop:
                break
    if left:
        list(stopped.feed_in_chunks(left))
    assert digest(*whole.state, *whole.cursor) == digest(*stopped.state, *stopped.cursor)
    assert whole.loop.index.positions == stopped.loop.index.positions


def test_chunks_compile_nothing(warm_brain: Brain) -> None:
    """Beside captured graphs they are called directly, and the ticks around them are replayed."""
    before = sum(graph.compilations for graph in warm_brain.graphs.captured.values())
    warm_brain.prime(IDS[:200])
    assert warm_brain.ticks == 200 - 24
    assert [tick.number for tick in warm_brain.stream(3)] == [177, 178, 179]
    assert sum(graph.compilations for graph in warm_brain.graphs.captured.values()) == before


def test_an_observer_changes_nothing(open_tiny: OpenTiny) -> None:
    """A run that is captured says what it would say otherwise; chunks are not shown."""
    seen: list[int] = []
    plain, watched = (opened(open_tiny) for _ in range(2))
    watched.observer = lambda step: seen.append(step.tick.number)
    for b in (plain, watched):
        b.prime(IDS[:120])
        b.tick()
    assert digest(*plain.state, *plain.cursor) == digest(*watched.state, *watched.cursor)
    assert seen == [1, 97]


def test_the_newest_rows_of_a_chunk_can_be_kept_for_novelty(open_tiny: OpenTiny) -> None:
    """What leaves the recent window inside a chunk may go with it: it must count as novel."""
    b = opened(open_tiny, 8, cull="novelty", **{"cull.novelty.share": 0.2})
    b.prime(IDS[:24])
    b.feed(IDS[24:40])
    novel = int(b.mirror.position[-2])  # leaves the window of 4 with the next chunk
    b.state.novelty[b.loop.index.slot_of(novel)] = 1e3
    b.state.brightness[b.loop.index.slot_of(novel)] = 0.0
    next(b.feed_in_chunks(IDS[40:60]))
    assert novel in b.mirror.position
