"""What the fuzzer found in saves, run folders, commands and command lines."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import brain
from brain.errors import Refused
from brain.machine.integrity import file_sha256
from brain.opening import load
from brain.record.commands import ANSWERS, INBOX, LONGEST_LINE, MOST_AT_ONCE, Inbox, parse_batch
from brain.record.lock import LOCK, sole_writer
from brain.record.run_record import RunRecord
from brain.saves import DESCRIPTION, TENSORS, sealed
from fuzzing import arguments
from fuzzing.specimens import TEXT, Specimens

# Saves --------------------------------------------------------------------------------------------


def describe(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a save's description and seals it again, as its author could."""
    told = json.loads((folder / DESCRIPTION).read_text())
    change(told)
    (folder / DESCRIPTION).write_text(json.dumps(sealed(told)))


def poke(folder: Path, name: str, value: bytes) -> None:
    """Overwrites the beginning of a saved tensor, and gives the save the checksum of that."""
    path = folder / TENSORS
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[start : start + len(value)] = value
    path.write_bytes(content)
    describe(folder, lambda told: told.update(sha256=file_sha256(path)))


HUGE, NAN = struct.pack("<q", (1 << 63) - 1), struct.pack("<f", float("nan"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", b"\xff"),
        ("cursor.source", b"\x05"),
        ("born", HUGE),
        ("lit", struct.pack("<q", -1)),
        ("position", HUGE),
        ("cursor.position", HUGE),
        ("cursor.tick", HUGE),
        ("cursor.tick", struct.pack("<q", -1)),
        ("cursor.uncommitted", struct.pack("<q", 2)),
        ("brightness", NAN),
        ("cursor.surprise", NAN),
    ],
)
def test_numbers_that_no_run_comes_to_are_refused(
    specimens: Specimens, tmp_path: Path, name: str, value: bytes
) -> None:
    folder = specimens.copy(specimens.save, tmp_path / "save")
    specimens.brain.restore(folder)
    poke(folder, name, value)
    with pytest.raises(Refused, match=r"cursor|source|born|lit|positions|brightness"):
        specimens.brain.restore(folder)


@pytest.mark.parametrize("group", ["sampler", "engine", "cull", "model"])
def test_a_group_of_settings_that_is_none_is_refused(
    specimens: Specimens, tmp_path: Path, group: str
) -> None:
    """OmegaConf takes what looks like an interpolation, escaped or not, in place of a group."""
    folder = specimens.copy(specimens.save, tmp_path / "save")
    told = json.loads((folder / DESCRIPTION).read_text("utf-8"))
    told["conf"][group] = "${seed}"
    (folder / DESCRIPTION).write_text(json.dumps(sealed(told)), "utf-8")
    with pytest.raises(Refused, match=f"{group} must be a group of keys"):
        load(folder)


@pytest.mark.parametrize("value", ["${seed}", [1, "${seed}"], [1, [16]], {"a": 1}])
def test_widths_that_are_none_are_refused(
    specimens: Specimens, tmp_path: Path, value: object
) -> None:
    folder = specimens.copy(specimens.save, tmp_path / "save")
    told = json.loads((folder / DESCRIPTION).read_text("utf-8"))
    told["conf"]["engine"]["widths"] = value
    (folder / DESCRIPTION).write_text(json.dumps(sealed(told)), "utf-8")
    with pytest.raises(Refused, match="widths"):
        load(folder)


def test_a_save_larger_than_its_rows_is_not_read(specimens: Specimens, tmp_path: Path) -> None:
    folder = specimens.copy(specimens.save, tmp_path / "save")
    with (folder / TENSORS).open("ab") as file:
        file.truncate(1 << 41)
    with pytest.raises(Refused, match=r"damaged|larger|cannot be read"):
        specimens.brain.restore(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["conf"]["cull"]["brightness"]["seeds"].update(user=[]),
        lambda told: told["conf"]["sampler"].update(temperature=10**400),
        lambda told: told["conf"].update(capacity=[[]]),
        lambda told: told.update(conf=[]),
        lambda told: told.update(conf=None),
        lambda told: told.update(high_water=[[]] * 99),
        lambda told: told.update(unfinished=7),
    ],
)
def test_settings_of_another_shape_are_refused(
    specimens: Specimens, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = specimens.copy(specimens.save, tmp_path / "save")
    describe(folder, change)
    with pytest.raises(Refused):
        load(folder)


def test_saved_text_is_never_looked_up_in_the_environment(
    specimens: Specimens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be sent elsewhere as the name of a model, say."""
    monkeypatch.setenv("SECRET", "sesame")
    folder = specimens.copy(specimens.save, tmp_path / "save")
    text = r"a ${oc.env:SECRET} b \${x} ${"
    describe(folder, lambda told: told["conf"].update(prompt=text))
    assert load(folder).settings.conf.prompt == text
    describe(folder, lambda told: told["conf"]["model"].update(path="${oc.env:SECRET}"))
    with pytest.raises(Refused, match=r"oc\.env:SECRET") as refusal:
        load(folder)
    assert "sesame" not in str(refusal.value)


# Run folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("transcript.txt", "tokens.txt", "repairs.jsonl", "answers.jsonl", "commands.jsonl"),
        *("run.json", "memory.json", "saves", "saves/run.json", "saves/1", "saves/1.journal"),
        "tokens.txt.1.rewritten",
    ],
)
def test_nothing_is_written_through_a_link(specimens: Specimens, tmp_path: Path, name: str) -> None:
    folder = specimens.copy(specimens.record, tmp_path / "run")
    path, outside = folder / name, tmp_path / "outside"
    if path.is_dir() or path.exists():
        path.rename(outside)
    else:
        outside.write_text("kept")
    before = {p: p.read_bytes() for p in (outside, *outside.rglob("*")) if p.is_file()}
    path.symlink_to(outside)
    mind = specimens.brain
    with pytest.raises(Refused, match="is a link"):
        RunRecord(folder, mind, mind.settings.conf).begin(lambda: mind.prime(TEXT))
    assert {p: p.read_bytes() for p in before} == before


def test_nothing_is_locked_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("kept")
    (tmp_path / LOCK).symlink_to(tmp_path / "outside")
    with pytest.raises(Refused, match="is a link"), sole_writer(tmp_path):
        pass
    assert (tmp_path / "outside").read_text() == "kept"


# Commands -----------------------------------------------------------------------------------------


@pytest.fixture
def mind(specimens: Specimens) -> brain.Brain:
    specimens.brain.prime(TEXT)
    return specimens.brain


@pytest.mark.parametrize(
    "line",
    [
        '[{"do": "pin", "positions": ' + "[" * 970 + "]" * 970 + "}]",
        '[{"do": "pin", "positions": {"a": ' * 400 + "1" + "}}]" * 400,
        '[{"do": "inject", "text": "a", "source": "\\ud800"}]',
        '[{"do": "\\ud800\\u001b[2J"}]',
        '[{"do": "pin", "positions": [1], "\\ud800": 1}]',
        '[{"do": "pin", "positions": [' + "9" * 4000 + "]}]",
        '[{"do": "boost", "positions": [1], "amount": 1' + "0" * 400 + "}]",
        '[{"do": "pin", "do": "cull", "positions": [1]}]',
        '[{"do": "inject", "ids": [1e400]}]',
    ],
)
def test_a_running_brain_survives_any_line(mind: brain.Brain, tmp_path: Path, line: str) -> None:
    (tmp_path / INBOX).touch()
    inbox = Inbox(tmp_path, mind)
    (tmp_path / INBOX).write_text(line + "\n" + '[{"do": "pin", "positions": [3]}]\n', "utf-8")
    assert inbox.poll() == 1  # the second of them
    first, second = (tmp_path / ANSWERS).read_text("utf-8").splitlines()
    assert json.loads(first)["refused"].isprintable()
    assert "applied" in json.loads(second)


def test_a_command_without_an_end_is_refused_in_parts(mind: brain.Brain, tmp_path: Path) -> None:
    (tmp_path / INBOX).touch()
    inbox = Inbox(tmp_path, mind)
    with (tmp_path / INBOX).open("wb") as file:
        file.truncate(1 << 41)
    assert inbox.poll() == 0
    assert inbox.read == MOST_AT_ONCE
    assert "refused" in (tmp_path / ANSWERS).read_text("utf-8")
    with pytest.raises(Refused, match=f"at most {LONGEST_LINE}"):
        parse_batch("x" * (LONGEST_LINE + 1), mind.encode)


# Command lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        ["--resolve"],
        ["--shell-completion"],
        ["7=8"],
        ["model" + "l" * 300 + ".path=x"],
        ["prompt=\udcff"],
        ["capacity=4611686018427387904"],
        ["capacity=1" + "0" * 400],
        ["sampler.temperature=1" + "0" * 400],
        ["cull.brightness.seeds={user:nan}"],
        ["hydra.run.dir=/dev/null/x"],
        ["threads=2000000000"],
        ["cull.brightness.gain=nan"],
        ["task=eval", "task.text=x", "task.streams=1000000000"],
        ["cull.brightness.decay=inf"],
    ],
)
def test_any_command_line_ends_with_one_line(
    specimens: Specimens, tmp_path: Path, given: list[str]
) -> None:
    usual = ["model=folder", f"model.path={specimens.single}", "ticks=1", "capacity=24"]
    told = arguments.run([*usual, f"hydra.run.dir={tmp_path}/out", *given])
    assert told is not None
    assert "Traceback" not in told
    assert [line for line in told.splitlines() if line.startswith("refused: ")]
