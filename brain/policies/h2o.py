"""The rows with the least attention since birth go first: H2O (Zhang et al. 2023).

Accumulated attention is brightness that does not decay: ``conf/cull/h2o.yaml`` sets it so, without
seeds, and protects the newest half of the memory as the paper does. The paper decides for every
head apart; a row here is one row in all of them.
"""

from torch import Tensor

from compiled.choose import Look
from compiled.state import State


def keep_score(state: State, look: Look) -> Tensor:
    """Attention received so far: [capacity] float32."""
    return state.brightness
