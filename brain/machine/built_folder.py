"""Folders that are built once and then reused: complete or absent, never half-written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from brain.errors import Refused, one_line
from brain.machine.integrity import is_as_recorded, read_manifest, to_disk, write_manifest
from brain.machine.lock import exclusive

SMALL = 16 << 20
"""Bytes. Larger files are checked by size alone: a digest would take seconds at every start."""


def ensure_built(folder: Path, build: Callable[[Path], None]) -> Path:
    """Builds a folder where it is absent or damaged, and returns it. Raises Refused. ``build``
    fills an empty folder beside it, which is then renamed. Two processes at once build it once.
    Whatever interrupts the building, no part of it stays.
    """
    if is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.parent / f".{folder.name}.lock"):
            if not is_intact(folder):  # another process may have built it meanwhile
                _build(folder, build)
    except OSError as error:
        raise Refused(
            f"{folder}: cannot be written ({one_line(error)}); free some space there, "
            "or choose another cache folder"
        ) from None
    return folder


def is_intact(folder: Path) -> bool:
    """Whether the folder has every file of its manifest: sizes, and digests of small files."""
    try:
        recorded = read_manifest(folder)
        return bool(recorded) and all(
            is_as_recorded(folder / name, recorded[name], SMALL) for name in recorded
        )
    except (OSError, ValueError):
        return False


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    """Builds and puts in place. The caller holds the lock."""
    prefix = f".{folder.name}."
    for left in folder.parent.glob(f"{prefix}*.partial"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed outright
    partial = folder.parent / f"{prefix}{os.getpid()}.partial"
    try:
        partial.mkdir()
        build(partial)
        files = list(partial.iterdir())
        write_manifest(partial, [path.name for path in files])
        for path in (*files, partial):
            to_disk(path)
        if folder.exists():
            folder.rename(folder.parent / f"{prefix}{os.getpid()}.old.partial")
        partial.rename(folder)
        to_disk(folder.parent)
    finally:
        for left in folder.parent.glob(f"{prefix}*.partial"):
            shutil.rmtree(left, ignore_errors=True)
