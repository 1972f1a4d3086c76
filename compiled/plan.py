"""What one patch is to change: the plan of a tick, and that of an edit.

A tick changes a column of every row, an edit some rows. ``choose.py``, ``speculate.py`` and edits
make plans. The one writer, ``patch.py``, carries them out. Nothing here writes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compiled.llama import LlamaConfig
from compiled.read import ScoredPrefill
from compiled.state import COLUMNS, NOWHERE, ROW_COLUMNS, Cursor, State


class Plan(NamedTuple):
    """Everything that the patch of a tick changes, or that of several ticks of one pass.

    ``updates`` holds the columns that change for the rows that are already there; every other
    column is written for new rows alone. New rows go to the lowest free slots.
    """

    keys: Tensor  # [layers, kv_heads, W, head_dim] of the rows to append, RoPE applied
    values: Tensor  # [layers, kv_heads, W, head_dim]
    rows: dict[str, Tensor]  # [W] each: every column of the rows to append
    length: Tensor  # [] int64: how many of the W rows are written; the rest is padding
    cull: Tensor  # [capacity] bool: rows to forget
    updates: dict[str, Tensor]  # [capacity] each
    cursor: Cursor  # where the next read stands
    not_finite: Tensor  # [] int64 (compiled/finite.py): nothing is changed unless it is 0


class Change(NamedTuple):
    """New values of a column in some slots."""

    slots: Tensor  # [M] int64
    values: Tensor  # [M]


class EditPlan(NamedTuple):
    """Everything that the patch of an edit changes, slot by slot: it costs what it touches.

    The host knows the slots. No slot is named twice in one column: what ``cull``, ``erase`` and
    ``changes`` name is not in ``slots``. Replacing is naming the slot of an old row in ``slots``.

    Where graphs need fixed shapes, lists are filled up with NOWHERE in place of a slot. The last
    two fields say what is known of a plan that no graph carries out: it then needs less room.
    """

    keys: Tensor  # [layers, kv_heads, W, head_dim] of new rows, RoPE applied
    values: Tensor  # [layers, kv_heads, W, head_dim]
    rows: dict[str, Tensor]  # [W] each: every column of the new rows
    slots: Tensor  # [W] int64: where they go
    cull: Tensor  # [N] int64: slots whose rows are forgotten
    erase: Tensor  # [E] int64: slots whose rows are forgotten and overwritten
    changes: dict[str, Change]  # by column, for rows that stay
    cursor: Cursor  # where the next read stands
    padded: bool = True  # whether any slot may be NOWHERE
    only_appends: bool = False  # nothing padded, culled or erased: all rows go to free slots


def new_rows(width: int, device: torch.device, **given: Tensor) -> dict[str, Tensor]:
    """Every column of rows to append; a column that is not given holds what an empty slot holds.

    Args:
        width: W, how many rows.
        device: Where the columns that are not given are made.
        given: [W] each, by the column's name.
    """
    rows = {}
    for name in ROW_COLUMNS:
        column = COLUMNS[name]
        rows[name] = (
            given[name]
            if name in given
            else torch.full((width,), column.empty, dtype=column.dtype, device=device)
        )
    return rows


EDITED_COLUMNS = ("brightness", "novelty", "pinned")
"""Columns that an edit may change for rows that stay."""


def empty_edit(
    config: LlamaConfig,
    state: State,
    cursor: Cursor,
    width: int = 0,
    reach: int = 0,
    scored: ScoredPrefill | None = None,
) -> EditPlan:
    """An edit that changes nothing, to be filled with ``_replace``.

    Args:
        config: The model's dimensions.
        state: The memory.
        cursor: Its cursor.
        width: W, how many rows it has room for, and how many slots in every other list. 0: it has
            room for nothing, is not padded, and may be filled with lists of any length.
        reach: How many rows' novelty it may change.
        scored: A prefill of that width whose keys and values the rows get.
    """
    device = state.valid.device

    def blank() -> Tensor:
        shape = (config.num_layers, config.num_kv_heads, width, config.head_dim)
        return torch.zeros(shape, dtype=state.keys.dtype, device=device)

    def nowhere(length: int) -> Tensor:
        return torch.full((length,), NOWHERE, dtype=torch.int64, device=device)

    def unchanged(name: str) -> Change:
        slots = nowhere(reach if name == "novelty" else width)
        return Change(slots, torch.zeros_like(slots, dtype=COLUMNS[name].dtype))

    return EditPlan(
        keys=blank() if scored is None else scored.new_keys,
        values=blank() if scored is None else scored.new_values,
        rows=new_rows(width, device),
        slots=nowhere(width),
        cull=nowhere(width),
        erase=nowhere(width),
        changes={name: unchanged(name) for name in EDITED_COLUMNS} if width else {},
        cursor=Cursor(*(tensor.add(0) for tensor in cursor)),
        padded=width > 0,
    )
