"""The rows whose keys are most like all others go first: KeyDiff (Park et al. 2025).

Unlike all other policies this one looks at the cache: a tick reads every key twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled.choose import Look
from compiled.state import State


def keep_score(state: State, look: Look) -> Tensor:
    """Minus the cosine between a row's key and the mean direction of all keys, averaged over layers
    and heads: [capacity] float32.
    """
    total = torch.zeros_like(state.brightness)
    for keys in state.keys:  # one layer at a time: nothing as large as the cache is ever made
        directions = F.normalize(keys.float(), dim=-1)  # [kv_heads, capacity, head_dim]
        kept = torch.where(state.valid[:, None], directions, 0.0)
        mean = F.normalize(kept.sum(1, keepdim=True), dim=-1)  # [kv_heads, 1, head_dim]
        total = total - (kept * mean).sum(-1).mean(0)
    return total / state.keys.shape[0]
