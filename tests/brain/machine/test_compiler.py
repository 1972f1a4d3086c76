"""One line for what compilers say in a hundred."""

import pytest

from brain.errors import Refused
from brain.machine.compiler import capturing, complaint
from compiled.capture import NotCaptured

OUTPUTS = {
    "g++: warning: x\na.cpp:3:10: fatal error: Python.h: No such file\ncompilation terminated.": (
        "a.cpp:3:10: fatal error: Python.h: No such file"
    ),
    "/bin/ld: cannot find -lgomp: No such file\ncollect2: error: ld returned 1 exit status": (
        "/bin/ld: cannot find -lgomp: No such file"
    ),
    "CppCompileError: C++ compile error\n\nOutput:\na.cpp:1: error: no luck\n": (
        "a.cpp:1: error: no luck"
    ),
    "a.s: error: closing\nas: final close failed: No space left on device": (
        "as: final close failed: No space left on device"
    ),
    "IndexError: list index out of range": "IndexError: list index out of range",
    "Killed": "Killed",
    "": "without a reason",
}


@pytest.mark.parametrize("output", OUTPUTS, ids=range(len(OUTPUTS)))
def test_the_line_that_says_why(output: str) -> None:
    assert complaint(output) == OUTPUTS[output]


def test_a_graph_that_is_not_captured_is_refused_by_name() -> None:
    refused = pytest.raises(Refused, match=r"'choose' cannot be compiled .*: use engine=eager")
    with refused, capturing("choose"):
        raise NotCaptured("PyTorch was told to compile nothing")


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ZeroDivisionError), capturing("choose"):
        raise ZeroDivisionError
