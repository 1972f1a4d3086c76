"""What one process is asked to time, and asking it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WARM_UP_TOKENS = 5
"""Decoded and discarded before the tokens that are timed."""


class Failed(Exception):
    """A process that ended without a result; its message is one line saying why."""


@dataclass(frozen=True)
class Job:
    """What to time. Sent to the process as JSON."""

    engine: str  # one of contestants.ENGINES, or contestants.MEMORY
    precision: str  # one of contestants.PRECISIONS
    folder: str  # the model, in Hugging Face's layout
    device: str
    threads: int
    capacity: int
    counts: list[int] = field(default_factory=list)  # rows remembered while decoding, each timed
    tokens: int = 0  # decoded at each count
    prefill: int = 0  # tokens of a prompt to time; 0: none
    overrides: list[str] = field(default_factory=list)  # ours: the configuration
    smallest_bucket: int | None = None  # ours: null for the configuration's own
    capture_all: bool = True  # ours: every graph, and before the first token
    gguf: str | None = None  # llama.cpp: its file of the model
    bytes: int = 0  # memory: how many to read


def result_of(job: Job) -> dict[str, Any]:
    """What the process of a job measured. Raises Failed."""
    arguments = [sys.executable, "-m", "brain.measure.bench.timed", json.dumps(asdict(job))]
    # The code that is running here, whatever is installed.
    found = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        arguments,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode < 0:
        raise Failed(f"killed by {signal.Signals(-done.returncode).name}")
    errors = done.stderr.strip().splitlines()
    if done.returncode > 0:
        raise Failed(errors[-1].removeprefix("refused: ") if errors else "it printed no error")
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise Failed("it printed no result") from None
    return result
