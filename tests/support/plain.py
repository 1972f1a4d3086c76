"""The read, written a second time: plain loops over float64 NumPy arrays, nothing vectorised.

Shares no code with ``compiled/``. Slow, and meant to be checked by reading.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from compiled.llama import LlamaConfig, Weights
from compiled.state import State

Array = npt.NDArray[np.float64]


@dataclass
class PlainReading:
    logits: Array  # [T, vocab]
    new_keys: Array  # [layers, kv_heads, T, head_dim]
    new_values: Array  # [layers, kv_heads, T, head_dim]
    mass: Array  # [capacity]
    own_mass: Array  # [T]


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor as NumPy, floating dtypes as float64."""
    tensor = tensor.detach().cpu()
    result: npt.NDArray[Any] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return result


def sees_slot(
    valid: npt.NDArray[Any], position: npt.NDArray[Any], slot: int, mine: int, taken: list[int]
) -> bool:
    """Whether a token at position ``mine`` sees a slot, new tokens standing at ``taken``."""
    if not valid[slot]:
        return False
    if int(position[slot]) in taken:
        return False  # a new token stands in its place
    return bool(position[slot] < mine)


def sees_new(i: int, j: int, positions: list[int], length: int) -> bool:
    """Whether new token i sees new token j."""
    if i == j:
        return True
    return j < length and positions[j] <= positions[i]


def normalised(x: Array, gain: Array, eps: float) -> Array:
    result: Array = x / math.sqrt(float(np.mean(x * x)) + eps) * gain
    return result


def rotated(x: Array, position: int, theta: float) -> Array:
    """Rotates pairs (x[i], x[i + n/2]) by position * theta^(-2i/n)."""
    n = len(x)
    out = x.copy()
    for i in range(n // 2):
        angle = position * theta ** (-2 * i / n)
        a, b = x[i], x[i + n // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + n // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def plain_read(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    tokens: list[int],
    positions: list[int],
    length: int | None = None,
) -> PlainReading:
    """What the read must return, mean attention mass included."""
    length = len(tokens) if length is None else length
    held = {name: tensor for name, tensor in weights._asdict().items() if tensor is not None}
    w = {name: array(tensor) for name, tensor in held.items()}
    scale = config.attention_scale or 1 / math.sqrt(config.head_dim)
    kinds = config.rotary_kinds or [0] * config.num_layers
    keys, values = array(state.keys), array(state.values)
    valid, where = array(state.valid), array(state.position)
    num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    group = num_heads // num_kv_heads
    taken = positions[:length]
    hidden = [w["embedding"][token] * config.embedding_scale for token in tokens]
    new_keys = np.zeros((config.num_layers, num_kv_heads, len(tokens), head_dim))
    new_values = np.zeros_like(new_keys)
    mass, own_mass = np.zeros(len(valid)), np.zeros(len(tokens))

    for layer in range(config.num_layers):
        queries = []
        for i, x in enumerate(hidden):
            x = normalised(x, w["attention_norm"][layer], config.rms_norm_eps)
            qkv = w["qkv"][layer] @ x
            if config.qkv_bias:
                qkv = qkv + w["qkv_bias"][layer]
            qkv = qkv.reshape(num_heads + 2 * num_kv_heads, head_dim)
            for h in range(num_heads + num_kv_heads):
                if config.qk_norm:
                    gain = w["qk_gain"][layer, 0 if h < num_heads else 1]
                    qkv[h] = normalised(qkv[h], gain, config.rms_norm_eps)
                if kinds[layer] == 0:
                    qkv[h] = rotated(qkv[h], positions[i], config.rope_theta)
            queries.append(qkv[:num_heads])
            new_keys[layer, :, i] = qkv[num_heads : num_heads + num_kv_heads]
            new_values[layer, :, i] = qkv[num_heads + num_kv_heads :]
        for i in range(len(tokens)):
            attended = []
            for h in range(num_heads):
                query, of = queries[i][h], h // group
                seen = [
                    (slot, keys[layer, of, slot], values[layer, of, slot], mass)
                    for slot in range(len(valid))
                    if sees_slot(valid, where, slot, positions[i], taken)
                ] + [
                    (j, new_keys[layer, of, j], new_values[layer, of, j], own_mass)
                    for j in range(len(tokens))
                    if sees_new(i, j, positions, length)
                ]
                scores = [float(query @ key) * scale for _, key, _, _ in seen]
                shares = [math.exp(score - max(scores)) for score in scores]
                total = sum(shares)
                mixed = np.zeros(head_dim)
                for share, (index, _, value, tally) in zip(shares, seen, strict=True):
                    mixed += share / total * value
                    if i < length:
                        tally[index] += share / total / (config.num_layers * num_heads)
                attended.append(mixed)
            added = w["attention_out"][layer] @ np.concatenate(attended)
            hidden[i] = hidden[i] + added * config.residual_scale
        for i in range(len(tokens)):
            x = normalised(hidden[i], w["mlp_norm"][layer], config.rms_norm_eps)
            gate, up = np.split(w["gate_up"][layer] @ x, 2)
            added = w["down"][layer] @ (gate / (1 + np.exp(-gate)) * up)
            hidden[i] = hidden[i] + added * config.residual_scale

    logits = np.stack(
        [w["head"] @ normalised(x, w["final_norm"], config.rms_norm_eps) for x in hidden]
    )
    return PlainReading(logits / config.logit_divisor, new_keys, new_values, mass, own_mass)
