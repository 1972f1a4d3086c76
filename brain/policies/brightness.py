"""The dimmest rows go first."""

from torch import Tensor

from compiled.choose import Look
from compiled.state import State


def keep_score(state: State, look: Look) -> Tensor:
    """Brightness itself: [capacity] float32."""
    return state.brightness
