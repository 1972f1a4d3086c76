"""What a person sees on standard error while something takes time."""

import sys

from tqdm import tqdm

from compiled import torch_private
from compiled.graphs import Graphs


def note(message: str) -> None:
    """Prints one line on standard error."""
    print(message, file=sys.stderr, flush=True)


def capture_graphs(graphs: Graphs, *, edits: bool = True) -> None:
    """Captures every graph of a brain, or those of ticks alone without ``edits``, showing which one
    is being compiled. Does nothing in eager mode.
    """
    if not graphs.compiled:
        return
    total = len(graphs.expected(edits=edits))
    # Collecting garbage after every graph would take a seventh of a second each and find nothing.
    no_collection = torch_private.compiling_without_collection()
    with no_collection, tqdm(total=total, desc="capturing graphs", unit="graph") as bar:
        for done, name in enumerate(graphs.warm_up(edits=edits)):
            bar.n = done
            bar.set_postfix_str(name)
        bar.update(total - bar.n)
