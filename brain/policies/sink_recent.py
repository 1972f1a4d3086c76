"""The oldest rows go first; with protected sinks this is StreamingLLM (Xiao et al. 2023)."""

import torch
from torch import Tensor

from compiled.choose import Look
from compiled.state import State


def keep_score(state: State, look: Look) -> Tensor:
    """Position: [capacity] float32, exact up to 2^24; of equal scores the earliest goes first."""
    return state.position.to(torch.float32)
