"""The rows to which the newest token attends least go first: TOVA (Oren et al. 2024)."""

from torch import Tensor

from compiled.read import Reading
from compiled.state import State


def keep_score(state: State, reading: Reading) -> Tensor:
    """Attention in this tick, averaged over layers and heads: [capacity] float32."""
    return reading.mass
