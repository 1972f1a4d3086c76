"""Small tensors of every kind that ``compiled/`` takes, without a model or a brain."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiled.llama import LlamaConfig, Weights, frequency_table, weight_shapes
from compiled.philox import key_of
from compiled.plan import Change, EditPlan, Plan
from compiled.sample import Sampling
from compiled.state import (
    COLUMNS,
    NOWHERE,
    ROW_COLUMNS,
    Cursor,
    State,
    allocate_cursor,
    allocate_state,
)

CPU = torch.device("cpu")


def toy_config(heads: int = 4, kv_heads: int = 2, *, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=20,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        max_position_embeddings=1 << 20,
    )


EVERYTHING: dict[str, Any] = {
    "qkv_bias": True,
    "qk_norm": True,
    "rotary_kinds": (0, 1),
    "embedding_scale": 1.7,
    "residual_scale": 0.6,
    "attention_scale": 0.3,
    "logit_divisor": 1.9,
}
"""All that a model of two layers may have and a Llama has not."""


def toy_weights(config: LlamaConfig, seed: int = 0) -> Weights:
    """Random weights that give lively attention and logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.5 * torch.randn(shape, generator=generator)
        for name, shape in weight_shapes(config).items()
    }
    tensors["inverse_frequencies"] = frequency_table(config)
    return Weights(**tensors)


def assert_same_weights(ours: Weights, theirs: Weights) -> None:
    """To the bit, and the same are absent."""
    for field in Weights._fields:
        one, other = getattr(ours, field), getattr(theirs, field)
        assert (one is None) == (other is None), field
        assert one is None or torch.equal(one, other), field


def toy_state(
    config: LlamaConfig, capacity: int, rows: Mapping[int, int], *, seed: int = 1
) -> State:
    """Random bytes in every slot, of which those in ``rows`` (slot → position) are remembered."""
    generator = torch.Generator().manual_seed(seed)
    state = allocate_state(config, capacity, torch.float32, CPU)
    state.keys.normal_(generator=generator)
    state.values.normal_(generator=generator)
    for column in (state.brightness, state.surprise, state.novelty):
        column.uniform_(0, 9, generator=generator)
    for column in (state.token_id, state.position, state.born, state.lit, state.source):
        column.random_(0, config.vocab_size, generator=generator)
    for slot, position in rows.items():
        state.valid[slot], state.position[slot] = True, position
    return state


def sampling_of(
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> Sampling:
    t, p, m, r = (torch.tensor(n) for n in (temperature, top_p, min_p, repetition_penalty))
    return Sampling(t, p, m, r, key_of(seed))


UPDATED_BY_TICKS = ("brightness", "lit", "novelty")
"""Columns that a tick changes for rows that are already there."""


def toy_cursor(position: int = NOWHERE, token: int = 0) -> Cursor:
    cursor = allocate_cursor(CPU)
    cursor.position.fill_(position)
    cursor.token.fill_(token)
    return cursor


def _some(dtype: torch.dtype, width: int, generator: torch.Generator) -> Tensor:
    """Random values that a column of this type may hold."""
    if dtype.is_floating_point:
        return torch.rand(width, generator=generator).to(dtype)
    most = {torch.bool: 2, torch.uint8: 5}.get(dtype, 40)
    return torch.randint(0, most, (width,), generator=generator).to(dtype)


def _toy_rows(state: State, width: int, generator: torch.Generator) -> dict[str, Any]:
    """Random keys, values and columns of new rows, by the name of a plan's field."""
    layers, kv_heads, _, head_dim = state.keys.shape
    shape = (layers, kv_heads, width, head_dim)
    rows = {name: _some(COLUMNS[name].dtype, width, generator) for name in ROW_COLUMNS}
    rows["position"] = torch.randint(1000, 1 << 40, (width,), generator=generator)
    return {
        "keys": torch.randn(shape, generator=generator).to(state.keys.dtype),
        "values": torch.randn(shape, generator=generator).to(state.keys.dtype),
        "rows": rows,
    }


def toy_plan(state: State, cursor: Cursor, width: int, length: int, *, seed: int = 2) -> Plan:
    """Ticks that append ``length`` random rows, in a plan of ``width``, and do nothing else."""
    return Plan(
        **_toy_rows(state, width, torch.Generator().manual_seed(seed)),
        length=torch.tensor(length),
        cull=torch.zeros_like(state.valid),
        updates={name: getattr(state, name).clone() for name in UPDATED_BY_TICKS},
        cursor=Cursor(*(tensor.clone() for tensor in cursor)),
        not_finite=torch.tensor(0),
    )


def toy_edit(
    state: State,
    cursor: Cursor,
    slots: Sequence[int] = (),
    *,
    cull: Sequence[int] = (),
    erase: Sequence[int] = (),
    changes: Mapping[str, Mapping[int, float]] | None = None,
    room: int | None = None,
    seed: int = 2,
) -> EditPlan:
    """An edit that puts random rows into ``slots``, forgets and erases others, and changes columns
    of some: by name, slot → value. With ``room`` every list is padded to that length.
    """

    def padded(values: Iterable[float], dtype: torch.dtype, padding: int = 0) -> Tensor:
        listed = list(values)
        listed += [padding] * (0 if room is None else room - len(listed))
        return torch.tensor(listed, dtype=dtype)

    def at(some: Iterable[int]) -> Tensor:
        return padded(some, torch.int64, NOWHERE)

    changed = {
        name: Change(at(values), padded(values.values(), COLUMNS[name].dtype))
        for name, values in (changes or {}).items()
    }
    width = len(slots) if room is None else room
    return EditPlan(
        **_toy_rows(state, width, torch.Generator().manual_seed(seed)),
        slots=at(slots),
        cull=at(cull),
        erase=at(erase),
        changes=changed,
        cursor=Cursor(*(tensor.clone() for tensor in cursor)),
        padded=room is not None,
    )


def raw_bytes(tensor: Tensor) -> bytes:
    """Every byte of a tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(*tensors: Tensor) -> str:
    """One hash of every byte of all of them."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(raw_bytes(tensor))
    return whole.hexdigest()
