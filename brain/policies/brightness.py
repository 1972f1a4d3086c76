"""The dimmest rows go first."""

from torch import Tensor

from compiled.read import Reading
from compiled.state import State


def keep_score(state: State, reading: Reading) -> Tensor:
    """Brightness itself: [capacity] float32."""
    return state.brightness
