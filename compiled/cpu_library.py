"""Functions of a library built from this package's C++, as PyTorch's compiler knows them.

This module knows a built library. Where it comes from, and what its functions compute, is not its
business.
"""

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

_NAMESPACE = "positronic_brain"
_DEFINING = threading.Lock()  # two threads may open the same model at once


class Libraries(NamedTuple):
    """Libraries that stand for parts of the engine, as built for this processor."""

    read: Path  # ``read_cpu.cpp``, for the model's ``formats``
    draw: Path  # ``draw_cpu.cpp``
    tick: Path  # ``tick_cpu.cpp``, for ticks that nothing captures


def load(library: Path, arguments: type[ctypes.Structure]) -> ctypes.CDLL:
    """Loads a library.

    Args:
        library: As built for this processor; its ``arguments_size`` says what it takes.
        arguments: What it is going to be passed.
    Raises:
        OSError: It cannot be loaded, or takes other arguments than it would be passed.
    """
    loaded = ctypes.CDLL(str(library))
    loaded.arguments_size.restype = ctypes.c_int64
    taken, passed = loaded.arguments_size(), ctypes.sizeof(arguments)
    if taken != passed:
        source = library.stem.rpartition("-")[0]
        raise OSError(
            f"{library.name} takes {taken} bytes of arguments, but {source}.py passes {passed}: "
            f"{source}.cpp and {source}.py must be of one version"
        )
    return loaded


def defined(
    library: Path,
    loaded: ctypes.CDLL,
    schema: str,
    run: Callable[..., Any],
    allocated: Callable[..., Any],
) -> Callable[..., Any]:
    """The function of a library as an operator that the compiler takes for one opaque call.

    Its name holds the library's, which says what was built and how, so that no compiler's cache
    takes one for another; of two copies of a library, one will do.

    Args:
        library: As :func:`load` was given it.
        loaded: What that returned.
        schema: Of the operator, as PyTorch writes it, without a name.
        run: Calls it: the library, then what the schema says.
        allocated: Tensors like its results, of what the schema says.
    """
    name = library.stem.replace("-", "_")
    with _DEFINING:
        if not hasattr(getattr(torch.ops, _NAMESPACE), name):
            torch.library.define(f"{_NAMESPACE}::{name}", schema)
            torch.library.register_fake(f"{_NAMESPACE}::{name}", allocated)
            torch.library.impl(f"{_NAMESPACE}::{name}", "cpu", functools.partial(run, loaded))
    found: Callable[..., Any] = getattr(getattr(torch.ops, _NAMESPACE), name).default
    return found
