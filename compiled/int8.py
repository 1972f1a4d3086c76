"""Weights in eight bits: a quarter of float32's bytes, and a token costs what its bytes cost.

The format is symmetric, with one scale for every row of a matrix, which is one output channel: the
product of a row is computed with its integers and scaled once. Where one token is read in a
captured graph, or on a CPU in bfloat16, the integers are never converted as a whole matrix;
elsewhere they are, for the moment. Activations, norms and the cache keep their dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127


class Int8(NamedTuple):
    """A matrix, or several stacked: row ``i`` is ``values[i] * scale[i]``."""

    values: Tensor  # [..., out, in] int8
    scale: Tensor  # [..., out] float32


def quantize(rows: Tensor) -> Int8:
    """Rounds a matrix to the nearest eight-bit numbers.

    The largest number of each row becomes ±127, so every number is off by at most half a 127th of
    that. A row of zeros stays a row of zeros.

    Args:
        rows: [..., out, in] in any floating dtype.
    Returns:
        Values [..., out, in] int8 and scales [..., out] float32.
    """
    exact = rows.float()
    scale = exact.abs().amax(-1) / LARGEST  # [..., out]
    divisor = torch.where(scale > 0, scale, 1.0)[..., None]
    return Int8((exact / divisor).round().to(torch.int8), scale)


def dequantize(matrix: Int8) -> Tensor:
    """Makes float32 of a matrix."""
    return matrix.values.float() * matrix.scale[..., None]
