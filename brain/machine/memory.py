"""Memory of the machine: how much is free, when garbage is collected, giving freed memory back."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def without_collection() -> Iterator[None]:
    """Turns garbage collection off within a ``with`` statement. Loading a vocabulary, importing a
    compiler and tracing with it make a million objects that stay. Each collection among them takes
    tenths of a second and finds nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def give_back_freed() -> None:
    """Gives freed memory back to the system. The GNU C library keeps what lies between pieces in
    use: tens of megabytes after a vocabulary has been read. Other libraries have no such call.
    """
    with suppress(AttributeError, OSError, TypeError):  # no call, no library, no way to name it
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes(device: "torch.device") -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not report it."""
    if device.type == "cuda":
        import torch

        # PyTorch keeps what was given back to it, and gives it out again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
