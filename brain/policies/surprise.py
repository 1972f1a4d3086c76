"""The rows that could be foreseen go first."""

from torch import Tensor

from compiled.choose import Look
from compiled.state import State


def keep_score(state: State, look: Look) -> Tensor:
    """The token's own negative log-likelihood on arrival, in nats: [capacity] float32."""
    return state.surprise
