"""Step captures tell what happened, and cost nothing when off."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from brain.record.captures import TOP_IN_JSON, CaptureWriter
from brain.tick import Step
from fixture_types import CommandLine, OpenTiny


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


# Shown by task=inspect ----------------------------------------------------------------------------

Call = Callable[..., str]


@pytest.fixture
def call(tiny_folder: Path, command_line: CommandLine) -> Call:
    """``call(*arguments)`` on the tiny model → its standard output or, if it is refused, its last
    line on standard error.
    """
    model = ["model=folder", f"model.path={tiny_folder}", "capacity=64", "prompt=abc"]

    def call_(*arguments: str) -> str:
        status, out, err = command_line(*model, *arguments)
        assert status in (0, 2)
        return err.splitlines()[-1] if status else out

    return call_


SHOW = ("task=inspect", "task.path=run", "hydra.run.dir=seen")
RUN = ("hydra.run.dir=run", "ticks=3")


def test_captures_are_in_the_order_of_their_ticks(tmp_path: Path, call: Call) -> None:
    call(*RUN, "capture=true")
    for old, new in (("000002", "999999"), ("000003", "1000000")):
        for path in sorted((tmp_path / "run" / "captures").glob(f"tick_{old}.*")):
            path.rename(path.with_name(f"tick_{new}{path.suffix}"))
    assert call(*SHOW).startswith("tick 3\n")  # in the file of the millionth
    assert call(*SHOW, "task.tick=1").startswith("tick 1\n")
    assert call(*SHOW, "task.tick=2") == (
        "refused: task.tick=2 was not captured: run has 3 captures, of ticks 1 to 1000000"
    )


def test_what_is_newer_is_shown(tmp_path: Path, call: Call) -> None:
    call(*RUN, "capture=true")
    assert call(*SHOW).startswith("tick 3\n")
    call(*RUN, "ticks=5")
    assert "what run remembers at its end" in call(*SHOW)
    assert call(*SHOW, "task.tick=3").startswith("tick 3\n")
    assert call(*SHOW, "task.path=run/captures").startswith("tick 3\n")
    call(*RUN, "ticks=6", "capture=true")
    assert call(*SHOW).startswith("tick 6\n")
    (tmp_path / "run" / "memory.json").unlink()  # as when it is killed
    assert call(*SHOW).startswith("tick 6\n")


def test_without_a_save_that_can_be_read_the_last_capture_is_shown(
    tmp_path: Path, call: Call
) -> None:
    call(*RUN, "capture=true")
    call(*RUN, "ticks=5")
    for path in (tmp_path / "run" / "saves").glob("*/state.safetensors"):
        path.write_bytes(b"no tensors")
    assert call(*SHOW).startswith("tick 3\n")


def test_a_folder_with_nothing_to_show_says_why(tmp_path: Path, call: Call) -> None:
    assert call(*SHOW) == (
        "refused: run does not exist: give task.path=RUN_FOLDER, the folder of a run"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval.json").write_text("{}")
    assert call(*SHOW) == (
        "refused: run is not the folder of a run: it has neither memory.json nor captures"
    )
    assert call(*SHOW, "task.path=run/eval.json") == (
        "refused: run/eval.json is not a folder: give task.path=RUN_FOLDER, the folder of a run"
    )


def test_a_run_without_captures_says_so(call: Call) -> None:
    call(*RUN)
    assert "what run remembers at its end" in call(*SHOW)
    assert call(*SHOW, "task.tick=2") == (
        "refused: task.tick=2 was not captured: the run in run has no captures; leave out "
        "task.tick, or run brain with capture=true in another folder"
    )


def test_a_run_that_has_not_ended_says_so(tmp_path: Path, call: Call) -> None:
    call(*RUN)
    (tmp_path / "run" / "memory.json").unlink()
    told = "refused: the run in run has not ended: there is no memory.json yet; wait for its end "
    told += "or, if it was killed, give the same command again"
    assert call(*SHOW) == told
    assert "has no captures" in call(*SHOW, "task.tick=2")
    (tmp_path / "run" / "captures").mkdir()
    assert call(*SHOW, "task.tick=2") == told


def test_more_rows_than_a_capture_keeps_are_refused(call: Call) -> None:
    call(*RUN, "capture=true", "capture_top=30")
    lines = call(*SHOW, "task.tick=3", "task.top=30").splitlines()
    table = lines[lines.index("            likeliest next            probability") + 1 :]
    assert table.index("") == 30
    assert call(*SHOW, "task.top=31") == (
        "refused: task.top must be at most 30, the rows that run/captures/tick_000003.json keeps "
        "of each table, not 31: run brain with capture_top=31 to keep as many"
    )
