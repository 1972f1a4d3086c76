"""Locks on files, between processes: held by one, or shared by several.

A lock is the operating system's. It ends with the process, however that ends.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

POLL = 0.05  # seconds between two attempts


@contextmanager
def exclusive(path: Path, patience: float = math.inf) -> Iterator[None]:
    """Holds the lock alone, within a ``with`` statement.

    The file is there for the lock alone; it is made where it is absent, and stays. Raises OSError,
    and TimeoutError if another process still has the lock after ``patience`` seconds.
    """
    with path.open("ab") as file:
        deadline = time.monotonic() + patience
        while not _try_alone(file):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{path} is locked by another process")
            time.sleep(POLL)
        try:
            yield
        finally:
            _unlock(file)


@contextmanager
def shared(path: Path) -> Iterator[Callable[[], AbstractContextManager[bool]]]:
    """Holds the lock together with any number of others, within a ``with`` statement.

    Gives a function that makes a context manager. Its value is whether no other process holds the
    lock now; if so, none can until it is left. On Windows, which cannot share locks, it is always
    False. Raises OSError.
    """
    if sys.platform == "win32":
        yield lambda: nullcontext(False)
        return
    with path.open("ab") as file:

        @contextmanager
        def alone() -> Iterator[bool]:
            yield _try_alone(file)
            fcntl.flock(file, fcntl.LOCK_SH)

        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            yield alone
        finally:
            _unlock(file)


def _try_alone(file: IO[Any]) -> bool:
    """Takes the lock alone, unless another process has it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # how each system says that it is taken
        return False
    return True


def _unlock(file: IO[Any]) -> None:
    if sys.platform != "win32":  # closing the file does it there
        fcntl.flock(file, fcntl.LOCK_UN)
