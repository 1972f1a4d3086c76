"""The way of one plain token, counted."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import brain
import compiled
from fixture_types import OpenTiny

OURS = tuple(str(Path(str(package.__file__)).parent) for package in (brain, compiled))
GRAPHS = Path(str(compiled.__file__)).with_name("graphs.py")
MOST = 10
"""Functions from ``Brain.speak`` to the kernel."""


def test_a_plain_token_is_ten_functions_from_the_kernel(open_tiny: OpenTiny) -> None:
    """From ``Brain.speak`` to the first matrix product, and the graph set is entered once a call.

    Counted over one eager tick: the functions of ours on the stack when the first product of a
    layer begins, and every entry into ``graphs.py`` from elsewhere.
    """
    b = open_tiny(engine="eager", capacity=64)
    b.prime([5, 6, 7, 8])
    b.speak()
    ways: list[list[str]] = []
    entered: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(OURS):
            return
        file = Path(frame.f_code.co_filename).name
        if file == "graphs.py" and frame.f_back and frame.f_back.f_code.co_filename != str(GRAPHS):
            entered[frame.f_code.co_name] += 1
        if file == "linear.py" and frame.f_code.co_name == "linear" and not ways:
            way: list[str] = []
            at: FrameType | None = frame
            while at is not None:
                if at.f_code.co_filename.startswith(OURS):
                    way.append(f"{Path(at.f_code.co_filename).name}:{at.f_code.co_name}")
                at = at.f_back
            ways.append(way[::-1])

    sys.setprofile(watch)
    try:
        b.speak()
    finally:
        sys.setprofile(None)
    (way,) = ways
    assert way[0] == "brain.py:speak"
    assert way[-1] == "linear.py:linear"
    assert len(way) <= MOST, way
    assert entered == {"begin_step": 1, "step": 1, "patch": 1}
