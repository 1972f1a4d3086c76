"""What the compiler keeps between two starts is used as it was left, or not at all."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import precompiled_headers
from brain.errors import BrainWarning, Refused
from brain.machine.graph_cache import LOCK, NAME, VARIABLE, kept_graphs, name_graph_folder
from brain.machine.integrity import MANIFEST

Damage = Callable[[Path], None]


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def kept_in(folder: Path) -> dict[str, str]:
    """What is there, as a process finds it."""
    with kept_graphs(folder):
        there = sorted(path for path in (folder / NAME).rglob("*") if path.is_file())
        return {path.name: path.read_text() for path in there if path.name not in (LOCK, MANIFEST)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a process has left two files."""
    monkeypatch.delenv(VARIABLE, raising=False)
    with kept_graphs(tmp_path):
        assert os.environ[VARIABLE] == str(tmp_path / NAME)
        (tmp_path / NAME / "ab").mkdir()
        (tmp_path / NAME / "ab" / "loop.so").write_text("machine code")
        (tmp_path / NAME / "entry").write_text("a graph")
    assert VARIABLE not in os.environ
    return tmp_path


def test_what_was_sealed_is_there_again(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert kept_in(cache) == {"loop.so": "machine code", "entry": "a graph"}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", [cut_short, emptied, one_bit, os.remove])
@pytest.mark.parametrize("name", ["ab/loop.so", "entry"])
def test_one_damaged_file_and_nothing_is_used(
    cache: Path, capfd: pytest.CaptureFixture[str], damage: Damage, name: str
) -> None:
    damage(cache / NAME / name)
    with pytest.warns(BrainWarning, match="damaged") as told:
        assert kept_in(cache) == {}
    assert len(told) == 1
    with warnings.catch_warnings(action="error"):
        assert kept_in(cache) == {}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", [cut_short, emptied, one_bit])
def test_a_seal_that_cannot_be_read_seals_nothing(cache: Path, damage: Damage) -> None:
    damage(cache / NAME / MANIFEST)
    with pytest.warns(BrainWarning, match="damaged"):
        assert kept_in(cache) == {}


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"files": {"entry": 3}}', '{"files": {"../../x": {"size": 1, "sha256": "ab"}}}'],
)
def test_a_seal_that_says_something_else_seals_nothing(cache: Path, text: str) -> None:
    outside = cache / "x"
    outside.write_text("not ours")
    (cache / NAME / MANIFEST).write_text(text)
    with pytest.warns(BrainWarning, match="damaged"):
        assert kept_in(cache) == {}
    assert outside.read_text() == "not ours"


def test_what_a_killed_process_left_is_not_used(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (cache / NAME / "half.so").write_text("half of the machine co")
    assert kept_in(cache) == {"loop.so": "machine code", "entry": "a graph"}
    assert capfd.readouterr().err == ""


def test_what_another_process_is_making_stays(cache: Path) -> None:
    with kept_graphs(cache):
        (cache / NAME / "new.so").write_text("new")
        assert kept_in(cache)["new.so"] == "new"


def test_what_others_may_still_be_writing_is_not_sealed(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with kept_graphs(cache):
        (cache / NAME / "half.so").write_text("half of")
        assert kept_in(cache)["half.so"] == "half of"  # comes and goes meanwhile
        assert "half.so" not in json.loads((cache / NAME / MANIFEST).read_text())["files"]
        (cache / NAME / "half.so").write_text("half of it, and the rest")
    assert kept_in(cache)["half.so"] == "half of it, and the rest"
    assert capfd.readouterr().err == ""


def test_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years")
    (tmp_path / NAME).symlink_to(tmp_path / "theirs")
    with kept_graphs(tmp_path) as seal:
        seal()
        assert VARIABLE not in os.environ
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]


def test_a_folder_that_others_may_write_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME).chmod(0o777)
    with kept_graphs(tmp_path):
        assert VARIABLE not in os.environ


def test_a_seal_in_the_middle_of_a_run_holds_what_is_there(cache: Path) -> None:
    with kept_graphs(cache) as seal:
        (cache / NAME / "captured").write_text("a graph")
        seal()
        assert "captured" in json.loads((cache / NAME / MANIFEST).read_text())["files"]


def test_a_folder_that_cannot_be_made_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / NAME).write_text("a file stands in its place")
    with kept_graphs(tmp_path) as seal:
        seal()
        assert VARIABLE not in os.environ


@pytest.mark.skipif(sys.platform == "win32", reason="links as on Unix")
def test_a_path_that_needs_quotes_gets_a_link_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "tmp"
    links.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(links))
    for name in ("First Last", "O'Neil", 'the "other"'):
        folder = tmp_path / name
        for _ in range(2):
            monkeypatch.setenv(VARIABLE, str(folder))
            name_graph_folder()
            assert Path(os.environ[VARIABLE]).resolve() == folder
            assert not set(os.environ[VARIABLE]) & set(" '\"")
    (private,) = links.iterdir()
    assert len(list(private.iterdir())) == 3
    private.chmod(0o777)  # others could have the compiler's files elsewhere
    monkeypatch.setenv(VARIABLE, str(folder))
    with pytest.raises(Refused, match=VARIABLE):
        name_graph_folder()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "Jörg"))
    name_graph_folder()
    assert os.environ[VARIABLE] == str(tmp_path / "Jörg")


BRAIN = """
from precompiled_headers import precompile_headers
precompile_headers()
from brain.app import main
main()
"""


def test_a_run_says_the_same_after_every_kept_file_was_damaged(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """PyTorch alone ends in a bus error, or an exception, on a library that is cut short."""
    support = str(Path(precompiled_headers.__file__).parent)
    home = tmp_path / "Jörg's first"  # PyTorch quotes no path that it gives to the C++ compiler
    modules = os.pathsep.join(filter(None, (support, os.environ.get("PYTHONPATH"))))
    named = {VARIABLE: str(home / "inductor"), "PYTHONPATH": modules}

    def say() -> tuple[str, str]:
        options = [
            *("prompt=Hello", "ticks=8", "capacity=32", "seed=3", "engine=compiled"),
            *("cull=none", "sampler=greedy"),  # the smallest graphs
            *("model=folder", f"model.path={tiny_folder}"),
            *("hydra.run.dir=out", f"cache_dir={home / 'cache'}"),
        ]
        done = subprocess.run(
            [sys.executable, "-c", BRAIN, *options],
            cwd=tmp_path,
            env={**os.environ, **named, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        tokens = (tmp_path / "out" / "tokens.txt").read_text()
        (tmp_path / "out").rename(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        return done.stdout + tokens, done.stderr

    said, told = say()
    assert "damaged" not in told
    kept = [path for path in home.rglob("*") if path.is_file() and path.name != LOCK]
    assert {".so", ".cpp", ".py"} <= {path.suffix for path in kept}
    for index, path in enumerate(sorted(kept)):
        if path.stat().st_size:
            (cut_short, one_bit)[index % 2](path)
    again, told = say()
    assert again == said
    assert "damaged" in told
