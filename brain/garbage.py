"""When Python looks for garbage that reference counts do not find."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
