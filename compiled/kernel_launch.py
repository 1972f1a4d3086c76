"""How Triton kernels are started, and how operators that start them are known to PyTorch.

Scratch of a memory is no argument of its operators, or the compiler would take it for a result:
they are told a number instead, by which what the memory has is found.

This module knows no kernel, no model and no memory. Where ``TRITON_INTERPRET=1`` is set, kernels
run on a CPU, for tests.
"""

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run on a CPU, one program after another."""

STAGES = 2
"""Blocks of keys and values that are on their way at a time: more would not fit into the shared
memory of smaller GPUs, in float32."""

_NAMESPACE = "positronic_brain"
_LOCK = threading.Lock()  # two threads may open models at once

Bound = TypeVar("Bound")


def power_of_two(number: int) -> int:
    """The least one that is not below a number of at least 1."""
    return 1 << (number - 1).bit_length()


class Launch(NamedTuple):
    """One kernel as it is started."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # tensors and numbers
    constants: dict[str, Any]
    num_warps: int


def start(launch: Launch, *, overlaps: bool) -> None:
    """Starts a kernel; with ``overlaps`` it may begin before the one that was started before it has
    ended.
    """
    options: dict[str, Any] = {}
    if not INTERPRETED:
        options = {"num_warps": launch.num_warps, "num_stages": STAGES}
    if overlaps:
        options["launch_pdl"] = True
    launch.kernel[launch.grid](*launch.arguments, **launch.constants, PDL=overlaps, **options)


class Launcher:
    """Starts the kernels of operators on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._overlaps = device.type == "cuda" and (
            torch.cuda.get_device_capability(device) >= (9, 0)
        )

    def start_all(self, launches: Sequence[Launch]) -> None:
        """Starts them in order. Those behind the first may overlap with the one before them."""
        # Triton starts kernels on the current device, whatever they are given.
        with nullcontext() if self._device is None else torch.cuda.device(self._device):
            for count, launch in enumerate(launches):
                # An ordinary start first: what was written before the operator must be there.
                start(launch, overlaps=self._overlaps and count > 0)


class Bindings(dict[int, Bound]):
    """What the operators of each memory have, by its number."""

    def bind(self, bound: Bound) -> int:
        """A number for it."""
        with _LOCK:
            number = next(n for n in itertools.count() if n not in self)
            self.update({number: bound})
        return number

    def keep_for(self, user: object, number: int) -> None:
        """Lets it go when nobody can use it any more."""
        weakref.finalize(user, self.pop, number, None)


def operator(name: str, schema: str, run: Callable[..., Any], allocated: Callable[..., Any]) -> Any:
    """An operator as PyTorch knows it, made when it is first asked for.

    Args:
        name: Of the operator.
        schema: What it takes, returns and writes, in PyTorch's language.
        run: What it does.
        allocated: Room for its results, of the same arguments.
    """
    qualified = f"{_NAMESPACE}::{name}"
    with _LOCK:
        if not hasattr(getattr(torch.ops, _NAMESPACE), name):
            torch.library.define(qualified, schema)
            torch.library.register_fake(qualified, allocated)
            torch.library.impl(qualified, "cpu" if INTERPRETED else "cuda", run)
        return getattr(getattr(torch.ops, _NAMESPACE), name).default
