"""Repair against dropping, pair by pair: is the text that follows foretold better?

Two brains live through the same text. Then the dimmest pair of neighbours is replaced in one of
them as ``brain/repair.py`` would replace it, and dropped in the other, and both read the same
tokens that follow. Where no candidate gains enough nothing is compared: both would drop the pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from brain.actions import Cull
from brain.brain import Brain
from brain.measure.evaluation.paired import standard_error
from brain.measure.evaluation.reading import logits_behind


@dataclass(frozen=True)
class Mended:
    """One pair. Nats per token of what follows, over the same tokens."""

    gain: float  # what the repair promised for the token to its right
    repaired: float
    dropped: float

    @staticmethod
    def of(plain: dict[str, float] | None) -> "Mended | None":
        """From JSON. Raises LookupError or ValueError for something else."""
        if plain is None:
            return None
        return Mended(*(float(plain[name]) for name in ("gain", "repaired", "dropped")))


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
    logits = logits_behind(brain, following[:-1])
    targets = torch.tensor(following, device=logits.device)
    return float(-torch.log_softmax(logits, -1).gather(-1, targets[:, None]).mean())


def table(pairs: Sequence[Mended | None], horizon: int) -> dict[str, Any]:
    """The mean difference of repairing to dropping in nats per token (below zero: repairing is
    better), its standard error, and how many of the pairs a repair gained anything for.
    """
    found = [pair for pair in pairs if pair is not None]
    apart = [pair.repaired - pair.dropped for pair in found]
    return {
        "pairs": len(pairs),
        "repaired": len(found),
        "horizon": horizon,
        "difference": fmean(apart) if found else None,
        "standard_error": standard_error(apart),
        "better": fmean(float(one < 0) for one in apart) if found else None,
        "mean_gain": fmean(pair.gain for pair in found) if found else None,
    }
