"""What a person sees on standard error while something takes its time."""

import sys
from collections.abc import Iterator

from tqdm import tqdm

from brain.brain import Brain
from compiled import torch_private


def note(message: str) -> None:
    """One line on standard error."""
    print(message, file=sys.stderr, flush=True)


def capture_graphs(brain: Brain, *, edits: bool = True) -> None:
    """Captures every graph of a brain, or without ``edits`` those of ticks, showing which one is
    being compiled. Does nothing in eager mode.
    """
    if not brain.graphs.compiled:
        return
    names: Iterator[str] = brain.warm_up(edits=edits)
    total = len(brain.graphs.expected(edits=edits))
    # Garbage would be looked for after every graph: a seventh of a second each, for nothing.
    unswept = torch_private.without_collection()
    with unswept, tqdm(total=total, desc="capturing graphs", unit="graph") as bar:
        started = False
        for name in names:
            bar.update(int(started))
            bar.set_postfix_str(name)
            started = True
        bar.update(int(started))
