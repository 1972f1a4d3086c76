"""The dimmest rows go first."""

from torch import Tensor

from compiled.state import State


def keep_score(state: State, brightness: Tensor, mass: Tensor) -> Tensor:
    """Brightness itself: [capacity] float32."""
    return brightness
