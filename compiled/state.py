"""The memory: fixed-capacity tensors, allocated once, at addresses that never change.

A *slot* is an index along the capacity axis; a *row* is everything in one slot: its keys and
values in every layer, and its columns of the mirror. A slot's number says nothing about text
order: text order is order by position.

This module allocates and describes. It never writes: see ``patch.py``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compiled.llama import LlamaConfig

NOWHERE = -1
"""Position and token id of a slot that has never held a row: visible to nobody."""


class State(NamedTuple):
    """Cache and mirror. Keys are stored with RoPE applied."""

    keys: Tensor  # [layers, kv_heads, capacity, head_dim] model dtype
    values: Tensor  # [layers, kv_heads, capacity, head_dim] model dtype
    token_id: Tensor  # [capacity] int64
    position: Tensor  # [capacity] int64, unique among valid rows
    brightness: Tensor  # [capacity] float32
    surprise: Tensor  # [capacity] float32, nats: negative log-likelihood on arrival
    novelty: Tensor  # [capacity] float32, nats: mean surprise of the passage around the row
    source: Tensor  # [capacity] uint8
    born: Tensor  # [capacity] int64, tick of birth
    lit: Tensor  # [capacity] int64, tick in which it last drew more than average attention
    valid: Tensor  # [capacity] bool
    pinned: Tensor  # [capacity] bool

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.valid.shape[0]


class Cursor(NamedTuple):
    """What the next read is about to read: the last thing spoken, not yet remembered.

    Held in tensors of fixed address beside the state, so that a tick is driven by device memory
    alone: no number crosses from the host.
    """

    token: Tensor  # [1] int64
    position: Tensor  # [1] int64
    surprise: Tensor  # [1] float32, nats, of ``token`` when it was spoken or fed
    novelty: Tensor  # [1] float32, nats, running mean of surprise up to ``token``
    source: Tensor  # [1] uint8
    uncommitted: Tensor  # [] int64: 1 while the token has no row yet, 0 when the cache holds it
    tick: Tensor  # [] int64: ticks completed


def allocate_state(
    config: LlamaConfig, capacity: int, dtype: torch.dtype, device: torch.device
) -> State:
    """An empty memory. Raises ValueError for a capacity below 1."""
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, not {capacity}")
    rows = (config.num_layers, config.num_kv_heads, capacity, config.head_dim)
    return State(
        keys=torch.zeros(rows, dtype=dtype, device=device),
        values=torch.zeros(rows, dtype=dtype, device=device),
        token_id=torch.full((capacity,), NOWHERE, dtype=torch.int64, device=device),
        position=torch.full((capacity,), NOWHERE, dtype=torch.int64, device=device),
        brightness=torch.zeros(capacity, dtype=torch.float32, device=device),
        surprise=torch.zeros(capacity, dtype=torch.float32, device=device),
        novelty=torch.zeros(capacity, dtype=torch.float32, device=device),
        source=torch.zeros(capacity, dtype=torch.uint8, device=device),
        born=torch.zeros(capacity, dtype=torch.int64, device=device),
        lit=torch.zeros(capacity, dtype=torch.int64, device=device),
        valid=torch.zeros(capacity, dtype=torch.bool, device=device),
        pinned=torch.zeros(capacity, dtype=torch.bool, device=device),
    )


def allocate_cursor(device: torch.device) -> Cursor:
    """A cursor at nothing."""
    return Cursor(
        token=torch.zeros(1, dtype=torch.int64, device=device),
        position=torch.full((1,), NOWHERE, dtype=torch.int64, device=device),
        surprise=torch.zeros(1, dtype=torch.float32, device=device),
        novelty=torch.zeros(1, dtype=torch.float32, device=device),
        source=torch.zeros(1, dtype=torch.uint8, device=device),
        uncommitted=torch.zeros((), dtype=torch.int64, device=device),
        tick=torch.zeros((), dtype=torch.int64, device=device),
    )


def state_bytes(config: LlamaConfig, capacity: int, dtype: torch.dtype) -> int:
    """Bytes that :func:`allocate_state` takes, computed before anything is allocated."""
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    mirror_row = 8 + 8 + 4 + 4 + 4 + 1 + 8 + 8 + 1 + 1
    return capacity * (row + mirror_row)


def addresses(state: State) -> dict[str, int]:
    """Where each tensor lives, in bytes. Constant for the life of a brain."""
    return {name: tensor.data_ptr() for name, tensor in zip(State._fields, state, strict=True)}
