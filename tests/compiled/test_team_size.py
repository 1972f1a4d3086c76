"""How many threads a read gets on a machine that others use: learned on calls that never happened,
whose time is a function of how many threads they had.
"""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import compiled
from brain.machine.cpu_operator import cpp_compiler

HEADER = Path(compiled.__file__).with_name("team_size.h")
SOURCE = f"""
#include "{HEADER}"
TeamSize team;
extern "C" int64_t next(int64_t most) {{ return team.next(most); }}
extern "C" void learn(double seconds, double asleep, double work) {{
  team.learn(seconds, asleep, work);
}}
"""

Seconds = Callable[[int], float]


class Team:
    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.next.restype = ctypes.c_int64
        self._library.learn.argtypes = (ctypes.c_double,) * 3

    def calls(self, number: int, most: int, seconds: Seconds, asleep: float) -> list[int]:
        """Sizes of so many calls. Every third one does twice the work in twice the time."""
        sizes = []
        for i in range(number):
            size = self._library.next(ctypes.c_int64(most))
            work = 1.0 + (i % 3 == 0)
            self._library.learn(seconds(size) * work, asleep if size > 1 else 0.0, work)
            sizes.append(size)
        return sizes


@pytest.fixture
def team(tmp_path: Path) -> Team:
    source, library = tmp_path / "team.cpp", tmp_path / "team.so"
    source.write_text(SOURCE)
    command = [cpp_compiler(), "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return Team(library)


def test_nothing_is_tried_on_a_quiet_machine(team: Team) -> None:
    assert set(team.calls(10_000, 8, lambda size: 1.0 / size, 0.1)) == {8}


@pytest.mark.parametrize(
    ("most", "best"), [(2, 1), (2, 2), (3, 2), (8, 7), (8, 4), (8, 8), (16, 1), (1, 1)]
)
def test_the_fastest_is_found_and_kept(team: Team, most: int, best: int) -> None:
    sizes = team.calls(2000, most, lambda size: 1.0 + (size != best), 0.5)
    assert sizes[0] == most
    assert sizes[200:].count(best) > 0.6 * 1800
    assert max(sizes) == most


def test_all_come_back_when_the_machine_is_quiet_again(team: Team) -> None:
    team.calls(1000, 8, lambda size: 1.0 + (size != 1), 0.5)
    quiet = team.calls(1000, 8, lambda size: 1.0 / size, 0.0)
    assert set(quiet[200:]) == {8}


def test_another_number_of_threads_begins_anew(team: Team) -> None:
    assert min(team.calls(500, 4, lambda size: size, 0.5)) == 1
    assert team.calls(1, 6, lambda size: size, 0.5) == [6]
