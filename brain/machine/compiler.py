"""What goes wrong in PyTorch's compiler and the C++ compiler that it calls, in one line each."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from brain.errors import Refused
from compiled import torch_private
from compiled.capture import NotCaptured

SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
FULL_DISK = ("No space left on device", "Disk quota exceeded", "File too large")
REMEDIES = {
    **dict.fromkeys(FULL_DISK, "free some space there, or choose another cache folder"),
    "Python.h": "install the headers of this Python (python3-dev)",
    "No working C++ compiler": "install g++, or name another one by CXX",
}
"""By what the reason holds."""


def require_capture() -> None:
    """Raises Refused where the environment has PyTorch compile nothing: all would run uncaptured,
    unnoticed.
    """
    for switch in SWITCHES:
        if os.environ.get(switch) == "1":
            raise Refused(f"{switch}=1 leaves nothing compiled: unset it, or use engine=eager")


@contextmanager
def capturing(graph: str) -> Iterator[None]:
    """Within this a graph is captured. Raises Refused, with the reason and what helps, where the
    compiler fails.
    """
    failures: tuple[type[Exception], ...] = (NotCaptured, torch_private.compiler_error())
    try:
        yield
    except failures as error:
        cause = getattr(error, "inner_exception", error)  # of a backend's
        reason = complaint(f"{type(cause).__name__}: {cause}")
        helps = (remedy for sign, remedy in REMEDIES.items() if sign in reason)
        remedy = "".join(f"{remedy}, or " for remedy in helps) + "use engine=eager"
        raise Refused(f"the graph {graph!r} cannot be compiled ({reason}): {remedy}") from error


def complaint(output: str) -> str:
    """The line in which a compiler says why it failed: at most 200 characters, never empty."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    signs = (*FULL_DISK, "fatal error:", "error:", "cannot find", "Error", "error")
    for sign in signs:
        for line in lines:
            if sign in line and not line.startswith(("collect2:", "CppCompileError:")):
                return line[:200]
    return lines[0][:200] if lines else "without a reason"
