"""Rotary position embedding (Su et al. 2021), in the "rotate half" layout of Hugging Face Llama.

Angles are computed in float64 from integer positions. Float32 angles would already be off by
0.03 rad at position 10^6; a read needs ``T * head_dim / 2`` of them, so precision is free.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How the trained frequencies are stretched. ``kind`` is ``linear`` or ``llama3``.

    The last three fields matter to ``llama3`` only.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angular frequency of each rotated pair, in radians per position: float64 [head_dim / 2].

    ``linear`` divides every frequency by the factor (position interpolation, Chen et al. 2023).
    ``llama3`` leaves wavelengths shorter than ``original / high_freq_factor`` alone, divides those
    longer than ``original / low_freq_factor`` and interpolates between (transformers,
    ``modeling_rope_utils.py``). Raises ValueError for any other kind.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequency = theta**-exponent
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        original = scaling.original_max_position_embeddings
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
        return kept * frequency + (1.0 - kept) * frequency / scaling.factor
    raise ValueError(f"RoPE scaling {scaling.kind!r} is not supported; use linear or llama3")


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    ``positions`` [T] int64, ``frequencies`` [head_dim / 2] float64
    → two float32 tensors [T, head_dim / 2].
    """
    angles = positions.to(torch.float64)[:, None] * frequencies  # [T, head_dim / 2]
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs ``(x[i], x[i + head_dim / 2])`` by their angles, in float32.

    ``x`` [T, heads, head_dim]; ``cos``, ``sin`` [T, head_dim / 2]; the result has x's dtype.
    """
    return rotate_rows(x, cos[:, None], sin[:, None])


def rotate_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in any layout: ``x`` [..., head_dim], ``cos`` and ``sin`` [..., head_dim / 2]
    of a shape that broadcasts against it.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned_first = torch.addcmul(first * cos, second, sin, value=-1)
    turned_second = torch.addcmul(second * cos, first, sin)
    rotated = torch.cat([turned_first, turned_second], dim=-1)
    return rotated.to(x.dtype)
