"""I12: ticks leave no tensor behind, and nothing moves."""

import gc

import pytest
from torch import Tensor

from brain import Brain
from compiled.state import addresses
from histories import IDS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]


def live_tensors() -> tuple[int, int]:
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) is Tensor]
    return len(found), sum(tensor.nbytes for tensor in found)


def test_I12_ticks_leave_no_tensor_behind(either_brain: Brain) -> None:
    """What 20 ticks hold, 320 hold too; nobody asks for their text, which is the worst case."""
    b = either_brain
    b.prime(IDS[:20])
    for _ in range(20):
        b.tick()
    before, where = live_tensors(), addresses(b.state)
    for _ in range(300):
        b.tick()
    assert live_tensors() == before
    assert addresses(b.state) == where
    assert len(b) == 24
