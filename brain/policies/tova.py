"""The rows to which the newest token attends least go first: TOVA (Oren et al. 2024)."""

from torch import Tensor

from compiled.choose import Look
from compiled.state import State


def keep_score(state: State, look: Look) -> Tensor:
    """Attention in this tick, averaged over layers and heads: [capacity] float32."""
    return look.mass
