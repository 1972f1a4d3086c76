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
    """How the trained frequencies are stretched, in Hugging Face ``config.json`` terms.

    ``kind`` is ``linear`` or ``llama3``; the last three fields matter to ``llama3`` only.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Computes the angular frequency of each rotated pair.

    ``linear`` divides every frequency by the factor (position interpolation, Chen et al. 2023).
    ``llama3`` leaves wavelengths shorter than ``original / high_freq_factor`` alone, divides those
    longer than ``original / low_freq_factor`` and interpolates between (transformers,
    ``modeling_rope_utils.py``).

    Args:
        head_dim: Numbers of a head's vector.
        theta: The base of the frequencies.
        scaling: None for the frequencies as they were trained.
    Returns:
        [head_dim / 2] float64, radians per position.
    Raises:
        ValueError: The kind of scaling is unknown.
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
    """Computes cosine and sine of every position's angles.

    Args:
        positions: [T] int64.
        frequencies: [..., head_dim / 2] float64, radians per position.
    Returns:
        Two tensors [..., T, head_dim / 2] float32.
    """
    angles = positions.to(torch.float64)[:, None] * frequencies[..., None, :]
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs ``(x[i], x[i + head_dim / 2])`` by their angles, in float32.

    Args:
        x: [T, heads, head_dim] in any floating dtype.
        cos: [T, head_dim / 2] float32.
        sin: [T, head_dim / 2] float32.
    Returns:
        A tensor like ``x``.
    """
    return rotate_rows(x, cos[:, None], sin[:, None])


def rotate_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates as :func:`rotate`, in any layout.

    Args:
        x: [..., head_dim] in any floating dtype.
        cos: [..., head_dim / 2] float32, of a shape that broadcasts against ``x``.
        sin: Of the same shape.
    Returns:
        A tensor like ``x``.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned_first = torch.addcmul(first * cos, second, sin, value=-1)
    turned_second = torch.addcmul(second * cos, first, sin)
    rotated = torch.cat([turned_first, turned_second], dim=-1)
    return rotated.to(x.dtype)
