"""Locks on files, between processes: held by one, or shared by several.

A lock is the operating system's. It ends with the process, however that ends.
"""

import math
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

POLL = 0.05
"""Seconds between two attempts."""


@contextmanager
def exclusive(path: Path, patience: float = math.inf) -> Iterator[None]:
    """Holds the lock alone, within a ``with`` statement.

    Args:
        path: A file that is there for the lock; it is made where it is absent, and stays.
        patience: Seconds to wait while somebody else has the lock.
    Raises:
        TimeoutError: Somebody else still has it.
        OSError: The file cannot be opened or locked, or is a link or not a plain file.
    """
    deadline = time.monotonic() + patience
    while True:
        with _opened(path) as descriptor:
            if _try_alone(descriptor) and _is_there(path, descriptor):
                try:
                    yield
                    return
                finally:
                    _unlock(descriptor)
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{path} is locked by another process")
        time.sleep(POLL)


@contextmanager
def shared(path: Path) -> Iterator[Callable[[], AbstractContextManager[bool]]]:
    """Holds the lock together with any number of others, within a ``with`` statement.

    Args:
        path: As for :func:`exclusive`.
    Returns:
        A function that makes a context manager. Entering that tells whether nobody else holds the
        lock now; if so, nobody can until it is left. On Windows, which cannot share locks, it
        always says no.
    Raises:
        OSError: The file cannot be opened or locked, or is a link or not a plain file.
    """
    if sys.platform == "win32":
        yield lambda: nullcontext(False)
        return
    with _opened(path) as descriptor:

        @contextmanager
        def alone() -> Iterator[bool]:
            try:
                yield _try_alone(descriptor)
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_SH)

        fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            yield alone
        finally:
            _unlock(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The file, made where it is absent. A link is not followed; a pipe does not block."""
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOINHERIT"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a plain file")
        yield descriptor
    finally:
        os.close(descriptor)


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether the file that was locked is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _try_alone(descriptor: int) -> bool:
    """Takes the lock alone, unless somebody else has it."""
    if sys.platform == "win32":
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:  # how Windows says that it is taken
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    if sys.platform != "win32":  # closing the file does it there
        fcntl.flock(descriptor, fcntl.LOCK_UN)
