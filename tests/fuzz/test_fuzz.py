"""A short run of the fuzzer, and that it sees what it is there to see."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from brain.errors import Refused
from fuzz import fuzz, plan
from fuzzing.formats import (
    damaged_protobuf,
    gguf_marks,
    protobuf,
    protobuf_fields,
)
from fuzzing.jsons import DEEP, damaged_value, text_of
from fuzzing.specimens import Specimens
from fuzzing.targets import TARGETS, Case
from fuzzing.worker import REFUSED, TAKEN, Finding, Job, Workbench


def test_nothing_crashes_hangs_or_is_left_behind(tmp_path: Path) -> None:
    jobs = [job for job in plan(1600, 0, []) if job.target != "command_line"]
    account = fuzz([*jobs, *plan(12, 0, ["command_line"])], 20, tmp_path)
    assert account.findings == []
    assert set(account.outcomes) == {*TARGETS, "command_line"}
    assert sum(counted[REFUSED] for counted in account.outcomes.values()) > 500
    assert sum(counted[TAKEN] for counted in account.outcomes.values()) > 100


def refused(message: str) -> Callable[[Case], None]:
    def target(case: Case) -> None:
        error = Refused("x")
        error.args = (message,)
        raise error

    return target


def panics(case: Case) -> None:
    raise type("PanicException", (BaseException,), {})("panicked")


def litters(case: Case) -> None:
    tempfile.mkstemp()


def overwrites(case: Case) -> None:
    (case.outside / "kept.txt").write_text("changed")


def grabs(case: Case) -> None:
    bytearray(1 << 33)


def takes_it(case: Case) -> None:
    case.folder.joinpath("mine").write_text(str(case.rng.random()))


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (refused(""), "not one line"),
        (refused("two\nlines"), "not one line"),
        (refused("\x1b[2J"), "not one line"),
        (panics, "PanicException"),
        (litters, "left behind"),
        (overwrites, "outside changed"),
        (grabs, "MemoryError"),
        (refused("one line"), REFUSED),
        (takes_it, TAKEN),
    ],
)
def test_what_a_workbench_sees(tmp_path: Path, target: Callable[[Case], None], told: str) -> None:
    outcome = Workbench(tmp_path, {"x": target}).do(Job("x", 0, 0))
    assert told in (outcome.key if isinstance(outcome, Finding) else outcome)
    assert not (tmp_path / "case").exists()


def test_a_case_is_a_function_of_target_seed_and_index() -> None:
    draws = {
        Job(*job).rng().random() for job in [("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1)]
    }
    assert len(draws) == 4
    assert Job("a", 0, 0).rng().random() in draws
    made = [damaged_value({"a": [1, 2, {"b": None}]}, Random(7)) for _ in range(2)]
    assert repr(made[0]) == repr(made[1])


def test_damage_is_damage_to_something_valid(specimens: Specimens) -> None:
    content = specimens.sentencepiece.read_bytes()
    assert protobuf(list(protobuf_fields(content))) == content
    assert damaged_protobuf(content, Random(3)) != content
    gguf = specimens.gguf.read_bytes()
    marks = gguf_marks(gguf)
    assert [at for at in marks["u64"] if at < 24] == [8, 16]
    assert all(gguf[at : at + 1] for places in marks.values() for at in places)
    assert len(text_of({"a": DEEP}, Random(0), blows=0)) > 100
