"""The folder that a command writes into: made when a task begins, and taken away again where
nothing was put into it, so that a refused command leaves none.

Hydra would make it, and write into it, before anything is checked. So Hydra gets a folder
elsewhere; what it wrote there follows when the task has begun to write.
"""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from brain.config.overrides import quoted
from brain.errors import Refused, one_line
from brain.files import given_path, require_own

TASKS, CAPTURES = "tasks", "captures"
"""In the folder of a run: what tasks about it wrote, each in a numbered folder; captured ticks."""


@dataclass
class _Command:
    """Where the command of this process writes."""

    folder: Path  # of its run, or of all runs of a multirun
    settled: bool  # the user gave its name, or it has been made
    scratch: Path  # what Hydra has instead


_commands: list[_Command | Exception] = []
"""The one of this process, once Hydra knows it, or why there is none."""


class Diverted(Callback):
    """Gives Hydra another folder, and keeps it from going there: relative paths mean the same
    whatever ``hydra.job.chdir`` is.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Before the folder of a run is made."""
        self._divert(config, "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Before the folder of a multirun is made."""
        self._divert(config, "sweep")

    def _divert(self, config: DictConfig, kind: str) -> None:
        try:
            _commands[:] = [self._diverted(config, kind)]
        except Exception as error:  # Hydra would make a warning of it, and go on
            _commands[:] = [error]
            with read_write(config), open_dict(config):
                config.hydra.output_subdir = None

    def _diverted(self, config: DictConfig, kind: str) -> _Command:
        key, overrides = f"hydra.{kind}.dir", config.hydra.overrides.hydra
        written = OmegaConf.to_container(config.hydra[kind], resolve=False)
        assert isinstance(written, dict)
        given = any(override.lstrip("+").startswith(f"{key}=") for override in overrides)
        named = given or "${now:" not in str(written["dir"])  # as the default is
        folder = Path(os.path.abspath(str(OmegaConf.select(config, key))))
        try:
            scratch = tempfile.mkdtemp(prefix="brain-")
        except OSError as error:
            reason = f"there is no folder for temporary files ({one_line(error)})"
            raise Refused(f"{reason}: set TMPDIR to one") from None
        with read_write(config), open_dict(config):
            OmegaConf.update(config, key, scratch)
            config.hydra.job.chdir = False
            # The runs of a multirun are composed anew.
            overrides.extend([f"{key}={quoted(scratch)}", "hydra.job.chdir=false"])
        return _Command(folder, named, Path(scratch))


@contextmanager
def run_folder(about: str | None) -> Iterator[Path]:
    """Makes the folder of a task, within a ``with`` statement; afterwards removes it, and those
    above it that were made for it, where they are empty. One that nobody named is never shared.

    Args:
        about: The folder of the run that the task is about. Unless another one was named, it writes
            into a numbered folder there; where that cannot be made, as if it were about none.
    Raises:
        OSError: The folder, or one for temporary files, cannot be made.
    """
    command = _command()
    made: list[Path] = []
    try:
        if not command.settled:
            command.folder, made = _unused(command.folder, about)
            command.settled = True
        of_hydra = Path(HydraConfig.get().runtime.output_dir)
        within = of_hydra.is_relative_to(command.scratch)
        folder = command.folder / of_hydra.relative_to(command.scratch) if within else of_hydra
        made = _make(folder, exist_ok=True) + made
        yield folder
    finally:
        with suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()


def keep_composed() -> None:
    """Puts what Hydra wrote into the folder that it belongs to. Does nothing the second time.
    Raises OSError.
    """
    command = _command()
    for path in command.scratch.rglob("*.yaml"):
        to = command.folder / path.relative_to(command.scratch)
        require_own([to.parent, to])
        to.parent.mkdir(parents=True, exist_ok=True)
        if str(command.scratch) in path.read_text("utf-8"):
            told = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
            OmegaConf.save(_moved(told, command), to)
        else:
            shutil.copyfile(path, to)
    shutil.rmtree(command.scratch, ignore_errors=True)


def clear_away() -> None:
    """Removes what Hydra had instead of the folder. To be called at the end."""
    for command in _commands:
        if isinstance(command, _Command):
            shutil.rmtree(command.scratch, ignore_errors=True)
    _commands.clear()


def _command() -> _Command:
    (command,) = _commands
    if isinstance(command, Exception):
        raise command
    return command


def _moved(told: Any, command: _Command) -> Any:
    """A composed configuration, naming the folder that its files are in now."""
    if isinstance(told, dict):
        return {key: _moved(value, command) for key, value in told.items()}
    if isinstance(told, list):
        return [_moved(value, command) for value in told]
    return (
        told.replace(str(command.scratch), str(command.folder)) if isinstance(told, str) else told
    )


def _unused(folder: Path, about: str | None) -> tuple[Path, list[Path]]:
    """Makes a folder that nobody else has made; returns it, and all that was not there."""
    run = None if about is None else Path(os.path.abspath(given_path(about)))
    if run is not None and run.is_dir():
        tasks = (run.parent if run.name == CAPTURES else run) / TASKS
        require_own([tasks])
        with suppress(OSError):
            return _next(tasks / str(number) for number in itertools.count(1))
    others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return _next(itertools.chain([folder], others))


def _next(paths: Iterator[Path]) -> tuple[Path, list[Path]]:
    while True:
        path = next(paths)
        try:
            return path, _make(path, exist_ok=False)
        except FileExistsError as error:
            if error.filename != str(path):  # something above it is no folder
                raise


def _make(path: Path, *, exist_ok: bool) -> list[Path]:
    """Makes a folder; returns it and those above it as far as they were not there, it first."""
    missing = list(itertools.takewhile(lambda p: not os.path.lexists(p), (path, *path.parents)))
    path.mkdir(parents=True, exist_ok=exist_ok)
    return missing
