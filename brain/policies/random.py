"""Any row goes first: the floor that every other policy has to beat."""

import torch
from torch import Tensor

from compiled.choose import Look
from compiled.philox import uniform
from compiled.state import State

_LANES = 1 << 32


def keep_score(state: State, look: Look) -> Tensor:
    """Independent in every tick, and a function of positions alone, so that the same run draws the
    same numbers whatever slots its rows are in: [capacity] float32.
    """
    key = torch.zeros(2, dtype=torch.int64, device=state.position.device)
    newest = torch.where(state.valid, state.position, 0).amax()
    return uniform(key, newest, state.position.clamp(min=0) % _LANES).to(torch.float32)
