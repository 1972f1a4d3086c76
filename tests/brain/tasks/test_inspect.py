"""``task=inspect`` shows a captured tick, or what a run remembers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from brain.record.heatmap import (
    BARS,
    read_rows,
)
from brain.record.lock import sole_writer
from fixture_types import CommandLine
from processes import call

Show = Callable[..., str]


@pytest.fixture
def show(tiny_folder: Path, command_line: CommandLine) -> Show:
    """``show(*arguments)`` on the tiny model → its standard output or, if it is refused, its last
    line on standard error.
    """
    model = ["model=folder", f"model.path={tiny_folder}", "capacity=64", "prompt=abc"]

    def show_(*arguments: str) -> str:
        status, out, err = command_line(*model, *arguments)
        assert status in (0, 2)
        return err.splitlines()[-1] if status else out

    return show_


SHOW = ("task=inspect", "task.path=run", "hydra.run.dir=seen")


RUN = ("hydra.run.dir=run", "ticks=3")


def test_captures_are_in_the_order_of_their_ticks(tmp_path: Path, show: Show) -> None:
    show(*RUN, "capture=true")
    for old, new in (("000002", "999999"), ("000003", "1000000")):
        for path in sorted((tmp_path / "run" / "captures").glob(f"tick_{old}.*")):
            path.rename(path.with_name(f"tick_{new}{path.suffix}"))
    assert show(*SHOW).startswith("tick 3\n")  # in the file of the millionth
    assert show(*SHOW, "task.tick=1").startswith("tick 1\n")
    assert show(*SHOW, "task.tick=2") == (
        "refused: task.tick=2 was not captured: run has 3 captures, of ticks 1 to 1000000"
    )


def test_what_is_newer_is_shown(tmp_path: Path, show: Show) -> None:
    show(*RUN, "capture=true")
    assert show(*SHOW).startswith("tick 3\n")
    show(*RUN, "ticks=5")
    assert "what run remembers at its end" in show(*SHOW)
    assert show(*SHOW, "task.tick=3").startswith("tick 3\n")
    assert show(*SHOW, "task.path=run/captures").startswith("tick 3\n")
    show(*RUN, "ticks=6", "capture=true")
    assert show(*SHOW).startswith("tick 6\n")
    (tmp_path / "run" / "memory.json").unlink()  # as when it is killed
    assert show(*SHOW).startswith("tick 6\n")


def test_without_a_save_that_can_be_read_the_last_capture_is_shown(
    tmp_path: Path, show: Show
) -> None:
    show(*RUN, "capture=true")
    show(*RUN, "ticks=5")
    for path in (tmp_path / "run" / "saves").glob("*/state.safetensors"):
        path.write_bytes(b"no tensors")
    assert show(*SHOW).startswith("tick 3\n")


def test_a_folder_with_nothing_to_show_says_why(tmp_path: Path, show: Show) -> None:
    assert show(*SHOW) == (
        "refused: run does not exist: give task.path=RUN_FOLDER, the folder of a run"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval.json").write_text("{}")
    assert show(*SHOW) == (
        "refused: run is not the folder of a run: it has neither memory.json nor captures"
    )
    assert show(*SHOW, "task.path=run/eval.json") == (
        "refused: run/eval.json is not a folder: give task.path=RUN_FOLDER, the folder of a run"
    )


def test_a_run_without_captures_says_so(show: Show) -> None:
    show(*RUN)
    assert "what run remembers at its end" in show(*SHOW)
    assert show(*SHOW, "task.tick=2") == (
        "refused: task.tick=2 was not captured: the run in run has no captures; leave out "
        "task.tick, or run brain with capture=true in another folder"
    )


def test_a_run_that_has_not_ended_says_why(tmp_path: Path, show: Show) -> None:
    show(*RUN)
    run = tmp_path / "run"
    (run / "memory.json").unlink()
    told = "refused: the run in run was killed, so there is no memory.json: give the same command "
    told += "again to go on with it"
    assert show(*SHOW) == told
    assert "has no captures" in show(*SHOW, "task.tick=2")
    (run / "captures").mkdir()
    assert show(*SHOW, "task.tick=2") == told
    (run / "failed.txt").write_text("the disk is full\n", "utf-8")
    assert "has failed (the disk is full)" in show(*SHOW)
    with sole_writer(run):
        assert "is still running" in show(*SHOW)


def test_it_writes_into_the_folder_of_the_run(tmp_path: Path, show: Show) -> None:
    show(*RUN)
    for number in ("1", "2"):
        show(*SHOW[:2])
        assert (tmp_path / "run" / "tasks" / number / "memory.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    shutil.rmtree(tmp_path / "run" / "tasks")
    (tmp_path / "run" / "tasks").write_text("where nothing can be written")
    show(*SHOW[:2])
    assert len(list((tmp_path / "outputs").rglob("memory.html"))) == 1


def test_more_rows_than_a_capture_keeps_are_refused(show: Show) -> None:
    show(*RUN, "capture=true", "capture_top=30")
    lines = show(*SHOW, "task.tick=3", "task.top=30").splitlines()
    table = lines[lines.index("            likeliest next            probability") + 1 :]
    assert table.index("") == 30
    assert show(*SHOW, "task.top=31") == (
        "refused: task.top must be at most 30, the rows that run/captures/tick_000003.json keeps "
        "of each table, not 31: run brain with capture_top=31 to keep as many"
    )


def test_inspect_shows_what_a_run_remembers(tiny_folder: Path, tmp_path: Path) -> None:
    call(tmp_path, tiny_folder, "prompt=Hello there", "ticks=5", "hydra.run.dir=out")
    rows = read_rows(tmp_path / "out" / "memory.json")
    done = call(tmp_path, tiny_folder, "task=inspect", "task.path=out", "hydra.run.dir=seen")
    assert f"{len(rows)} rows" in done.stdout
    assert any(bar in done.stdout for bar in BARS)
    assert "\033" not in done.stdout  # not a terminal
    assert "memory.html" in done.stderr
    shown = (tmp_path / "seen" / "memory.html").read_text("utf-8")
    assert shown.count('title="position') == len(rows)
