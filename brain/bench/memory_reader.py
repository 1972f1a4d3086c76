"""The machine's memory limit: how fast as many bytes as a token needs can be read at all."""

import time
from collections.abc import Callable

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
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        read()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds
