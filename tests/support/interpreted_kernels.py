"""Tests that run Triton kernels: on a GPU, or where there is none on Triton's interpreter, in a
process of its own, since Triton must know of it before it is imported.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compiled.kernel_launch import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


class KernelTests:
    """The tests of one file. Used as a decorator, it puts a test under the ``gpu`` marker unless
    kernels are interpreted.
    """

    def __init__(self) -> None:
        self._names: list[str] = []

    def __call__(self, test: Callable[..., None]) -> Callable[..., None]:
        self._names.append(test.__name__)
        lacking = not INTERPRETED and not torch.cuda.is_available()
        marks = [
            pytest.mark.skipif(lacking, reason="neither a GPU nor Triton's interpreter"),
            pytest.mark.usefixtures("one_thread"),
            *([] if INTERPRETED else [pytest.mark.gpu]),
        ]
        for mark in marks:
            test = mark(test)
        return test

    def pass_interpreted(self, file: str) -> None:
        """Runs the file again, where Triton interprets; each of them must pass, not be skipped."""
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:xdist", "-p", "no:cacheprovider"]
        ran = subprocess.run(
            [*command, "-m", "not gpu", file],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
        for name in self._names:
            assert re.search(rf"::{name}(\[.*\])? PASSED", ran.stdout), name
