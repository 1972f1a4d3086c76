"""Memory of the machine: how much is free, when garbage is collected, what is given back."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


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


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None on a system that does not say."""
    if device.type == "cuda":
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has no memory left for what was tried."""
    return isinstance(error, torch.OutOfMemoryError)
