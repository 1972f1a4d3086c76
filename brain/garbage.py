"""When Python looks for garbage that reference counts do not find, and where freed memory goes."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def without_collection() -> Iterator[None]:
    """Within this nothing is collected: for work that makes a million objects to keep, as loading
    a vocabulary, importing a compiler and tracing with it do. Each search among them takes tenths
    of a second and finds nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def give_back_freed() -> None:
    """Gives what has been freed back to the system. The GNU C library keeps what lies between
    pieces in use; after a vocabulary has been read those are tens of megabytes. Other libraries
    have no such call and are left alone.
    """
    with suppress(AttributeError, OSError, TypeError):  # no call, no library, no way to name it
        ctypes.CDLL(None).malloc_trim(0)
