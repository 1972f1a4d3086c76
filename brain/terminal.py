"""What a person sees on standard error while something takes time."""

import sys

from brain.machine.progress import progress_bar
from compiled import torch_private
from compiled.graphs import Graphs


def note(message: str) -> None:
    """Prints one line on standard error."""
    print(message, file=sys.stderr, flush=True)


def capture_graphs(graphs: Graphs, *, edits: bool = True) -> None:
    """Captures every graph of a brain, or those of ticks alone without ``edits``, showing which one
    is being compiled and how long that usually takes. Does nothing in eager mode.
    """
    if not graphs.compiled:
        return
    total = len(graphs.expected(edits=edits))
    # Collecting garbage after every graph would take a seventh of a second each and find nothing.
    no_collection = torch_private.compiling_without_collection()
    note(f"capturing {total} graphs: a minute or two the first time, then some ten seconds …")
    with no_collection, progress_bar("capturing graphs", total, "graph") as bar:
        for done, name in enumerate(graphs.warm_up(edits=edits)):
            bar.n = done
            bar.set_postfix_str(name)
        bar.update(total - bar.n)
