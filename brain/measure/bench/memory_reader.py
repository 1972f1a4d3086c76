"""The machine's memory limit: how fast as many bytes as a token needs can be read at all."""

import contextlib
import ctypes
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from brain.errors import Refused
from brain.machine.cpu_operator import built_library, cpp_compiler
from compiled import large_pages

REPEATS = 10
WORD, BLOCK = 8, 256
"""The buffer is a whole number of blocks of so many bytes, each a whole number of words."""

SOURCE = Path(__file__).with_name("sweep.cpp")

ORDINARY = 0x3F803F803F803F80
"""Read as any of the types: ordinary numbers about 1, on which no processor is slow."""


def read_memory(size: int, device: torch.device) -> tuple[list[float], str]:
    """Seconds of each reading of ``size`` bytes with all threads, and the operation that was
    fastest on this machine. All of them read every byte once and keep one number.
    """
    count = max(1, size // BLOCK) * BLOCK // WORD
    words = large_pages.zeros((count,), torch.int64, device).fill_(ORDINARY)
    readers: dict[str, Callable[[], object]] = {
        "sum of int64": words.sum,
        "sum of float32": words.view(torch.float32).sum,
        "sum of bfloat16": words.view(torch.bfloat16).sum,
        "largest float32": words.view(torch.float32).amax,
    }
    if device.type == "cpu":
        with contextlib.suppress(Refused, OSError):  # without a compiler, the others must do
            readers["sweep.cpp"] = _sweep(words)
    trials = {name: _seconds(read, 3, device)[1:] for name, read in readers.items()}
    fastest = min(trials, key=lambda name: min(trials[name]))
    return _seconds(readers[fastest], REPEATS, device), fastest


def copy_memory(size: int, device: torch.device) -> list[float]:
    """Seconds of each copying of ``size`` bytes, which reads as many and writes as many."""
    source = large_pages.zeros((max(1, size // WORD),), torch.int64, device).fill_(ORDINARY)
    copied = torch.empty_like(source)
    _seconds(lambda: copied.copy_(source), 3, device)
    return _seconds(lambda: copied.copy_(source), REPEATS, device)


def _sweep(words: torch.Tensor) -> Callable[[], int]:
    """A loop of our own: those of PyTorch wait for memory where they could ask for it before."""
    library = ctypes.CDLL(str(built_library(SOURCE, cpp_compiler())))
    library.sweep.restype = ctypes.c_int64
    address = ctypes.c_void_p(words.data_ptr())
    size, threads = ctypes.c_int64(words.nbytes), ctypes.c_int64(torch.get_num_threads())
    return lambda: int(library.sweep(address, size, threads))


def _seconds(read: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Of each reading. On a GPU as the device times them: a host's wait for each would count as
    reading, and is longer than a small model takes.
    """
    if device.type == "cuda":
        return _device_seconds(read, repeats, device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return seconds


def _device_seconds(read: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    stream = torch.cuda.current_stream(device)
    read()  # something to be busy with while the rest is sent
    marks = []
    for _ in range(repeats + 1):
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record(stream)
        marks.append(mark)
        if len(marks) <= repeats:
            read()
    stream.synchronize()
    return [one.elapsed_time(other) / 1e3 for one, other in pairwise(marks)]
