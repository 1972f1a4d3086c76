"""Novel passages stay, whatever they look like; of all other rows the dimmest go first.

Attention shows what the language needs now: brightness keeps it fluent. It does not show what will
be asked for later. What could not be predicted when it was said cannot be guessed when it is asked
for, so it must be kept; and a fact is a passage, not a word: the answer at its end is often easy to
foresee by then ("is made of …"). So the running mean of surprise decides, not a token's own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compiled.choose import Look
from compiled.state import State

_KEPT = 1e6  # above any brightness


@dataclass(frozen=True)
class Novelty:
    """Keeps the ``most`` novel rows that are older than the newest ``recent`` positions.

    After ``lifetime`` ticks a row counts 1/e as novel. Without an end to it, the memory of an
    endless text becomes that of its few most novel passages, which hardly any new one surpasses.
    """

    most: int
    recent: int
    lifetime: float = math.inf

    def __call__(self, state: State, look: Look) -> Tensor:
        """Brightness, raised above all others for the most novel rows: [capacity] float32. Newer
        rows, at the positions that ``decide_cull`` protects, take no place yet; the token being
        read stands one behind the newest row, the last of several as many behind it.
        """
        most = min(self.most, state.capacity)
        if most == 0:
            return state.brightness
        newest = torch.where(state.valid, state.position, 0).amax()
        settled = state.valid & (state.position <= newest + look.queries.clamp(min=1) - self.recent)
        settled = settled & ~state.novelty.isnan()  # one of those would hide all others
        novelty = torch.where(settled, self._faded(state), -math.inf)
        least = torch.topk(novelty, most, sorted=False).values.amin()  # a third of the time
        return state.brightness + torch.where(settled & (novelty >= least), _KEPT, 0.0)

    def _faded(self, state: State) -> Tensor:
        """Novelty as the rows' ages leave it: [capacity]."""
        if math.isinf(self.lifetime):
            return state.novelty
        youngest = torch.where(state.valid, state.born, 0).amax()
        age = (youngest - state.born).to(torch.float32)  # ticks, which no renumbering changes
        # Not exp: MKL makes it with threads that spin for milliseconds afterwards, on processors
        # that the read wants.
        return state.novelty * torch.exp2(age * (-math.log2(math.e) / self.lifetime))
