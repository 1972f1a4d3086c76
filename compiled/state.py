"""The memory: fixed-capacity tensors, allocated once, at addresses that never change.

A *slot* is an index along the capacity axis; a *row* is everything in one slot: its keys and
values in every layer, and its columns of the mirror. A slot's number says nothing about text
order: text order is order by position.

This module allocates and describes. It never writes: see ``patch.py``.
"""

from typing import Annotated, NamedTuple, get_type_hints

import torch
from torch import Tensor

from compiled import large_pages
from compiled.llama import LlamaConfig

NOWHERE = -1
"""Position and token id of a slot that has never held a row: no token sees it."""


class Column(NamedTuple):
    """What one column of the mirror is made of."""

    dtype: torch.dtype
    empty: int = 0  # in a slot that never held a row, and in one that was redacted
    older: int | None = None  # what a save without this column gets; None: it is refused
    ticks: bool = False  # whether it holds ticks, from 0 to the present one


class State(NamedTuple):
    """Cache and mirror. Keys are stored with RoPE applied.

    This is the table of the mirror's columns: allocation, bytes, redaction, plans, saves and the
    host's mirror follow it. A new column is a line here and the function that computes it.
    """

    keys: Tensor  # [layers, kv_heads, capacity, head_dim] model dtype
    values: Tensor  # [layers, kv_heads, capacity, head_dim] model dtype
    # [capacity] each:
    token_id: Annotated[Tensor, Column(torch.int64, empty=NOWHERE)]
    position: Annotated[Tensor, Column(torch.int64, empty=NOWHERE)]  # unique among valid rows
    brightness: Annotated[Tensor, Column(torch.float32)]
    surprise: Annotated[Tensor, Column(torch.float32)]  # nats: negative log-likelihood on arrival
    novelty: Annotated[Tensor, Column(torch.float32)]  # nats: mean surprise of the passage around
    source: Annotated[Tensor, Column(torch.uint8)]
    born: Annotated[Tensor, Column(torch.int64, ticks=True)]  # tick of birth
    # tick it last drew more than average attention:
    lit: Annotated[Tensor, Column(torch.int64, ticks=True)]
    valid: Annotated[Tensor, Column(torch.bool)]
    pinned: Annotated[Tensor, Column(torch.bool)]

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.valid.shape[0]


COLUMNS: dict[str, Column] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(State, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}
"""The columns of the mirror by name, in the order of :class:`State`."""

ROW_COLUMNS = tuple(name for name in COLUMNS if name != "valid")
"""The columns that a row brings along; whether there is a row in a slot is what ``valid`` says."""


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
    columns = {
        name: torch.full((capacity,), column.empty, dtype=column.dtype, device=device)
        for name, column in COLUMNS.items()
    }
    return State(
        keys=large_pages.zeros(rows, dtype, device),
        values=large_pages.zeros(rows, dtype, device),
        **columns,
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
    mirror_row = sum(column.dtype.itemsize for column in COLUMNS.values())
    return capacity * (row + mirror_row)


def lowest_free_slots(valid: Tensor, width: int) -> Tensor:
    """The ``width`` lowest slots in the order: free ones first, then occupied ones.

    Occupied slots come up only when fewer than ``width`` are free; a caller that writes to them
    must write what they already hold.

    Args:
        valid: [capacity] bool.
        width: How many slots, at most the capacity.
    Returns:
        [width] int64, distinct.
    """
    capacity = valid.shape[0]
    slot = torch.arange(capacity, device=valid.device)
    order = torch.where(valid, slot + capacity, slot)
    if width == 1:
        return order.amin(0, keepdim=True) % capacity
    return torch.topk(order, width, largest=False, sorted=True).values % capacity


def addresses(state: State) -> dict[str, int]:
    """Where each tensor lives, in bytes. Constant for the life of a brain."""
    return {name: tensor.data_ptr() for name, tensor in zip(State._fields, state, strict=True)}
