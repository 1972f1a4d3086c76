"""A process that works through cases and tells what came of each.

It may be killed by what it reads: whoever started it knows by then what came of the cases before.
"""

import ctypes
import gc
import os
import resource
import shutil
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.files import listing

TAKEN, REFUSED = "taken", "refused"
ROOM = {"command_line": 6 << 30}
USUAL_ROOM = 1 << 30
"""Bytes of address space that a case may take besides what the process has already."""
LONGEST_MESSAGE = 5000


@dataclass(frozen=True)
class Job:
    """One case, made again from these three alone."""

    target: str
    seed: int
    index: int

    def rng(self) -> Random:
        """The random numbers of the case."""
        return Random(f"{self.seed}/{self.target}/{self.index}")


@dataclass(frozen=True)
class Finding:
    """What should not have happened. ``key`` is the same for what is probably the same fault."""

    job: Job
    key: str
    told: str


Outcome = str | Finding


READY = "ready"


def work(root: Path, jobs: Sequence[Job], results: Connection) -> None:
    """Sends READY, then does the jobs in order and sends what came of every one."""
    root.mkdir(parents=True)
    noise = root / "stderr.txt"
    os.dup2(os.open(noise, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    workbench = Workbench(root)
    results.send(READY)
    for number, job in enumerate(jobs):
        results.send(workbench.do(job))
        if number % 200 == 0:
            gc.collect()
            os.truncate(noise, 0)
    results.close()
    shutil.rmtree(root, ignore_errors=True)


class Workbench:
    """The specimens, and a fresh folder for every case. ``targets``: by name, instead of ours."""

    def __init__(self, root: Path, targets: Mapping[str, Any] | None = None) -> None:
        # Heavy, and only wanted where the work is done.
        import torch

        from fuzzing.arguments import command_line
        from fuzzing.specimens import Specimens
        from fuzzing.targets import TARGETS, Case

        torch.set_num_threads(1)
        self._root, self._case = root, Case
        if targets is None:
            (root / "specimens").mkdir(parents=True)
            self._specimens: Any = Specimens(root / "specimens")
            targets = {name: target for name, (target, _) in TARGETS.items()}
            targets = {**targets, "command_line": command_line}
        else:
            self._specimens = None
        self._targets = targets
        self._noise = root / "stderr.txt"
        self._held = _address_space()

    def do(self, job: Job) -> Outcome:
        """What comes of a case."""
        folder = self._root / "case"
        inner, temporary, outside, current = (
            folder / name for name in ("in", "tmp", "outside", "cwd")
        )
        for made in (inner, temporary, outside, current):
            made.mkdir(parents=True)
        (outside / "kept.txt").write_text("kept")
        here = os.getcwd()
        os.chdir(current)
        tempfile.tempdir = str(temporary)
        heard = self._noise.stat().st_size if self._noise.exists() else 0
        case = self._case(job.rng(), inner, outside, self._specimens)
        limit = self._held + ROOM.get(job.target, USUAL_ROOM)
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        try:
            outcome = self._outcome(job, case)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            os.chdir(here)
            tempfile.tempdir = None
        if isinstance(outcome, str):
            # PyTorch's own cache of what it has compiled is meant to stay.
            left = [name for name in listing(temporary) if not name.startswith("torchinductor_")]
            if job.target != "command_line":  # whose run folder may be anywhere there
                left += listing(current)
            kept = outside / "kept.txt"
            if left:
                outcome = Finding(job, f"{job.target}: left behind", f"left behind: {left[:5]}")
            elif list(listing(outside)) != ["kept.txt"] or kept.read_text() != "kept":
                told = f"outside changed: {list(listing(outside))}"
                outcome = Finding(job, f"{job.target}: outside changed", told)
            elif self._noise.exists() and self._noise.stat().st_size > heard:
                with self._noise.open("rb") as file:
                    file.seek(heard)
                    told = file.read().decode(errors="replace")
                for word in ("panicked", "terminate called", "Traceback", "ERROR", "LOG("):
                    if word in told:
                        outcome = Finding(job, f"{job.target}: printed {word}", told[:2000])
        shutil.rmtree(folder, ignore_errors=True)
        return outcome

    def _outcome(self, job: Job, case: Any) -> Outcome:
        from brain.errors import Refused

        try:
            self._targets[job.target](case)
        except Refused as refusal:
            told = str(refusal)
            one_line = told and "\n" not in told and told.isprintable()
            if one_line and len(told) <= LONGEST_MESSAGE:
                return REFUSED
            return Finding(job, f"{job.target}: not one line", repr(told)[:500])
        except BaseException as error:  # a panic of a Rust library is no Exception
            return Finding(job, _key(job, error), _trace(error))
        return TAKEN


def _trace(error: BaseException) -> str:
    lines = traceback.format_exception(error)
    told = [*lines[:2], "…\n", *lines[-8:]] if len(lines) > 10 else lines
    return "".join(told)[-4000:]


def _key(job: Job, error: BaseException) -> str:
    """Target, kind of error, and the innermost place in this program where it passed."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if "/brain/" in name or "/compiled/" in name:
            place = f"{'/'.join(Path(name).parts[-2:])}:{line}"
    kind = type(error).__name__
    if isinstance(error, AssertionError) and not place:
        place = str(error)[:40]
    return f"{job.target}: {kind} at {place}"


def _address_space() -> int:
    """Bytes of address space this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def stop_with_parent() -> None:
    """Has Linux end this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(1, 9)
