"""Plans that change nothing: to be filled."""

import functools

import torch
from torch import Tensor

from compiled.llama import LlamaConfig
from compiled.patch import Plan, RowColumns
from compiled.read import ScoredPrefill
from compiled.state import NOWHERE, Cursor, State


def empty_edit(
    config: LlamaConfig,
    state: State,
    cursor: Cursor,
    width: int,
    learnt: ScoredPrefill | None = None,
) -> Plan:
    """An edit of a width that changes nothing, to be filled with ``_replace``; with the keys and
    values of a study of that width, if there is one.
    """
    device = state.valid.device
    new_rows = (config.num_layers, config.num_kv_heads, width, config.head_dim)

    def blank() -> Tensor:
        return torch.zeros(new_rows, dtype=state.keys.dtype, device=device)

    column = functools.partial(torch.zeros, width, device=device)
    rows = RowColumns(
        token_id=column(dtype=torch.int64),
        position=column(dtype=torch.int64),
        brightness=column(dtype=torch.float32),
        surprise=column(dtype=torch.float32),
        novelty=column(dtype=torch.float32),
        source=column(dtype=torch.uint8),
        born=column(dtype=torch.int64),
        lit=column(dtype=torch.int64),
        pinned=column(dtype=torch.bool),
        length=torch.zeros((), dtype=torch.int64, device=device),
    )
    return Plan(
        keys=blank() if learnt is None else learnt.new_keys,
        values=blank() if learnt is None else learnt.new_values,
        rows=rows,
        cull=torch.zeros_like(state.valid),
        brightness=state.brightness.add(0),
        lit=state.lit.add(0),
        novelty=state.novelty.add(0),
        cursor=Cursor(*(tensor.add(0) for tensor in cursor)),
        pinned=state.pinned.logical_or(state.pinned),
        erase=torch.full((width,), NOWHERE, dtype=torch.int64, device=device),
    )
