"""Re-basing: positions become dense, and every key is where its new position would have put it."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiled.patch import dense_positions, rebase
from compiled.rope import inverse_frequencies, rotate, rotation
from compiled.state import State
from toys import digest, toy_config, toy_cursor, toy_state

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 12
THETA = 10_000.0
YES, NO = torch.tensor(True), torch.tensor(False)
FREQUENCIES = inverse_frequencies(8, THETA)
TABLE = torch.stack([FREQUENCIES, torch.zeros_like(FREQUENCIES)])
KINDS = (0, 1)  # the second layer does not rotate


def state_of(rows: dict[int, int], dtype: torch.dtype = torch.float32) -> tuple[State, Tensor]:
    """A state whose valid keys are RoPE of known vectors at their positions, and the vectors."""
    state = toy_state(toy_config(), CAPACITY, rows)
    plain = state.keys.clone()  # [layers, kv_heads, capacity, head_dim], before RoPE
    cos, sin = rotation(state.position, TABLE)
    turned = torch.stack(
        [rotate(plain[n].transpose(0, 1), cos[kind], sin[kind]) for n, kind in enumerate(KINDS)]
    )
    valid = state.valid[None, None, :, None]
    keys = torch.where(valid, turned.transpose(1, 2), plain)
    return state._replace(keys=keys.to(dtype), values=state.values.to(dtype)), plain


def expected_keys(plain: Tensor, position: Tensor) -> npt.NDArray[np.float64]:
    """RoPE of the vectors at these positions, in float64; of the second layer none."""
    first, second = plain.double().numpy()[..., :4], plain.double().numpy()[..., 4:]
    angle = position.double().numpy()[:, None] * TABLE.numpy()[KINDS, None]  # [layers, slots, 4]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


@settings(max_examples=100)
@given(st.data())
def test_positions_become_dense_in_text_order(data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, CAPACITY - 1), unique=True), "slots")
    where = data.draw(
        st.lists(st.integers(0, 1 << 40), min_size=len(slots), max_size=len(slots), unique=True)
    )
    valid, position = torch.zeros(CAPACITY, dtype=torch.bool), torch.full((CAPACITY,), 7)
    valid[slots] = True
    position[slots] = torch.tensor(where, dtype=torch.int64)
    dense = dense_positions(valid, position)
    assert dense[slots].tolist() == [sorted(where).index(p) for p in where]
    assert dense[~valid].tolist() == position[~valid].tolist()


def test_keys_are_where_their_new_positions_would_have_put_them() -> None:
    rows = {1: 8000, 2: 3, 5: 8191, 7: 4, 8: 6000}
    state, plain = state_of(rows)
    cursor = toy_cursor(8192)
    cursor.uncommitted.fill_(1)
    before = {name: tensor.clone() for name, tensor in state._asdict().items()}
    rebase(KINDS, state, cursor, TABLE, YES)
    assert {slot: int(state.position[slot]) for slot in rows} == {1: 3, 2: 0, 5: 4, 7: 1, 8: 2}
    assert cursor.position.tolist() == [5]  # behind the newest of five rows
    slots = sorted(rows)
    expected = expected_keys(plain, state.position)[:, :, slots]
    # Two rotations of values of order 1, each rounded to 2^-24.
    np.testing.assert_allclose(state.keys[:, :, slots].numpy(), expected, atol=1e-6)
    free = [slot for slot in range(CAPACITY) if slot not in rows]
    assert torch.equal(state.keys[:, :, free], before["keys"][:, :, free])
    assert torch.equal(state.keys[1], before["keys"][1])  # it does not rotate
    for name in set(State._fields) - {"keys", "position"}:
        assert torch.equal(getattr(state, name), before[name]), name


def test_a_cursor_on_a_remembered_row_stays_on_it() -> None:
    state, _ = state_of({0: 50, 3: 90, 4: 70})
    cursor = toy_cursor(90)
    rebase(KINDS, state, cursor, TABLE, YES)
    assert cursor.position.tolist() == [2] == [int(state.position[3])]


@pytest.mark.parametrize("rows", [{}, {0: 0, 1: 1, 2: 2}, {4: 17, 2: 900}])
def test_nothing_changes_where_it_is_not_wanted(rows: dict[int, int]) -> None:
    state, _ = state_of(rows)
    cursor = toy_cursor(1000)
    before = digest(*state, *cursor)
    rebase(KINDS, state, cursor, TABLE, NO)
    assert digest(*state, *cursor) == before


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_a_hundred_rebasings_drift_within_a_bound(dtype: torch.dtype, bound: float) -> None:
    """The README's bound. Each re-basing rounds once: 2^-25 of a value in float32, 2^-9 in
    bfloat16, uniformly about half of that; a hundred of them in a random walk make
    10 * 2^-9 / sqrt(3) = 1.1%."""
    rows = {slot: 20_000 + 700 * slot for slot in range(CAPACITY)}
    state, plain = state_of(rows, dtype)
    cursor = toy_cursor(40_000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        # Time passes: every row is where it would be had the loop gone on for up to 8,000 ticks.
        ahead = torch.randint(0, 8000, (CAPACITY,), generator=generator).cumsum(0)
        cos, sin = rotation(ahead, TABLE)
        exact = [
            rotate(k.double().transpose(0, 1), cos[n], sin[n]).transpose(0, 1)
            for k, n in zip(state.keys, KINDS, strict=True)
        ]
        state.keys.copy_(torch.stack(exact).to(dtype))
        state.position.add_(ahead)
        rebase(KINDS, state, cursor, TABLE, YES)
    assert state.position.tolist() == list(range(CAPACITY))
    error = torch.from_numpy(expected_keys(plain, state.position)) - state.keys.double()
    drift = float(error.norm() / plain.double().norm())
    assert drift < 2 * bound  # the test's own turning forward rounds as often again
    assert drift > bound / 100  # it does round: the test can fail
