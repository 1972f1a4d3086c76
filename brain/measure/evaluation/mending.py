"""Repair against dropping, pair by pair: is the text that follows foretold better?

Two brains live through the same text. Then the dimmest pair of neighbours is replaced in one of
them as ``brain/repair.py`` would replace it, and dropped in the other, and both read the same
tokens that follow. Where no candidate gains enough nothing is compared: both would drop the pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brain.actions import Cull
from brain.brain import Brain
from brain.measure.evaluation.streams import Progress


@dataclass(frozen=True)
class Mended:
    """One pair. Nats per token of what follows, over the same tokens."""

    gain: float  # what the repair promised for the token to its right
    repaired: float
    dropped: float


def compare(
    mended: Brain, dropped: Brain, text: Sequence[int], ticks: int, horizon: int
) -> Mended | None:
    """Lives through all of ``text`` but its last ``horizon`` tokens, the last ``ticks`` of them
    tick by tick, so that brightness tells rows apart; reads the rest under both memories. None
    where no repair gains enough.
    """
    lived, following = list(text[:-horizon]), list(text[-horizon:])
    for brain in (mended, dropped):
        brain.prime(lived[:-ticks])
        brain.feed(lived[-ticks:])
    repair = mended.best_repair()
    if repair is None:
        return None
    mended.patch([repair.action])
    dropped.patch([Cull(repair.positions)])
    return Mended(repair.gain, _nats(mended, following), _nats(dropped, following))


def _nats(brain: Brain, following: Sequence[int]) -> float:
    """Nats per token of a text behind the pending token, read and not remembered."""
    pending, first = int(brain.cursor.token[0]), brain.memory.account.position
    read = [pending, *following[:-1]]
    logits = brain.read(read, list(range(first, first + len(read)))).logits
    targets = torch.tensor(following, device=logits.device)
    return float(-torch.log_softmax(logits, -1).gather(-1, targets[:, None]).mean())


def measure(
    mended: Brain,
    dropped: Brain,
    texts: Tensor,
    ticks: int,
    horizon: int,
    progress: Progress,
) -> dict[str, Any]:
    """All comparisons over excerpts [pairs, tokens] int64: the mean difference of repairing to
    dropping in nats per token (below zero: repairing is better), and its standard error.
    """
    found: list[Mended] = []
    for text in texts.tolist():
        one = compare(mended, dropped, text, ticks, horizon)
        found += [one] if one is not None else []
        progress(1)
    difference = torch.tensor([one.repaired - one.dropped for one in found], dtype=torch.float64)
    pairs = len(found)
    return {
        "pairs": len(texts),
        "repaired": pairs,
        "horizon": horizon,
        "difference": float(difference.mean()) if pairs else None,
        "standard_error": float(difference.std() / pairs**0.5) if pairs > 1 else None,
        "better": float((difference < 0).double().mean()) if pairs else None,
        "mean_gain": sum(one.gain for one in found) / pairs if pairs else None,
    }
