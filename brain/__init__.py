"""Positronic Brain: a language model that thinks in an endless loop inside a fixed memory.

    import brain
    b = brain.open("smollm2", capacity=1024)
    b.prime("Once upon a time")
    for tick in b.stream(ticks=100):
        print(tick.text, end="", flush=True)

Reading never changes the memory: see ``compiled/read.py``. Only the patch writes: see
``compiled/patch.py``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brain.actions import Append, Boost, Cull, Pin, Redact, Replace, Rewind
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
    "Rewind",
    "Tick",
    "load",
    "open",
    "open_brain",
]

_MODULES = {
    **dict.fromkeys(("Append", "Boost", "Cull", "Pin", "Redact", "Replace", "Rewind"), "actions"),
    **dict.fromkeys(("BrainWarning", "Refused"), "errors"),
    **dict.fromkeys(("load", "open", "open_brain"), "opening"),
    **{"Brain": "brain", "Mirror": "mirror", "Tick": "tick"},
}


def __getattr__(name: str) -> Any:
    # On first use: what needs no PyTorch, like the refusal of a wrong key, does not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"brain.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
