"""The folder of a command: made for what is written, and for nobody else."""

import re
from collections.abc import Callable
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import brain
from fixture_types import CommandLine
from processes import command

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tiny_folder: Path, command_line: CommandLine) -> Run:
    """``run(*arguments)`` on the tiny model → its status and standard error."""

    def run_(*arguments: str) -> tuple[int, str]:
        given = ["prompt=abc", "ticks=2", "capacity=32", *arguments]
        status, _, err = command_line(*command(tiny_folder, *given)[3:])
        return status, err

    return run_


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["ticks=0"],
        ["capacity=2"],
        ["model.path=nowhere"],
        ["capacty=3"],
        ["hydra.run.dir=a/b/c", "source=nobody"],
        ["task=inspect", "task.path=nowhere"],
        ["task=bench", "task.engines=[warp]"],
        ["-m", "seed=1,2", "ticks=0"],
    ],
    ids=" ".join,
)
def test_a_refused_command_leaves_nothing(tmp_path: Path, run: Run, arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2
    assert contents(tmp_path) == {}


def test_a_refused_command_changes_nothing_in_a_folder(tmp_path: Path, run: Run) -> None:
    assert run("hydra.run.dir=out")[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    status, err = run("hydra.run.dir=out", "sampler=greedy")
    assert status == 2
    assert "sampler.greedy: False in the record, True given" in err
    status, err = run("hydra.run.dir=out", f"prompt={'a' * 100}b")
    assert "prompt: 'abc' in the record, 'aaa" in err
    assert run("hydra.run.dir=mine", "capacity=2")[0] == 2
    assert run("task=inspect", "task.path=mine")[0] == 2
    assert contents(tmp_path) == before


def test_a_folder_that_nobody_named_is_never_shared(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that start in the same second."""
    clock = SimpleNamespace(now=lambda: datetime(2026, 1, 2, 3, 4, 5))
    monkeypatch.setattr("hydra.core.utils.datetime", clock)
    assert [run(f"seed={seed}")[0] for seed in (1, 2)] == [0, 0]
    day = tmp_path / "outputs" / "2026-01-02"
    assert sorted(path.name for path in day.iterdir()) == ["03-04-05", "03-04-05-2"]


def test_paths_are_those_of_where_the_command_was_given(
    tmp_path: Path, run: Run, tiny_folder: Path
) -> None:
    (tmp_path / "model").symlink_to(tiny_folder)
    status, err = run("model.path=model", "hydra.run.dir=out", "hydra.job.chdir=true")
    assert status == 0, err
    assert (tmp_path / "out" / "run.json").is_file()


def test_every_file_of_a_run_is_in_the_table(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    given = ["hydra.run.dir=out", "capture=true", "repair=pairs", "repair.every=1", "save_every=2"]
    assert run(*given, "ticks=20", "capacity=16", "cull.target=8")[0] == 0
    (out / "commands.jsonl").write_text('[{"do":"pin","positions":[0]}]\n')
    assert run(*given, "ticks=24", "capacity=16", "cull.target=8")[0] == 0
    assert run("task=inspect", "task.path=out")[0] == 0
    pages = Path(brain.__file__).parents[1] / "RUNNING.md"
    rows = re.findall(r"^\| (`.*?) \|", pages.read_text("utf-8"), re.MULTILINE)
    table = [name.replace("N", "*") for row in rows for name in re.findall(r"`(.+?)`", row)]
    for name, content in contents(out).items():
        if content is not None:
            fitting = [p for p in table if fnmatch(name, f"{p}*" if p.endswith("/") else p)]
            assert fitting, name


def test_what_stands_in_the_way_of_a_folder_is_told(tmp_path: Path, run: Run) -> None:
    (tmp_path / "outputs").symlink_to(tmp_path / "unmounted")
    status, err = run()
    assert status == 2
    assert "outputs" in err.splitlines()[-1]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hydra").symlink_to(tmp_path)
    status, err = run("hydra.run.dir=out")
    assert status == 2
    assert ".hydra is a link" in err.splitlines()[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".hydra"}


def test_a_run_of_a_multirun_may_be_elsewhere(tmp_path: Path, run: Run) -> None:
    where = tmp_path / "else: where # it is"
    assert run("-m", "seed=1", f"hydra.sweep.subdir='{where}'")[0] == 0
    assert (where / "run.json").exists()


def test_what_hydra_writes_names_the_folder(tmp_path: Path, run: Run) -> None:
    name = "a: b # c"
    assert run(f"hydra.run.dir={name}")[0] == 0
    told = OmegaConf.load(tmp_path / name / ".hydra" / "hydra.yaml")
    assert Path(str(OmegaConf.to_container(told)["hydra"]["run"]["dir"])) == tmp_path / name  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("task=inspekt", "inspect"), ("temprature=0.5", "sampler.temperature"), ("sead=3", "seed")],
)
def test_a_misspelt_word_gets_the_nearest(run: Run, wrong: str, meant: str) -> None:
    status, err = run(wrong)
    assert status == 2
    assert f"did you mean {meant}?" in err.splitlines()[-1]
