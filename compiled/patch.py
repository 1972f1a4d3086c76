"""The patch: step 0/4, the only code in this package that writes tensors in place.

    patch(state, cursor, plan) → None
    rebase(state, cursor, inverse_frequencies, wanted) → None

The patch culls, erases, appends and replaces. Keys, values and mirror columns of a slot are written
by the same graph: two blades of one knife. Culling clears ``valid``, O(1) per row; appending takes
the lowest free slots and moves O(rows written) bytes. Nothing here is proportional to the size of
the cache: the only O(capacity) work is scanning and writing single mirror columns.

The plan is fixed in shape and validated before the graph runs. Once it runs it cannot fail.

Re-basing renumbers positions densely in text order and turns every key by the difference. It does
touch the whole cache, so it runs only when the positions would leave the range that the model was
trained on: once in thousands of ticks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compiled.rope import rotate_rows, rotation
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
    novelty: Tensor  # [capacity] float32: of the rows that are already there
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


def _write_cache(cache: Tensor, slots: Tensor, rows: Tensor, live: Tensor) -> None:
    """The same for the keys or values [layers, kv_heads, W, head_dim] of all layers: one by one
    where nothing fuses the steps, so that a long text is not held a third and a fourth time.
    """
    whole = slots.shape[0] == 1 or torch.compiler.is_compiling()
    for held, new in [(cache, rows)] if whole else zip(cache, rows, strict=True):
        _write_rows(held, slots, new, live[:, None], dim=held.dim() - 2)


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
    state.novelty.copy_(plan.novelty)
    if plan.pinned is not None:
        state.pinned.copy_(plan.pinned)
    if plan.erase is not None:
        _erase_slots(state, plan.erase)

    slots = lowest_free_slots(state.valid, width)  # [W]
    live = torch.arange(width, device=slots.device) < rows.length  # [W]
    _write_cache(state.keys, slots, plan.keys, live)
    _write_cache(state.values, slots, plan.values, live)
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


def dense_positions(valid: Tensor, position: Tensor) -> Tensor:
    """Each valid row's place in text order, from 0; a row that is not valid keeps its position.

    ``valid`` [capacity] bool, ``position`` [capacity] int64 → [capacity] int64.
    """
    last = torch.iinfo(torch.int64).max
    order = torch.argsort(torch.where(valid, position, last))
    place = torch.arange(valid.shape[0], device=valid.device)
    return torch.where(valid, torch.empty_like(place).scatter(0, order, place), position)


def rebase(state: State, cursor: Cursor, inverse_frequencies: Tensor, wanted: Tensor) -> None:
    """Renumbers all rows densely, in place; does nothing where ``wanted`` [] bool is false.

    Every key is turned once, by the whole difference, in float32 from float64 angles: one rounding
    to the cache's dtype, where turning step by step would round a thousand times. The cursor comes
    to stand on the newest row, or behind it if its token has no row yet.
    """
    moving = state.valid & wanted  # [capacity]
    dense = torch.where(moving, dense_positions(state.valid, state.position), state.position)
    cos, sin = rotation(dense - state.position, inverse_frequencies)  # [capacity, head_dim / 2]
    for keys in state.keys:  # [kv_heads, capacity, head_dim], a view: never a second cache
        keys.copy_(torch.where(moving[:, None], rotate_rows(keys, cos, sin), keys))
    state.position.copy_(dense)
    behind = state.valid.sum() - 1 + cursor.uncommitted
    cursor.position.copy_(torch.where(wanted, behind, cursor.position))
