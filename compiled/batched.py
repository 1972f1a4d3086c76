"""Many memories in step: the same read, decision and patch, mapped over a leading axis.

For evaluation, where many texts are fed at once: the products of all streams become one product.
Nothing here is a second way of doing anything; every function is that of one memory under
``torch.func.vmap``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compiled.choose import Eviction, Spoken, follow
from compiled.linear import widened
from compiled.llama import LlamaConfig, Weights
from compiled.patch import patch
from compiled.read import read
from compiled.sample import surprises
from compiled.state import Cursor, State, allocate_cursor, allocate_state


class Memories(NamedTuple):
    """Tensors of ``state.py`` with a leading axis of streams."""

    state: State  # [streams, …]
    cursor: Cursor  # [streams, …]


def allocate_memories(
    streams: int, config: LlamaConfig, capacity: int, dtype: torch.dtype, device: torch.device
) -> Memories:
    """Empty memories whose cursors wait for a first token.

    A layer's keys (and values) of all streams lie side by side: a read takes them layer by layer,
    and would copy them to multiply them at once.
    """
    one_state = allocate_state(config, capacity, dtype, device)
    one_cursor = allocate_cursor(device)

    def repeated(tensor: Tensor) -> Tensor:
        axis = 1 if tensor.dim() == 4 else 0  # behind the layers
        shape = [*tensor.shape[:axis], streams, *tensor.shape[axis:]]
        return tensor.unsqueeze(axis).expand(shape).contiguous().movedim(axis, 0)

    return Memories(State(*map(repeated, one_state)), Cursor(*map(repeated, one_cursor)))


def weights_for_many(weights: Weights) -> Weights:
    """Returns the weights in the form in which few rows a step are multiplied fastest by them. On a
    CPU without instructions for their dtype that is float32, a copy: to make it anew in every step
    would take longer than the products.
    """
    return weights._replace(
        qkv=widened(weights.qkv, weights.dtype),
        attention_out=widened(weights.attention_out, weights.dtype),
        gate_up=widened(weights.gate_up, weights.dtype),
        down=widened(weights.down, weights.dtype),
        head=widened(weights.head, weights.dtype),
    )


def advance(
    config: LlamaConfig,
    weights: Weights,
    memories: Memories,
    tokens: Tensor,
    eviction: Eviction,
    source: int,
    *,
    bucket: int,
) -> Tensor:
    """One teacher-forced tick of every stream, in place: reads its cursor, moves on to its token.

    Args:
        config: The model's dimensions.
        weights: Its weights, best by ``weights_for_many``.
        memories: Every stream's memory.
        tokens: [streams] int64.
        eviction: What decides which rows stay.
        source: Who the tokens come from.
        bucket: Slots to read.
    Returns:
        Negative log-likelihoods [streams] float32, nats.
    """

    def tick(state: State, cursor: Cursor, token: Tensor) -> Tensor:
        one = torch.ones((), dtype=torch.int64, device=token.device)
        reading = read(config, weights, state, cursor.token, cursor.position, one, bucket=bucket)
        surprise, logits = surprises(reading.logits, token), reading.logits
        spoken = Spoken(token, torch.full_like(cursor.source, source), surprise, logits)
        choice = follow(state, cursor, reading, spoken, eviction)
        patch(state, cursor, choice.plan(reading))
        return choice.surprise

    surprise: Tensor = torch.func.vmap(tick)(*memories, tokens[:, None])  # [streams, 1]
    return surprise[:, 0]


def last_logits(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    bucket: int,
) -> Tensor:
    """Reads some tokens against every stream's memory, writing nothing.

    Args:
        config: The model's dimensions.
        weights: Its weights.
        state: Every stream's state.
        tokens: [streams, T] int64.
        positions: [streams, T] int64.
        lengths: [streams] int64, at least 1.
        bucket: Slots to read.
    Returns:
        Logits after each stream's last live token: [streams, vocab] float32.
    """

    def ask(state: State, tokens: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        logits = read(config, weights, state, tokens, positions, length, bucket=bucket).logits
        return logits.index_select(0, length[None] - 1)[0]

    answers: Tensor = torch.func.vmap(ask)(state, tokens, positions, lengths)
    return answers
