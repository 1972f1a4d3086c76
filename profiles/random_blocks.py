"""Blocks of random bits, in every kind that a GGUF file has."""

from collections.abc import Sequence

import gguf
import numpy as np
import torch
from torch import Tensor

from compiled.blocks import KINDS, Rows

SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q6_K": (208,), "F32": (), "F16": (), "BF16": ()},
}
"""Where the numbers of sixteen bits are in a block, by which the others are multiplied."""
MEASURED = 256
"""Rows of which the spread is measured."""


def random_rows(
    kind: str, rows: int, columns: int, seed: int | Sequence[int], spread: float = 0.06
) -> Rows:
    """Blocks of random bits, with random scales such that the numbers are of this spread. What has
    no scale is made of random numbers, of any kind that the gguf package writes.
    """
    generator = np.random.default_rng(seed)
    if kind not in SCALES or not SCALES[kind]:
        plain = (spread * generator.standard_normal((rows, columns))).astype(np.float32)
        made = gguf.quantize(plain, gguf.GGMLQuantizationType[kind]).view(np.uint8)
        return Rows(torch.from_numpy(made.reshape(rows, -1).copy()), kind)
    _, weights, size = KINDS[kind]
    made = generator.integers(0, 256, (rows, columns // weights, size), dtype=np.uint8)
    scales = {at: 0.01 * generator.standard_normal(made.shape[:2]) for at in SCALES[kind]}

    def put(factor: float) -> Rows:
        for at, scale in scales.items():
            half = (factor * scale).astype(np.float16)
            made[..., at : at + 2] = half[..., None].view(np.uint8)
        return Rows(torch.from_numpy(made.reshape(rows, -1)), kind)

    some = Rows(put(1.0).bytes[:MEASURED], kind)
    return put(spread / float(reference(some).square().mean().sqrt()))


def reference(rows: Rows) -> Tensor:
    """What the gguf package makes of them."""
    kind = gguf.GGMLQuantizationType[rows.kind]
    return torch.from_numpy(np.array(gguf.dequantize(rows.bytes.numpy(), kind), np.float32))
