"""Step captures tell what happened, and cost nothing when off."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from brain.record.captures import TOP_IN_JSON, CaptureWriter
from brain.tick import Step
from fixture_types import OpenTiny


def test_captures_hold_what_every_step_received_and_returned(
    tmp_path: Path, open_tiny: OpenTiny
) -> None:
    b = open_tiny(capacity=32, **{"cull.target": 16})
    b.prime(list(range(1, 17)))
    b.observer = CaptureWriter(tmp_path, b, top=0)
    for _ in range(3):
        held, reading = b.mirror, b.read()
        number, position = b.ticks + 1, int(b.cursor.position[0])
        tick = b.tick()
        tensors = load_file(tmp_path / f"tick_{number:06d}.safetensors")
        told = json.loads((tmp_path / f"tick_{number:06d}.json").read_text("utf-8"))

        assert int(tensors["read.in.position"][0]) == position
        assert torch.equal(tensors["read.out.logits"], reading.logits[0])
        assert torch.equal(tensors["read.out.mass"], reading.mass)
        valid = tensors["read.in.mirror.valid"]
        assert sorted(tensors["read.in.mirror.position"][valid].tolist()) == held.position.tolist()
        assert (
            int(tensors["choose.out.token"][0]) == tick.token == told["2 score, 3 decide"]["token"]
        )
        candidates = tensors["choose.out.candidates"].tolist()
        assert tick.token in candidates
        assert float(tensors["choose.out.probabilities"].sum()) == pytest.approx(1.0, abs=1e-6)
        culled = tensors["read.in.mirror.position"][tensors["patch.in.cull"]].tolist()
        assert tuple(culled) == tick.culled == tuple(told["4 patch"]["culled"])
        assert told["4 patch"]["rows_afterwards"] == len(b)
        likeliest = told["1 read"]["returned"]["likeliest"][0]
        assert likeliest["token"] == int(reading.logits[0].argmax())
        assert likeliest["probability"] == pytest.approx(
            float(torch.softmax(reading.logits[0], 0).max()), rel=1e-5
        )


def test_top_entries_are_enough_for_probabilities(tmp_path: Path, open_tiny: OpenTiny) -> None:
    b = open_tiny(capacity=32)
    b.prime([3, 1, 4, 1, 5])
    full = b.read().logits[0]
    b.observer = CaptureWriter(tmp_path, b, top=7)
    b.tick()
    tensors = load_file(tmp_path / "tick_000001.safetensors")
    assert tensors["read.out.logits"].shape == (7,)
    told = torch.exp(tensors["read.out.logits"] - tensors["read.out.logsumexp"])
    assert torch.allclose(told, torch.softmax(full, 0)[tensors["read.out.logits_ids"]], rtol=1e-5)


@pytest.mark.parametrize("top", [0, 7, 40])
def test_the_tables_hold_as_many_rows_as_logits_are_kept(
    tmp_path: Path, open_tiny: OpenTiny, top: int
) -> None:
    b = open_tiny()
    b.prime(list(range(1, 46)))
    b.observer = CaptureWriter(tmp_path, b, top)
    b.tick()
    told = json.loads((tmp_path / "tick_000001.json").read_text("utf-8"))["1 read"]["returned"]
    for table, share in (("likeliest", "probability"), ("most_attended", "mass")):
        shares = [row[share] for row in told[table]]
        assert len(shares) == max(TOP_IN_JSON, top)
        assert shares == sorted(shares, reverse=True)


def test_capturing_changes_no_token(tmp_path: Path, open_tiny: OpenTiny) -> None:
    plain, watched = open_tiny(capacity=24), open_tiny(capacity=24)
    watched.observer = CaptureWriter(tmp_path, watched, top=5)
    for b in (plain, watched):
        b.prime([7, 8, 9])
    assert [t.token for t in plain.stream(30)] == [t.token for t in watched.stream(30)]


def test_an_observer_that_fails_leaves_the_tick_undone(open_tiny: OpenTiny) -> None:
    b = open_tiny(capacity=24)
    b.prime([7, 8, 9])
    expected = open_tiny(capacity=24)
    expected.prime([7, 8, 9])

    def fail(step: Step) -> None:
        raise OSError("disk full")

    b.observer = fail
    with pytest.raises(OSError, match="disk full"):
        b.tick()
    assert (len(b), b.ticks) == (3, 0)
    b.observer = None
    ticks = [(t.token, t.text) for t in b.stream(5)]
    assert ticks == [(t.token, t.text) for t in expected.stream(5)]
