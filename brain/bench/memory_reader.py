"""The machine's memory limit: how fast as many bytes as a token needs can be read at all."""

import time
from collections.abc import Callable
from itertools import pairwise

import torch

REPEATS = 10
WORD = 8
"""The buffer is a whole number of these bytes."""

ORDINARY = 0x3F803F803F803F80
"""Read as any of the types: ordinary numbers about 1, on which no processor is slow."""


def read_memory(size: int, device: torch.device) -> tuple[list[float], str]:
    """Seconds of each reading of ``size`` bytes with all threads, and the operation that was
    fastest on this machine. All of them read every byte once and keep one number.
    """
    words = torch.full((max(1, size // WORD),), ORDINARY, dtype=torch.int64, device=device)
    readers: dict[str, Callable[[], torch.Tensor]] = {
        "sum of int64": words.sum,
        "sum of float32": words.view(torch.float32).sum,
        "sum of bfloat16": words.view(torch.bfloat16).sum,
        "largest float32": words.view(torch.float32).amax,
    }
    trials = {name: _seconds(read, 3, device)[1:] for name, read in readers.items()}
    fastest = min(trials, key=lambda name: min(trials[name]))
    return _seconds(readers[fastest], REPEATS, device), fastest


def _seconds(read: Callable[[], torch.Tensor], repeats: int, device: torch.device) -> list[float]:
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


def _device_seconds(
    read: Callable[[], torch.Tensor], repeats: int, device: torch.device
) -> list[float]:
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
