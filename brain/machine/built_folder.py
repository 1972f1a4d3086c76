"""Folders that are built once and then reused: complete or absent, never half-written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from brain.errors import Refused, one_line
from brain.files import read_json
from brain.machine.digest import file_sha256

MANIFEST = "manifest.json"
SMALL = 16 << 20


def ensure_built(folder: Path, build: Callable[[Path], None]) -> Path:
    """The folder, building it first where it is absent or damaged.

    ``build`` fills an empty folder beside the final one, which then takes its place by renaming;
    a manifest records every file's size and SHA-256. Two processes at once build it once. Whatever
    interrupts the building, no part of it stays. Raises Refused where the disk refuses.
    """
    if is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not is_intact(folder):  # another process may have built it meanwhile
                _build(folder, build)
    except OSError as error:
        raise Refused(
            f"{folder}: cannot be written ({one_line(error)}); free some space there, "
            "or choose another cache folder"
        ) from None
    return folder


def is_intact(folder: Path) -> bool:
    """Whether the folder has every file of its manifest: sizes, and digests of small files.

    Milliseconds: large files are not read.
    """
    try:
        for name, entry in read_manifest(folder).items():
            path = folder / name
            if path.stat().st_size != entry["size"]:
                return False
            if entry["size"] <= SMALL and file_sha256(path) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, as recorded when the folder was built."""
    files: dict[str, dict[str, Any]] = read_json(folder / MANIFEST)["files"]
    return files


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    """Builds and puts in place. The caller holds the lock."""
    prefix = f".{folder.name}."
    for left in folder.parent.glob(f"{prefix}*.partial"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed outright
    partial = folder.parent / f"{prefix}{os.getpid()}.partial"
    try:
        partial.mkdir()
        build(partial)
        _seal(partial)
        if folder.exists():
            folder.rename(folder.parent / f"{prefix}{os.getpid()}.old.partial")
        partial.rename(folder)
        _sync(folder.parent)
    finally:
        for left in folder.parent.glob(f"{prefix}*.partial"):
            shutil.rmtree(left, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Writes the manifest and syncs everything to disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", "utf-8")
    _sync(manifest)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
