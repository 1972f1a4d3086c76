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
        parts: Tensors of any shape but empty, of any floating dtype, named by ``PARTS``.
    Returns:
        [] int64; 0 where all is finite.
    """
    # The least and the greatest of numbers among which there is NaN are NaN.
    ends = torch.stack([end.float() for part in parts for end in torch.aminmax(part)])
    broken = ~ends.isfinite().view(len(parts), 2).all(1)
    return (broken.to(torch.int64) << torch.arange(len(parts), device=broken.device)).sum()
