"""Building the CPU's operators: once, again where one is damaged, and refusals in one line."""

import os
import re
import stat
from pathlib import Path

import pytest

from brain.errors import Refused
from brain.machine.cpu_operator import native_libraries
from compiled import draw_cpu, read_cpu
from compiled.read_cpu import Formats

FLOATS = Formats("float", "float")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache with a space")
    native_libraries(FLOATS, folder)
    return folder


def test_it_is_built_once(cache: Path) -> None:
    first = native_libraries(FLOATS, cache)
    before = [library.stat().st_mtime_ns for library in first]
    assert native_libraries(FLOATS, cache) == first
    assert [library.stat().st_mtime_ns for library in first] == before


def test_every_pair_of_formats_is_a_library_of_its_own(cache: Path) -> None:
    floats, bytes_ = (native_libraries(Formats("float", w), cache) for w in ("float", "int8_t"))
    assert floats.read != bytes_.read
    assert floats.draw == bytes_.draw  # which knows no format


@pytest.mark.parametrize("which", ["read", "draw", "tick"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_library_is_built_again(cache: Path, damage: str, which: str) -> None:
    library: Path = getattr(native_libraries(FLOATS, cache), which)
    content = library.read_bytes()
    library.unlink()
    if damage == "truncated":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        library.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    again = native_libraries(FLOATS, cache)
    assert getattr(again, which) == library
    assert len(library.read_bytes()) == len(content)
    read_cpu.operator(again.read)
    draw_cpu.operator(again.draw)


def compiler(folder: Path, script: str) -> Path:
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'x.cpp:1: error: no luck' >&2; exit 1", "no luck"),
        ("kill -9 $$", "without a reason"),
        ("exit 0", "without a reason"),  # and without a library
    ],
    ids=["error", "killed", "nothing"],
)
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, script)))
    failed = rf"cannot build read_cpu\.cpp .*{told}.*set CXX to another.*engine=eager"
    with pytest.raises(Refused, match=failed):
        native_libraries(FLOATS, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_without_a_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Refused, match=r"no C\+\+ compiler.*engine=eager"):
        native_libraries(FLOATS)


@pytest.mark.parametrize("asked", ["ccache g++", "/no/such/g++"])
def test_a_compiler_that_is_asked_for_is_not_replaced(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", asked)
    with pytest.raises(Refused, match=f"CXX={re.escape(asked)} .*engine=eager"):
        native_libraries(FLOATS)


def test_a_cache_that_cannot_be_written_names_what_to_do_without() -> None:
    with pytest.raises(Refused, match=r"cannot be written.*engine=eager"):
        native_libraries(FLOATS, Path("/proc/nope"))


def test_another_compiler_is_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = native_libraries(FLOATS, cache)
    monkeypatch.setenv("CXX", str(compiler(tmp_path, 'exec /usr/bin/env c++ "$@"')))
    assert not set(native_libraries(FLOATS, cache)) & set(first)
