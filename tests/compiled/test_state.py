"""The tensors of the memory: shapes, dtypes, size and emptiness."""

import pytest
import torch

from compiled.state import NOWHERE, State, addresses, allocate_cursor, allocate_state, state_bytes
from toys import CPU, toy_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_a_new_memory_is_empty_and_as_large_as_foretold(dtype: torch.dtype, capacity: int) -> None:
    config = toy_config()
    state = allocate_state(config, capacity, dtype, CPU)
    assert state.capacity == capacity
    assert not state.valid.any()
    assert (state.position == NOWHERE).all()
    assert (state.token_id == NOWHERE).all()
    rows = (config.num_layers, config.num_kv_heads, capacity, config.head_dim)
    assert state.keys.shape == state.values.shape == rows
    assert sum(tensor.nbytes for tensor in state) == state_bytes(config, capacity, dtype)


def test_dtypes_are_those_of_the_contract() -> None:
    state = allocate_state(toy_config(), 3, torch.bfloat16, CPU)
    assert {name: tensor.dtype for name, tensor in state._asdict().items()} == {
        "keys": torch.bfloat16,
        "values": torch.bfloat16,
        "token_id": torch.int64,
        "position": torch.int64,
        "brightness": torch.float32,
        "surprise": torch.float32,
        "novelty": torch.float32,
        "source": torch.uint8,
        "born": torch.int64,
        "lit": torch.int64,
        "valid": torch.bool,
        "pinned": torch.bool,
    }


def test_a_memory_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        allocate_state(toy_config(), 0, torch.float32, CPU)


def test_every_tensor_has_an_address_of_its_own() -> None:
    state = allocate_state(toy_config(), 5, torch.float32, CPU)
    assert set(addresses(state)) == set(State._fields)
    assert len(set(addresses(state).values())) == len(State._fields)


def test_a_new_cursor_stands_nowhere() -> None:
    cursor = allocate_cursor(CPU)
    assert int(cursor.position) == NOWHERE
    assert int(cursor.uncommitted) == int(cursor.tick) == 0
