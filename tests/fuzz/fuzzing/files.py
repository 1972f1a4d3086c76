"""What may stand in a folder in the place of a file, and whether anything else was touched."""

import os
import socket
from pathlib import Path
from random import Random

from fuzzing.blind import damaged

HUGE = 1 << 41
"""Bytes of a file that takes none on the disk."""


def something_else(path: Path, outside: Path, rng: Random) -> None:
    """Puts anything but what is expected in the place of a file (or folder)."""
    content = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        path.rename(path.with_name("moved"))
    else:
        path.unlink(missing_ok=True)
    match rng.randrange(13):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path.name)
        case 4:
            path.symlink_to(outside / "missing")
        case 5:
            path.symlink_to(outside / "kept.txt")
        case 6:
            path.symlink_to(outside)
        case 7:
            path.write_bytes(b"")
        case 8:
            with path.open("wb") as file:
                file.write(content)
                file.truncate(HUGE)
        case 9:
            path.symlink_to("/dev/full")
        case 10:
            with socket.socket(socket.AF_UNIX) as listener:
                here = os.getcwd()
                os.chdir(path.parent)  # the path of a socket must be short
                listener.bind(path.name)
                os.chdir(here)
        case 11:
            path.write_bytes(damaged(content, rng))
        case _:
            path.symlink_to("/proc/self/mem")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder, with its kind and size. Links are not followed."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            size = 0 if name in folders else status.st_size
            found[os.path.relpath(path, folder)] = (status.st_mode, size)
    return found
