"""Proof that files are as they were written: SHA-256, and a manifest of a folder's files.

A manifest is ``manifest.json`` in the folder: size and SHA-256 of each file, by its path there.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from brain.files import RECORD_BYTES, open_plain, read_json
from brain.machine.progress import progress_bar

CHUNK = 1 << 22
MANIFEST = "manifest.json"


class Entry(NamedTuple):
    """What a manifest says of a file."""

    size: int  # bytes
    sha256: str  # 64 hex digits


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Records these files as they are now, in one step. Raises OSError."""
    files = {}
    for name in sorted(names):
        path = folder / name
        files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    partial = folder / f"{MANIFEST}.{os.getpid()}"
    try:
        partial.write_text(json.dumps({"files": files}, indent=2) + "\n", "utf-8")
        to_disk(partial)
        partial.replace(folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What was recorded. Raises OSError if it cannot be read, ValueError if it is damaged."""
    try:
        files = read_json(folder / MANIFEST, RECORD_BYTES)["files"]
        entries = {name: Entry(of["size"], of["sha256"]) for name, of in files.items()}
        sound = all(type(e.size) is int and isinstance(e.sha256, str) for e in entries.values())
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{folder / MANIFEST} is not a manifest")
    return entries


def is_as_recorded(path: Path, entry: Entry, digest_below: float = float("inf")) -> bool:
    """Whether a file is as recorded. The content of files above ``digest_below`` bytes is not read.
    Raises OSError.
    """
    if path.stat().st_size != entry.size:
        return False
    return entry.size > digest_below or file_sha256(path) == entry.sha256


def file_sha256(path: Path, *, progress: bool = False) -> str:
    """The SHA-256 of a file's content, 64 hex digits. Raises OSError."""
    digest = hashlib.sha256()
    size, what = path.stat().st_size, f"hashing {path.name}"
    options = {"unit_scale": True, "leave": False, "disable": not progress}
    with open_plain(path) as file, progress_bar(what, size, "B", **options) as bar:
        while block := file.read(CHUNK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def files_sha256(paths: Sequence[Path], *, progress: bool = False) -> str:
    """One digest for a set of files: a single file's own, else that of their sorted digests."""
    digests = sorted(file_sha256(path, progress=progress) for path in paths)
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def to_disk(path: Path) -> None:
    """Waits until a file, or the list of files in a folder, would survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be synchronised there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
