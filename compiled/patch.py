"""The patch: step 0/4, the only code in this package that writes tensors in place.

    patch(state, cursor, plan) → None

It culls, erases, appends and replaces. Keys, values and mirror columns of a slot are written by
the same graph: two blades of one knife. Culling clears ``valid``, O(1) per row; appending takes
the lowest free slots and moves O(rows written) bytes. Nothing here is proportional to the size of
the cache: the only O(capacity) work is scanning and writing single mirror columns.

The plan is fixed in shape and validated before the graph runs. Once it runs it cannot fail.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compiled.state import NOWHERE, Cursor, State


class RowColumns(NamedTuple):
    """The mirror's half of up to W rows to append. The first ``length`` are written; the rest is
    padding.
    """

    token_id: Tensor  # [W] int64
    position: Tensor  # [W] int64
    brightness: Tensor  # [W] float32
    surprise: Tensor  # [W] float32
    novelty: Tensor  # [W] float32
    source: Tensor  # [W] uint8
    born: Tensor  # [W] int64
    lit: Tensor  # [W] int64
    pinned: Tensor  # [W] bool
    length: Tensor  # [] int64


class Plan(NamedTuple):
    """Everything one patch changes. Replacing is culling and appending in the same plan.

    ``pinned`` and ``erase`` are None in the plan of an ordinary tick, which changes neither.
    """

    keys: Tensor  # [layers, kv_heads, W, head_dim] of the rows to append, RoPE applied
    values: Tensor  # [layers, kv_heads, W, head_dim]
    rows: RowColumns
    cull: Tensor  # [capacity] bool: rows to forget
    brightness: Tensor  # [capacity] float32: of the rows that are already there
    lit: Tensor  # [capacity] int64: of the rows that are already there
    cursor: Cursor  # where the next read stands
    pinned: Tensor | None = None  # [capacity] bool: of the rows that are already there
    erase: Tensor | None = None  # [E] int64: slots to overwrite with zeros; NOWHERE is padding


def lowest_free_slots(valid: Tensor, width: int) -> Tensor:
    """The ``width`` lowest slots in the order: free ones first, then occupied ones.

    ``valid`` [capacity] bool → [width] int64, distinct. Occupied slots come up only when fewer
    than ``width`` are free; the caller writes to them what they already hold.
    """
    capacity = valid.shape[0]
    slot = torch.arange(capacity, device=valid.device)
    order = torch.where(valid, slot + capacity, slot)
    if width == 1:
        return order.amin(0, keepdim=True) % capacity
    return torch.topk(order, width, largest=False, sorted=True).values % capacity


def _write_rows(column: Tensor, slots: Tensor, rows: Tensor, live: Tensor, dim: int = 0) -> None:
    """Writes live rows into their slots; a padding row puts back what its slot holds."""
    kept = column.index_select(dim, slots)
    column.index_copy_(dim, slots, torch.where(live, rows, kept))


def _erase_slots(state: State, erase: Tensor) -> None:
    """Overwrites the slots with zeros (ids and positions with NOWHERE), leaving nothing behind."""
    asked = erase >= 0  # [E]
    any_asked = asked.any()
    # Padding repeats an erased slot; with none asked, slot 0 gets back what it holds.
    slots = torch.where(asked, erase, erase.amax().clamp(min=0))
    for column in state:
        dim = 2 if column.dim() == 4 else 0
        blank = NOWHERE if column is state.token_id or column is state.position else 0
        kept = column.index_select(dim, slots)
        blanks = torch.full_like(kept, blank)
        column.index_copy_(dim, slots, torch.where(any_asked, blanks, kept))


def patch(state: State, cursor: Cursor, plan: Plan) -> None:
    """Applies the plan in place: cull, erase, update columns, append, move the cursor."""
    rows = plan.rows
    width = rows.token_id.shape[0]

    state.valid.logical_and_(~plan.cull)
    state.brightness.copy_(plan.brightness)
    state.lit.copy_(plan.lit)
    if plan.pinned is not None:
        state.pinned.copy_(plan.pinned)
    if plan.erase is not None:
        _erase_slots(state, plan.erase)

    slots = lowest_free_slots(state.valid, width)  # [W]
    live = torch.arange(width, device=slots.device) < rows.length  # [W]
    _write_rows(state.keys, slots, plan.keys, live[:, None], dim=2)
    _write_rows(state.values, slots, plan.values, live[:, None], dim=2)
    _write_rows(state.token_id, slots, rows.token_id, live)
    _write_rows(state.position, slots, rows.position, live)
    _write_rows(state.brightness, slots, rows.brightness, live)
    _write_rows(state.surprise, slots, rows.surprise, live)
    _write_rows(state.novelty, slots, rows.novelty, live)
    _write_rows(state.source, slots, rows.source, live)
    _write_rows(state.born, slots, rows.born, live)
    _write_rows(state.lit, slots, rows.lit, live)
    _write_rows(state.pinned, slots, rows.pinned, live)
    _write_rows(state.valid, slots, torch.ones_like(live), live)

    for held, following in zip(cursor, plan.cursor, strict=True):
        held.copy_(following)
