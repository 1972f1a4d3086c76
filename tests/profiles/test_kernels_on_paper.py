"""What a tick with kernels of our own starts on a GPU, as the compiler writes it here."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import ENVIRONMENT

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "profiles" / "kernels_on_paper.py"), "smollm2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["smollm2"]
    return found


def test_a_tick_is_two_graphs_of_at_most_200_kernels(told: dict[str, Any]) -> None:
    """Of SmolLM2: six for each of thirty layers, the head, and a handful for choice and patch."""
    step, patch = told["graphs"].values()
    assert step["read_cuda"] == 6 * 30 + 1
    assert step["draw_cuda"] + step["cull_cuda"] + step["not_finite_cuda"] == 7
    assert 0 < step["compiler"] <= 7
    assert patch == {"compiler": 0, "library": 0, "patch_cuda": 2}
    assert told["kernels"] == sum(step.values()) + sum(patch.values()) <= 200


def test_the_patch_of_an_edit_moves_the_rows_that_it_touches(told: dict[str, Any]) -> None:
    """As many rows as it may append or erase, never the cache, of which nothing is copied."""
    edit = told["edit"]
    assert 0 < edit["kernels"] <= 25
    assert edit["library"] == 0
    touched = 2 * edit["width"] * edit["row"]
    assert touched <= edit["largest_buffer"] < 2 * touched
    assert edit["largest_buffer"] < edit["slots"] * edit["row"] / 8
