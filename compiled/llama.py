"""A Llama-family decoder as data: its dimensions, its weights, and one layer as a pure function.

The weights of all layers are stacked along a leading ``layers`` axis, and the projections that
read the same input are packed (query, key, value; gate, up). A whole model is therefore ten
tensors, whatever its depth (sixteen in eight bits): as many graph inputs, as many addresses. In a
file's own blocks a matrix is as many pieces as the file has, and one table that tells where.

Reference implementation for every formula here: Hugging Face transformers, ``modeling_llama.py``.
Architecture: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Zhang & Sennrich 2019 (RMSNorm),
Shazeer 2020 (SwiGLU), Ainslie et al. 2023 (GQA).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled.attention import Attention, Visibility, attend
from compiled.int8 import Int8
from compiled.linear import linear
from compiled.matrix import Matrix, flat, part
from compiled.rope import RopeScaling, rotate


@dataclass(frozen=True)
class LlamaConfig:
    """Dimensions and constants of one model, in Hugging Face ``config.json`` terms.

    ``max_position_embeddings`` is the range of positions the model was trained on.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False


class Weights(NamedTuple):
    """Every tensor of a model. ``[out, in]`` order as in ``torch.nn.functional.linear``.

    All share one floating dtype and device, except matrices in eight bits or in blocks, and
    ``inverse_frequencies`` (float64). ``head`` is the same matrix as ``embedding`` where the model
    ties them.
    """

    embedding: Matrix  # [vocab, hidden]
    attention_norm: Tensor  # [layers, hidden]
    qkv: Matrix  # [layers, (heads + 2 * kv_heads) * head_dim, hidden]
    attention_out: Matrix  # [layers, hidden, heads * head_dim]
    mlp_norm: Tensor  # [layers, hidden]
    gate_up: Matrix  # [layers, 2 * intermediate, hidden]
    down: Matrix  # [layers, hidden, intermediate]
    final_norm: Tensor  # [hidden]
    head: Matrix  # [vocab, hidden]
    inverse_frequencies: Tensor  # [head_dim / 2] float64

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of the cache."""
        return self.final_norm.dtype

    @property
    def device(self) -> torch.device:
        """Of every tensor."""
        return self.final_norm.device

    def tensors(self) -> list[Tensor]:
        """Every tensor that a graph takes, once per field, flat."""
        return [tensor for field in self for tensor in flat(field)]


class LayerWeights(NamedTuple):
    """One layer's slice of :class:`Weights`: views, never copies."""

    attention_norm: Tensor  # [hidden]
    mlp_norm: Tensor  # [hidden]
    qkv: Matrix  # [(heads + 2 * kv_heads) * head_dim, hidden]
    attention_out: Matrix  # [hidden, heads * head_dim]
    gate_up: Matrix  # [2 * intermediate, hidden]
    down: Matrix  # [hidden, intermediate]

    def tensors(self) -> list[Tensor]:
        """Flat; ``from_tensors`` undoes it."""
        return [tensor for field in self for tensor in flat(field)]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "LayerWeights":
        """Two norms, then four matrices, which in eight bits are two tensors each."""
        norms, matrices = tensors[:2], tensors[2:]
        if len(matrices) == 4:
            return cls(*norms, *matrices)
        pairs = zip(matrices[::2], matrices[1::2], strict=True)
        return cls(*norms, *(Int8(values, scale) for values, scale in pairs))


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every field of :class:`Weights` for a model of these dimensions."""
    c = config
    return {
        "embedding": (c.vocab_size, c.hidden_size),
        "attention_norm": (c.num_layers, c.hidden_size),
        "qkv": (c.num_layers, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.hidden_size),
        "attention_out": (c.num_layers, c.hidden_size, c.num_heads * c.head_dim),
        "mlp_norm": (c.num_layers, c.hidden_size),
        "gate_up": (c.num_layers, 2 * c.intermediate_size, c.hidden_size),
        "down": (c.num_layers, c.hidden_size, c.intermediate_size),
        "final_norm": (c.hidden_size,),
        "head": (c.vocab_size, c.hidden_size),
        "inverse_frequencies": (c.head_dim // 2,),
    }


def layer_weights(weights: Weights, layer: int) -> LayerWeights:
    """Views of one layer's weights."""
    return LayerWeights(
        weights.attention_norm[layer],
        weights.mlp_norm[layer],
        part(weights.qkv, layer),
        part(weights.attention_out, layer),
        part(weights.gate_up, layer),
        part(weights.down, layer),
    )


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Normalises by the root mean square, in float32 (Zhang & Sennrich 2019).

    Args:
        x: [T, hidden] float32.
        gain: [hidden] in the model's dtype.
        eps: Added to the mean square.
    Returns:
        [T, hidden] in the dtype of ``gain``.
    """
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)  # [T, 1]
    return (x * scale).to(gain.dtype) * gain


class LayerReading(NamedTuple):
    """What one layer's pass returns."""

    hidden: Tensor  # [T, hidden] float32
    new_keys: Tensor  # [kv_heads, T, head_dim], RoPE applied
    new_values: Tensor  # [kv_heads, T, head_dim]
    mass: Tensor | None  # float32: of each slot, then of each new token; see ``attend``


def decoder_layer(
    hidden: Tensor,
    weights: LayerWeights,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    visible: Visibility,
    eps: float,
    attention: Attention = attend,
) -> LayerReading:
    """Takes T new tokens through one pre-norm decoder layer, against a read-only cache.

    All dimensions follow from the shapes.

    Args:
        hidden: [T, hidden] float32, the residual stream. It stays in float32 whatever the weights'
            dtype: that costs nothing beside the weights and keeps low precision close to float32.
        weights: Of this layer.
        keys: [kv_heads, bucket, head_dim], cached, RoPE applied.
        values: [kv_heads, bucket, head_dim], cached.
        cos: [T, head_dim / 2] float32, of the new tokens' angles.
        sin: Of the same shape.
        visible: Who sees whom.
        eps: Of the norms.
        attention: ``attend``, or a form of it with another mass.
    """
    num_tokens = hidden.shape[0]
    num_kv_heads, _, head_dim = keys.shape
    x = rms_norm(hidden, weights.attention_norm, eps)
    projected = linear(x, weights.qkv)  # [T, (heads + 2 * kv_heads) * head_dim]
    num_heads = projected.shape[1] // head_dim - 2 * num_kv_heads
    widths = [(num_heads + num_kv_heads) * head_dim, num_kv_heads * head_dim]
    query_key, value = torch.split(projected, widths, dim=-1)
    turned = rotate(query_key.view(num_tokens, num_heads + num_kv_heads, head_dim), cos, sin)
    query, key = torch.split(turned, [num_heads, num_kv_heads], dim=1)
    value = value.view(num_tokens, num_kv_heads, head_dim)
    # Copies of T rows, never views of the packed projection: what leaves a layer must own its
    # memory, or a compiled layer may hand out a buffer that its next call overwrites.
    new_keys = key.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    new_values = value.transpose(0, 1).clone(memory_format=torch.contiguous_format)

    attended, mass = attention(query, keys, values, new_keys, new_values, visible)
    hidden = hidden + linear(attended, weights.attention_out).float()
    x = rms_norm(hidden, weights.mlp_norm, eps)
    gate, up = linear(x, weights.gate_up).chunk(2, dim=-1)
    hidden = hidden + linear(F.silu(gate) * up, weights.down).float()
    return LayerReading(hidden, new_keys, new_values, mass)
