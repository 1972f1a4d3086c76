"""Repair: found by reading alone, committed by the one patch, and only where it helps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from brain import Brain, Refused
from brain.mirror import SOURCES
from brain.repair import best_repair, dimmest_pair
from conf.schema import RepairConf
from fixture_types import OpenTiny
from processes import call
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [(41 * index + 3) % 300 for index in range(60)]
ALWAYS = {"repair": "pairs", "repair.every": 1, "repair.least_gain": -100.0}


def pair_of(scores: list[float], may_go: list[bool]) -> int | None:
    return dimmest_pair(np.array(scores, float), np.array(may_go, bool))


def test_the_dimmest_pair_has_neighbours_and_may_go() -> None:
    yes = [True] * 7
    assert pair_of([0, 0, 5, 1, 2, 0, 0], yes) == 4  # not (0, 1) or (5, 6): nothing beside them
    assert pair_of([9, 4, 4, 4, 4, 9, 9], yes) == 1  # the earliest of equals
    assert pair_of([9, 1, 1, 9, 9, 3, 9], [True, True, False, True, True, True, True]) == 4
    assert pair_of([1, 2, 3], [True] * 3) is None
    assert pair_of([1, 2, 3, 4, 5], [True, True, False, True, True]) is None
    assert pair_of([], []) is None


@pytest.fixture
def full(open_tiny: OpenTiny) -> Brain:
    """A brain whose memory is full, about to make its 31st tick."""
    b = open_tiny(**{"cull.target": 24})
    b.prime(IDS[:10])
    b.feed(IDS[10:40])
    assert len(b) == 24
    return b


def following(b: Brain, token: int, position: int) -> torch.Tensor:
    return torch.log_softmax(b.read([token], [position]).logits[0], -1)


def test_the_gain_is_what_its_formula_says(full: Brain) -> None:
    """Against reads made by hand; every candidate is tried, and the memory stays as it is."""
    b, mirror, first = full, full.mirror, 8
    before = digest(*b.state, *b.cursor)
    asked: list[tuple[int, int]] = []

    def ask(token: int, position: int) -> torch.Tensor:
        asked.append((token, position))
        return following(b, token, position)

    settings = RepairConf(every=1, candidates=3, least_gain=-1000.0)
    repair = best_repair(mirror, first, 31, settings, ask)
    assert digest(*b.state, *b.cursor) == before
    assert repair is not None
    tokens, positions = mirror.token_id.tolist(), mirror.position.tolist()
    assert repair.positions == (positions[8], positions[9])
    assert repair.removed == (tokens[8], tokens[9])
    assert repair.tick == 31
    foretold = following(b, tokens[7], positions[7])
    own = torch.topk(foretold, 3).indices.tolist()
    tried = set(own) | {tokens[8], tokens[9]}
    gains = {
        token: float(following(b, token, positions[8])[tokens[10]] - foretold[tokens[10]])
        for token in tried
    }
    assert {token for token, position in asked[1:]} == tried
    assert {position for _, position in asked[1:]} == {positions[8]}
    assert repair.gain == pytest.approx(max(gains.values()), abs=1e-5)
    assert gains[repair.token] == pytest.approx(repair.gain, abs=1e-5)
    assert (
        best_repair(mirror, first, 31, RepairConf(1, 3, repair.gain + 1e-3), ask) is None
    )  # not worth it


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_repaired_tick_replaces_two_rows_by_one(engine: str, open_tiny: OpenTiny) -> None:
    b = open_tiny(engine=engine, **{"cull.target": 24}, **ALWAYS)
    b.prime(IDS[:10])
    b.feed(IDS[10:34])
    assert len(b) == 24
    for _ in range(5):
        before = b.mirror
        tick = b.tick()
        (repair,) = tick.repairs
        assert tick.repaired == (repair.positions,)
        assert repair.tick == tick.number
        after = b.mirror
        index = after.index_of(repair.positions[0])
        assert after.token_id[index] == repair.token
        assert SOURCES[after.source[index]] == "repair"
        assert repair.positions[1] not in after.position
        old = before.index_of(repair.positions[0])
        assert before.position[old : old + 2].tolist() == list(repair.positions)
        assert before.token_id[old : old + 2].tolist() == list(repair.removed)
        assert tick.culled == ()  # the repair freed the slot
        assert len(b) == 24 == tick.count
    if engine == "compiled":
        assert all(capture.compilations == 1 for capture in b.graphs.captured.values())


def test_nothing_is_repaired_before_anything_is_forgotten(open_tiny: OpenTiny) -> None:
    b = open_tiny(**{"cull.target": 24}, **ALWAYS)
    b.prime(IDS[:10])
    assert not any(tick.repairs for tick in b.stream(10))


def test_a_repair_that_does_not_gain_enough_is_not_made(open_tiny: OpenTiny) -> None:
    plain = open_tiny(**{"cull.target": 24})
    strict = open_tiny(**{"cull.target": 24, **ALWAYS, "repair.least_gain": 1000.0})
    for b in (plain, strict):
        b.prime(IDS[:10])
        b.feed(IDS[10:40])
    assert digest(*plain.state, *plain.cursor) == digest(*strict.state, *strict.cursor)


def test_repairs_come_every_so_many_ticks(open_tiny: OpenTiny) -> None:
    b = open_tiny(**{"cull.target": 24, **ALWAYS, "repair.every": 4})
    b.prime(IDS[:30])
    made = [tick.number for tick in b.stream(20) if tick.repairs]
    assert made == [4, 8, 12, 16, 20]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("every", -1), ("candidates", 0), ("least_gain", float("nan"))],
)
def test_settings_that_make_no_sense_are_refused(
    setting: str, value: float, open_tiny: OpenTiny
) -> None:
    with pytest.raises(Refused, match=f"repair.{setting}"):
        open_tiny(**{f"repair.{setting}": value})


def test_a_run_records_its_repairs(tiny_folder: Path, tmp_path: Path) -> None:
    call(
        tmp_path,
        tiny_folder,
        "prompt=Hello there",
        "ticks=30",
        "capacity=16",
        "repair=pairs",
        "repair.every=3",
        "repair.least_gain=-100",
        "hydra.run.dir=out",
    )
    lines = (tmp_path / "out" / "repairs.jsonl").read_text().splitlines()
    assert lines
    for line in map(json.loads, lines):
        assert line["tick"] % 3 == 0
        assert set(line) == {"tick", "positions", "removed", "token", "gain"}
