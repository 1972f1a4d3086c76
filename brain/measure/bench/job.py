"""What one process is asked to time, and asking it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

WARM_UP_TOKENS = 5
"""Decoded and discarded before the tokens that are timed."""


class Failed(Exception):
    """A process that ended without a result; its message is one line saying why."""


@dataclass(frozen=True)
class Job:
    """What to time. Sent to the process as JSON."""

    engine: str  # one of contestants.ENGINES, or contestants.MEMORY
    precision: str  # one of contestants.PRECISIONS, or that of a GGUF file
    folder: str | None  # transformers: the model, in Hugging Face's layout
    device: str
    threads: int
    capacity: int
    counts: list[int] = field(default_factory=list)  # rows remembered while decoding, each timed
    tokens: int = 0  # decoded at each count
    prefill: int = 0  # tokens of a prompt to time; 0: none
    overrides: list[str] = field(default_factory=list)  # ours: the configuration, engine and all
    smallest_bucket: int | None = None  # ours: null for the configuration's own
    capture_all: bool = True  # ours: every graph of ticks, and before the first token
    gguf: str | None = None  # llama.cpp: its file of the model
    bytes: int = 0  # memory: how many to read
    weight_bytes: int = 0  # of others than ours: what a token reads of their weights
    row_bytes: int = 0  # of others than ours: what it reads of each remembered row


Waiting = Callable[[], object]
"""Called again and again while a process is waited for."""


def result_of(job: Job, waiting: Waiting = lambda: None) -> dict[str, Any]:
    """What the process of a job measured. Raises Failed."""
    arguments = [sys.executable, "-m", "brain.measure.bench.timed", json.dumps(asdict(job))]
    with started(arguments, subprocess.PIPE) as process:
        while True:
            try:
                out, errors = process.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                waiting()
    check_status(process.returncode, errors)
    try:
        result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise Failed("it printed no result") from None
    return result


@contextmanager
def started(arguments: Sequence[str], stderr: int | IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the code that is running here, whatever is installed. It does not outlive the
    ``with`` statement.
    """
    found = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))}
    with subprocess.Popen(
        arguments,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def check_status(status: int, errors: bytes) -> None:
    """Raises Failed with the last line of its standard error for a process that did not succeed."""
    if status < 0:
        raise Failed(f"killed by {signal.Signals(-status).name}")
    lines = errors.decode(errors="replace").strip().splitlines()
    if status > 0:
        raise Failed(lines[-1].removeprefix("refused: ") if lines else "it printed no error")
