"""One process writes into a run folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from brain.errors import Refused, one_line
from brain.files import require_own

LOCK = ".lock"
PATIENCE = 0.2
"""Seconds: somebody may be looking whether the folder is taken."""


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds a run folder for one process. Raises Refused if another one has it.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    require_own([folder / LOCK])
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise Refused(
            f"{folder} belongs to a brain that is running: wait for it, send it commands "
            "(task=command), or choose another folder with hydra.run.dir"
        ) from None
    except OSError as error:
        raise Refused(f"{folder} cannot be locked ({one_line(error)})") from None
    try:
        yield
    finally:
        lock.release()


def is_taken(folder: Path) -> bool:
    """Whether a process holds the run folder just now."""
    require_own([folder / LOCK])
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError as error:
        raise Refused(f"{folder} cannot be looked at ({one_line(error)})") from None
