"""What one patch is to change: the plan, and the plan that changes nothing.

``choose.py``, ``speculate.py`` and edits make plans. The one writer, ``patch.py``, carries them
out. Nothing here writes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compiled.llama import LlamaConfig
from compiled.read import ScoredPrefill
from compiled.state import COLUMNS, NOWHERE, ROW_COLUMNS, Cursor, State


class Plan(NamedTuple):
    """Everything that one patch changes. Replacing is culling and appending in the same plan.

    ``updates`` holds the columns that change for the rows that are already there; every other
    column is written for new rows alone. ``erase`` is None in the plan of an ordinary tick, and
    ``not_finite`` (compiled/finite.py) in that of an edit, whose host has looked already. The last
    two say what is known of a plan that no graph carries out: it then needs less room.
    """

    keys: Tensor  # [layers, kv_heads, W, head_dim] of the rows to append, RoPE applied
    values: Tensor  # [layers, kv_heads, W, head_dim]
    rows: dict[str, Tensor]  # [W] each: every column of the rows to append
    length: Tensor  # [] int64: how many of the W rows are written; the rest is padding
    cull: Tensor  # [capacity] bool: rows to forget
    updates: dict[str, Tensor]  # [capacity] each
    cursor: Cursor  # where the next read stands
    erase: Tensor | None = None  # [E] int64: slots to overwrite; NOWHERE is padding
    not_finite: Tensor | None = None  # [] int64: nothing is changed unless it is 0
    padded: bool = True  # whether ``length`` may be less than W
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


def empty_edit(
    config: LlamaConfig,
    state: State,
    cursor: Cursor,
    width: int,
    scored: ScoredPrefill | None = None,
) -> Plan:
    """An edit that changes nothing, to be filled with ``_replace``.

    Args:
        config: The model's dimensions.
        state: The memory.
        cursor: Its cursor.
        width: W, how many rows it has room for.
        scored: A prefill of that width whose keys and values the rows get.
    """
    device = state.valid.device

    def blank() -> Tensor:
        shape = (config.num_layers, config.num_kv_heads, width, config.head_dim)
        return torch.zeros(shape, dtype=state.keys.dtype, device=device)

    return Plan(
        keys=blank() if scored is None else scored.new_keys,
        values=blank() if scored is None else scored.new_values,
        rows={  # zeros, not empties: what a restore leaves in holes
            name: torch.zeros(width, dtype=COLUMNS[name].dtype, device=device)
            for name in ROW_COLUMNS
        },
        length=torch.zeros((), dtype=torch.int64, device=device),
        cull=torch.zeros_like(state.valid),
        updates={
            "brightness": state.brightness.add(0),
            "lit": state.lit.add(0),
            "novelty": state.novelty.add(0),
            "pinned": state.pinned.logical_or(state.pinned),
        },
        cursor=Cursor(*(tensor.add(0) for tensor in cursor)),
        erase=torch.full((width,), NOWHERE, dtype=torch.int64, device=device),
    )
