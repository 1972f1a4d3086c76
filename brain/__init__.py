"""Positronic Brain: a language model that thinks in an endless loop inside a fixed memory.

    import brain
    b = brain.open("smollm2", capacity=1024)
    b.prime("Once upon a time")
    for tick in b.stream(ticks=100):
        print(tick.text, end="", flush=True)

Reading never changes the memory: see ``compiled/read.py``. Only the patch writes: see
``compiled/patch.py``.
"""

from brain.actions import Append, Boost, Cull, Pin, Redact, Replace
from brain.brain import Brain
from brain.errors import BrainWarning, Refused
from brain.mirror import Mirror
from brain.opening import load, open, open_brain
from brain.tick import Tick

__all__ = [
    "Append",
    "Boost",
    "Brain",
    "BrainWarning",
    "Cull",
    "Mirror",
    "Pin",
    "Redact",
    "Refused",
    "Replace",
    "Tick",
    "load",
    "open",
    "open_brain",
]
