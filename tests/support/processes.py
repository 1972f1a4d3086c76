"""``brain`` as its users run it: a process of its own, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def command(tiny_folder: Path, *arguments: str) -> list[str]:
    """``brain`` on the tiny model."""
    model = ["model=folder", f"model.path={tiny_folder}"]
    return [sys.executable, "-m", "brain.app", *model, *arguments]


def call(
    where: Path, tiny_folder: Path, *arguments: str, status: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(tiny_folder, *arguments),
        cwd=where,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done
