"""The picture of a memory shows every row, its gaps and its brightness, with and without colour."""

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from brain import Brain, Cull, Pin, Refused
from brain.record.heatmap import (
    BARS,
    GAP,
    Row,
    in_terminal,
    levels,
    page,
    read_rows,
    remembered,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = Row(0, 5, "ab", 1.0, 0.5, 0.25, "user", 7, 2, False)


def row(position: int, text: str, brightness: float, *, pinned: bool = False) -> Row:
    return replace(PLAIN, position=position, text=text, brightness=brightness, pinned=pinned)


ROWS = [
    row(0, "Once", 90.0),
    row(1, " <upon>", 3.0),
    row(4, " a\ntime", 40.0, pinned=True),
    row(5, "&", 0.0),
]


def test_rows_are_those_of_the_mirror(eager_brain: Brain) -> None:
    b = eager_brain
    b.prime([10, 20, 30, 40, 50, 60])
    b.patch([Cull([2]), Pin([3])])
    b.feed([7, 8, 9])
    rows, mirror = remembered(b), b.mirror
    assert [r.position for r in rows] == mirror.position.tolist()
    assert [r.token for r in rows] == mirror.token_id.tolist()
    assert [r.source for r in rows] == mirror.sources()
    assert [r.pinned for r in rows] == mirror.pinned.tolist()
    assert [r.age for r in rows] == [3, 3, 3, 3, 3, 1, 0]
    assert all(0 <= r.dark <= r.age for r in rows)


def test_levels_are_ranks_in_eight_equal_parts() -> None:
    rows = [row(index, "x", brightness) for index, brightness in enumerate([5, 1, 900, 3])]
    assert levels(rows) == [4, 0, 6, 2]
    assert levels([row(index, "x", 50.0) for index in range(9)]) == [0] * 9
    assert levels([]) == []


def test_the_terminal_shows_text_gaps_and_bars_without_colour() -> None:
    shown = in_terminal(ROWS, colour=False, width=200)
    text, bars = shown.split("\n")
    assert text == f"Once <upon>{GAP} a⏎time&"
    assert len(text) == len(bars)
    assert bars[:4] == BARS[6] * 4
    assert bars[4:11] == BARS[2] * 7
    assert bars[11:14] == "   "
    assert bars[14:21] == "^" * 7
    assert bars[21] == BARS[0]


def test_colour_only_adds_to_it() -> None:
    coloured = in_terminal(ROWS, colour=True, width=9)
    assert "\033[48;5;" in coloured
    assert re.sub(r"\033\[[0-9;]*m", "", coloured) == in_terminal(ROWS, colour=False, width=9)


def test_text_cannot_command_the_terminal() -> None:
    shown = in_terminal([row(0, "\033[2Jx\x07\u202e", 1.0)], colour=False)
    assert "\033" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown


def test_the_page_stands_alone_and_escapes_the_text() -> None:
    shown = page(ROWS, "a <title>")
    assert "<title>a &lt;title&gt;</title>" in shown
    assert "&lt;upon&gt;" in shown
    assert "<upon>" not in shown
    assert not re.search(r"https?://|<script|<link|src=", shown)
    assert "2 positions forgotten" in shown
    spans = re.findall(r'<span class="(b\d)( pinned)?" title="([^"]*)">(.*?)</span>', shown)
    spans = [span for span in spans if span[2]]
    assert [span[0] for span in spans] == ["b6", "b2", "b4", "b0"]
    assert [bool(span[1]) for span in spans] == [False, False, True, False]
    text = "".join(html.unescape(span[3]).replace("⏎<br>", "\n") for span in spans)
    assert text == "".join(r.text for r in ROWS)
    assert "brightness 90" in spans[0][2]


def test_rows_survive_being_written(tmp_path: Path) -> None:
    for rows in (ROWS, []):
        write_rows(rows, tmp_path / "memory.json")
        assert read_rows(tmp_path / "memory.json") == rows


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{}",
        "[1]",
        "[[]]",
        '[{"position": 0}]',
        "[" * 100_000,
        '[{"position": "0", "token": 5, "text": "ab", "brightness": 1.0, "surprise": 0.5, '
        '"novelty": 0.25, "source": "user", "age": 7, "dark": 2, "pinned": false}]',
    ],
)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text(damage)
    with pytest.raises(Refused, match="damaged") as refused:
        read_rows(tmp_path / "memory.json")
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="damaged"):
        read_rows(tmp_path / "memory.json")
