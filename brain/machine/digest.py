"""SHA-256 of files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from brain.files import open_plain

CHUNK = 1 << 22


def file_sha256(path: Path, *, progress: bool = False) -> str:
    """The digest of a file's content in hex; with ``progress``, a bar on standard error."""
    digest = hashlib.sha256()
    bar = tqdm(
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
        desc=f"hashing {path.name}",
        leave=False,
        disable=not progress,
    )
    with open_plain(path) as file, bar:
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
