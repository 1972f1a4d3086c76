"""Processes in a world of their own: mounts that nobody else sees, and a user whom nobody knows."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest


def mounting(setup: str, *command: str) -> list[str]:
    """The command, in a world in which a line of shell has mounted something. Skips the test where
    that is not permitted.
    """
    _require("--map-root-user", "--mount")
    script = f'set -e; {setup}; exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command]


def as_nobody(*command: str) -> list[str]:
    """The command, as a user without a name. Skips the test where that is not permitted."""
    _require("--map-user=4321")
    return ["unshare", "--map-user=4321", *command]


def read_only(folder: Path) -> str:
    """A line of shell that makes a folder read-only."""
    return f"mount --bind '{folder}' '{folder}'; mount -o remount,ro,bind '{folder}'"


@functools.cache
def _refusal(*options: str) -> str:
    """Why there can be no such world; empty where there can."""
    if sys.platform != "linux":
        return "only Linux has namespaces"
    try:
        tried = subprocess.run(
            ["unshare", *options, sys.executable, "-c", ""], capture_output=True, text=True
        )
    except OSError as error:
        return str(error)
    return tried.stderr if tried.returncode else ""


def _require(*options: str) -> None:
    if reason := _refusal(*options):
        pytest.skip(f"this machine does not let a user make a namespace: {reason.strip()}")
