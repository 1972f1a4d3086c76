"""What each step of a tick received and returned, for whoever wants to look."""

from collections.abc import Callable
from typing import NamedTuple

from brain.tick import Tick
from compiled.choose import Choice
from compiled.patch import Plan
from compiled.read import Reading
from compiled.state import Cursor


class Step(NamedTuple):
    """One tick, after step 3 and before its patch. The tensors are the brain's own: look, copy,
    and be done before returning.
    """

    tick: Tick
    cursor: Cursor  # into step 1: token, position, tick
    reading: Reading  # out of step 1
    choice: Choice  # out of steps 1 to 3
    plan: Plan  # into step 4


Observer = Callable[[Step], None]
