"""A Llama-family decoder as data: its dimensions, its weights, and one layer as a pure function.

The weights of all layers are stacked along a leading ``layers`` axis, and the projections that
read the same input are packed (query, key, value; gate, up). A whole model is therefore ten
tensors, whatever its depth (sixteen in eight bits): as many graph inputs, as many addresses. In a
file's own blocks a matrix is as many pieces as the file has, and one table that tells where. Its
relatives differ in what :class:`LlamaConfig` says beside dimensions: a bias, gains of queries and
keys, layers that do not rotate, four numbers. What a model has not, costs nothing.

Reference implementation for every formula here: Hugging Face transformers, ``modeling_llama.py``,
and ``modeling_qwen2.py``, ``_qwen3.py``, ``_smollm3.py`` and ``_granite.py`` for the rest.
Architecture: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Zhang & Sennrich 2019 (RMSNorm),
Shazeer 2020 (SwiGLU), Ainslie et al. 2023 (GQA).
"""

import math
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
from compiled.rope import RopeScaling, inverse_frequencies, rotate

ROTATED, UNROTATED = 0, 1
"""Kinds of layers: rows of the table of frequencies."""


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
    rotary_kinds: tuple[int, ...] = ()  # ROTATED or UNROTATED, of each layer; empty: all ROTATED
    qkv_bias: bool = False  # whether queries, keys and values have one
    qk_norm: bool = False  # whether each head's query and key are normalised before RoPE
    embedding_scale: float = 1.0  # of the embedded tokens
    residual_scale: float = 1.0  # of what attention and MLP add to the residual stream
    attention_scale: float | None = None  # of scores; None: head_dim ** -0.5
    logit_divisor: float = 1.0  # logits are divided by it

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """Of each layer, the row of the table of frequencies that turns it."""
        return self.rotary_kinds or (ROTATED,) * self.num_layers

    @property
    def score_divisor(self) -> float:
        """What scores are divided by."""
        scale = self.attention_scale
        return math.sqrt(self.head_dim) if scale is None else 1 / scale

    @property
    def stream_scale(self) -> float:
        """Of the embedded tokens, where the residual stream is kept divided by ``residual_scale``:
        then layers add to it as they do without one, since a norm does not see a factor, if its
        epsilon is ``stream_eps``.
        """
        return self.embedding_scale / self.residual_scale

    @property
    def stream_eps(self) -> float:
        """Of the norms of the residual stream, see ``stream_scale``."""
        return self.rms_norm_eps / self.residual_scale**2


class Weights(NamedTuple):
    """Every tensor of a model. ``[out, in]`` order as in ``torch.nn.functional.linear``.

    All share one floating dtype and device, except matrices in eight bits or in blocks, and
    ``inverse_frequencies`` (float64). ``head`` is the same matrix as ``embedding`` where the model
    ties them. The last two are None where the model has none.
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
    inverse_frequencies: Tensor  # [kinds, head_dim / 2] float64
    qkv_bias: Tensor | None = None  # [layers, (heads + 2 * kv_heads) * head_dim]
    qk_gain: Tensor | None = None  # [layers, 2, head_dim]: of queries, of keys

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
        return [tensor for field in self if field is not None for tensor in flat(field)]


class LayerWeights(NamedTuple):
    """One layer's slice of :class:`Weights`: views, never copies."""

    attention_norm: Tensor  # [hidden]
    mlp_norm: Tensor  # [hidden]
    qkv: Matrix  # [(heads + 2 * kv_heads) * head_dim, hidden]
    attention_out: Matrix  # [hidden, heads * head_dim]
    gate_up: Matrix  # [2 * intermediate, hidden]
    down: Matrix  # [hidden, intermediate]
    qkv_bias: Tensor | None = None  # [(heads + 2 * kv_heads) * head_dim]
    qk_gain: Tensor | None = None  # [2, head_dim]

    def tensors(self) -> list[Tensor]:
        """Flat; ``from_tensors`` undoes it."""
        return [tensor for field in self if field is not None for tensor in flat(field)]

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[Tensor], *, qkv_bias: bool = False, qk_norm: bool = False
    ) -> "LayerWeights":
        """Two norms, then four matrices, which in eight bits are two tensors each; then what of the
        rest there is.
        """
        norms, *rest = tensors[:2], *tensors[2:]
        gain = rest.pop() if qk_norm else None
        bias = rest.pop() if qkv_bias else None
        matrices: Sequence[Matrix] = rest
        if len(rest) != 4:
            matrices = [Int8(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
        return cls(*norms, *matrices)._replace(qkv_bias=bias, qk_gain=gain)


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every field of :class:`Weights` that a model of these dimensions has."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (c.vocab_size, c.hidden_size),
        "attention_norm": (c.num_layers, c.hidden_size),
        "qkv": (c.num_layers, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.hidden_size),
        "attention_out": (c.num_layers, c.hidden_size, c.num_heads * c.head_dim),
        "mlp_norm": (c.num_layers, c.hidden_size),
        "gate_up": (c.num_layers, 2 * c.intermediate_size, c.hidden_size),
        "down": (c.num_layers, c.hidden_size, c.intermediate_size),
        "final_norm": (c.hidden_size,),
        "head": (c.vocab_size, c.hidden_size),
        "inverse_frequencies": (1 + max(c.layer_kinds), c.head_dim // 2),
    }
    if c.qkv_bias:
        shapes["qkv_bias"] = (c.num_layers, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
    if c.qk_norm:
        shapes["qk_gain"] = (c.num_layers, 2, c.head_dim)
    return shapes


def frequency_table(config: LlamaConfig) -> Tensor:
    """The angular frequencies of each kind of layer, [kinds, head_dim / 2] float64, radians per
    position. A frequency of 0 is no rotation.
    """
    turning = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return torch.stack([turning, torch.zeros_like(turning)][: 1 + max(config.layer_kinds)])


def layer_weights(weights: Weights, layer: int) -> LayerWeights:
    """Views of one layer's weights."""
    return LayerWeights(
        weights.attention_norm[layer],
        weights.mlp_norm[layer],
        part(weights.qkv, layer),
        part(weights.attention_out, layer),
        part(weights.gate_up, layer),
        part(weights.down, layer),
        None if weights.qkv_bias is None else weights.qkv_bias[layer],
        None if weights.qk_gain is None else weights.qk_gain[layer],
    )


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Normalises by the root mean square, in float32 (Zhang & Sennrich 2019).

    Args:
        x: [..., n] float32.
        gain: [n], or of a shape that broadcasts against ``x``, in the model's dtype.
        eps: Added to the mean square.
    Returns:
        [..., n] in the dtype of ``gain``.
    """
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)  # [..., 1]
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
    *,
    head_eps: float = 0.0,
    score_divisor: float | None = None,
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
        eps: Of the norms of the residual stream.
        attention: ``attend``, or a form of it with another mass.
        head_eps: Of the norms of queries and keys, if there are any.
        score_divisor: What scores are divided by; None: sqrt(head_dim).
    """
    num_tokens = hidden.shape[0]
    num_kv_heads, _, head_dim = keys.shape
    x = rms_norm(hidden, weights.attention_norm, eps)
    projected = linear(x, weights.qkv, weights.qkv_bias)  # [T, (heads + 2 * kv_heads) * head_dim]
    num_heads = projected.shape[1] // head_dim - 2 * num_kv_heads
    widths = [(num_heads + num_kv_heads) * head_dim, num_kv_heads * head_dim]
    query_key, value = torch.split(projected, widths, dim=-1)
    query_key = query_key.view(num_tokens, num_heads + num_kv_heads, head_dim)
    if weights.qk_gain is not None:
        of_query = weights.qk_gain[0].expand(num_heads, head_dim)
        of_key = weights.qk_gain[1].expand(num_kv_heads, head_dim)
        gain = torch.cat([of_query, of_key])
        query_key = rms_norm(query_key.float(), gain, head_eps)
    turned = rotate(query_key, cos, sin)
    query, key = torch.split(turned, [num_heads, num_kv_heads], dim=1)
    value = value.view(num_tokens, num_kv_heads, head_dim)
    # Copies of T rows, never views of the packed projection: what leaves a layer must own its
    # memory, or a compiled layer may hand out a buffer that its next call overwrites.
    new_keys = key.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    new_values = value.transpose(0, 1).clone(memory_format=torch.contiguous_format)

    attended, mass = attention(query, keys, values, new_keys, new_values, visible, score_divisor)
    hidden = hidden + linear(attended, weights.attention_out).float()
    x = rms_norm(hidden, weights.mlp_norm, eps)
    gate, up = linear(x, weights.gate_up).chunk(2, dim=-1)
    hidden = hidden + linear(F.silu(gate) * up, weights.down).float()
    return LayerReading(hidden, new_keys, new_values, mass)
