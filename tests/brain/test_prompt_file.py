"""The prompt from a file or from standard input, as users of the command line give it."""

import io
import json
import sys
from pathlib import Path

import pytest

from fixture_types import CommandLine

TEXT = "Captain Ann Webb keeps the only key.\r\n\tÉvery evening, she climbs ${HOME} up.\n" * 4


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "a text, with ${signs}.txt"
    path.write_bytes(TEXT.encode())
    return path


SMALL = ("capacity=48", "cull.target=24", "cull.recent=4", "cull.chunk=8", "ticks=6", "seed=3")


def test_a_file_is_what_the_prompt_would_be(
    text_file: Path, tiny_command_line: CommandLine, tmp_path: Path
) -> None:
    """Character for character, and of any length."""
    out = tmp_path / "out"
    status, said, notes = tiny_command_line(
        *(f"prompt_file={text_file}", *SMALL, f"hydra.run.dir={out}")
    )
    assert status == 0
    assert "read " in notes
    assert "24 rows remembered" in notes
    report = json.loads((out / "run.json").read_text("utf-8"))
    assert report["prompt"] == TEXT
    again = tiny_command_line(f"prompt={TEXT}", *SMALL, f"hydra.run.dir={tmp_path / 'again'}")
    assert again[:2] == (0, said)


def test_standard_input(
    tiny_command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the same command, twice the same text: the run goes on."""
    texts = []
    for ticks in (6, 9):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        status, said, notes = tiny_command_line(
            *("prompt_file=-", *SMALL, f"ticks={ticks}", f"hydra.run.dir={tmp_path / 'out'}")
        )
        assert status == 0
        assert ("going on after 6 tokens" in notes) == (ticks == 9)
        texts.append(said)
    assert (tmp_path / "out" / "transcript.txt").read_text("utf-8") == "".join(texts)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"another")))
    status, _, refusal = tiny_command_line("prompt_file=-", f"hydra.run.dir={tmp_path / 'out'}")
    assert status == 2
    assert "the record of another run" in refusal


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"caf\xe9 noir", "is not UTF-8: byte 0xe9 at offset 3"),
        (None, "No such file"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(
    content: bytes | None, reason: str, tiny_command_line: CommandLine, tmp_path: Path
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    status, said, refusal = tiny_command_line(f"prompt_file={path}")
    assert (status, said) == (2, "")
    assert reason in refusal
    assert str(path) in refusal
    assert refusal.count("\n") == 1


def test_a_prompt_beside_it_is_refused(text_file: Path, tiny_command_line: CommandLine) -> None:
    status, _, refusal = tiny_command_line(f"prompt_file={text_file}", "prompt=Hello")
    assert status == 2
    assert "prompt or prompt_file, not both" in refusal
