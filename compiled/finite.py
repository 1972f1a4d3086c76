"""Whether every number that a read made is finite, as a flag that stays on the device.

A patch whose plan carries a flag changes nothing, so what is not a number never reaches the memory.
"""

import torch
from torch import Tensor

PARTS = ("surprises", "new keys", "new values", "logits", "attention mass")
"""What is looked at, in the order of the flag's bits: all of it in a tick, less in an edit."""


def not_finite(*parts: Tensor) -> Tensor:
    """Bit i is set where the i-th tensor holds NaN or an infinity.

    Args:
        parts: Tensors of any shape and floating dtype, named by ``PARTS``.
    Returns:
        [] int64; 0 where all is finite.
    """
    bits = [(~torch.isfinite(part).all()).to(torch.int64) << bit for bit, part in enumerate(parts)]
    return torch.stack(bits).sum()
