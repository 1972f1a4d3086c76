"""Who sees whom, and what attention makes of it, against plain loops in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch._inductor.test_operators
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import compiled.attention
from compiled.attention import (
    Visibility,
    attend,
    attend_causally,
    attend_per_query,
    definition,
    visibility,
)
from plain import sees_new, sees_slot
from toys import raw_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, params=["joined", "streaming"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds for one token in the form that is compiled for a CPU too."""
    if request.param == "streaming":
        monkeypatch.setattr(
            compiled.attention, "streams_rows", lambda x, num_tokens: num_tokens == 1
        )


def visible_of(
    valid: list[bool], position: list[int], positions: list[int], length: int
) -> Visibility:
    return visibility(
        torch.tensor(valid), torch.tensor(position), torch.tensor(positions), torch.tensor(length)
    )


@given(st.data())
def test_visibility_is_the_rule_of_the_contract(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 8), "slots")
    count = data.draw(st.integers(1, 5), "tokens")
    length = data.draw(st.integers(0, count), "length")
    valid = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    # Rows have unique positions; slots without a row may hold anything.
    position = data.draw(st.lists(st.integers(0, 11), min_size=size, max_size=size, unique=True))
    positions = data.draw(st.lists(st.integers(0, 11), min_size=count, max_size=count, unique=True))
    cached, new, live = visible_of(valid, position, positions, length)
    assert cached.tolist() == [
        [sees_slot(valid, position, slot, mine, positions[:length]) for slot in range(size)]  # type: ignore[arg-type]
        for mine in positions
    ]
    assert new.tolist() == [
        [sees_new(i, j, positions, length) for j in range(count)] for i in range(count)
    ]
    assert live.tolist() == [float(i < length) for i in range(count)]


def test_visibility_edges() -> None:
    valid, position = [True, True, True, False], [3, 5, 7, 4]
    # Re-reading position 5: its own row hides itself, later rows and free slots are hidden.
    assert visible_of(valid, position, [5], 1).cached.tolist() == [[True, False, False, False]]
    # "As of" 4, where no row stands.
    assert visible_of(valid, position, [4], 1).cached.tolist() == [[True, False, False, False]]
    # Before everything: nothing to see but oneself.
    cached, new, _ = visible_of(valid, position, [0], 1)
    assert cached.tolist() == [[False] * 4]
    assert new.tolist() == [[True]]
    # Two neighbours re-read at once: the later sees the new row of the earlier, not the old one.
    cached, new, _ = visible_of(valid, position, [5, 7], 2)
    assert cached.tolist() == [[True, False, False, False]] * 2
    assert new.tolist() == [[True, False], [True, True]]
    # In any order.
    assert visible_of(valid, position, [7, 5], 2).new.tolist() == [[True, True], [False, True]]
    # Padding hides nothing from anybody and is seen by nobody.
    cached, new, _ = visible_of(valid, position, [9, 3, 5], 1)
    assert cached[0].tolist() == [True, True, True, False]
    assert new[0].tolist() == [True, False, False]


def run(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:
    """``attend``, its mass parted into that of slots and that of new tokens."""
    attended, mass = attend(query, keys, values, new_keys, new_values, visible)
    assert mass.shape == (keys.shape[1] + query.shape[0],)
    return attended, mass[: keys.shape[1]], mass[keys.shape[1] :]


def plain_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax at a time, in float64."""
    num_tokens, heads, head_dim = query.shape
    group = heads // keys.shape[0]
    attended = torch.zeros(num_tokens, heads, head_dim, dtype=torch.float64)
    mass, own_mass = torch.zeros(keys.shape[1]).double(), torch.zeros(num_tokens).double()
    for i in range(num_tokens):
        slots = [int(s) for s in torch.nonzero(visible.cached[i])]
        others = [int(j) for j in torch.nonzero(visible.new[i])]
        for h in range(heads):
            k = torch.cat([keys[h // group, slots], new_keys[h // group, others]]).double()
            v = torch.cat([values[h // group, slots], new_values[h // group, others]]).double()
            shares = torch.softmax(k @ query[i, h].double() / math.sqrt(head_dim), 0)
            attended[i, h] = shares @ v
            for index, slot in enumerate(slots):
                mass[slot] += shares[index] * visible.live[i]
            for index, other in enumerate(others):
                own_mass[other] += shares[len(slots) + index] * visible.live[i]
    return attended.flatten(1), mass, own_mass


def toy_attention(
    heads: int, kv_heads: int, num_tokens: int, *, capacity: int = 11, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Visibility]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    valid = torch.rand(capacity, generator=generator) < 0.7
    position = torch.randperm(2 * capacity, generator=generator)[:capacity]
    positions = torch.randperm(2 * capacity, generator=generator)[:num_tokens]
    visible = visibility(valid, position, positions, torch.tensor(max(1, num_tokens - 1)))
    rows, new_rows = (kv_heads, capacity, 8), (kv_heads, num_tokens, 8)
    return (
        random(num_tokens, heads, 8), random(*rows), random(*rows),
        random(*new_rows), random(*new_rows), visible,
    )  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1), (6, 2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_attention_is_that_of_plain_loops(heads: int, kv_heads: int, num_tokens: int) -> None:
    arguments = toy_attention(heads, kv_heads, num_tokens)
    ours, expected = run(*arguments), plain_attend(*arguments)
    for tensor, plain in zip(ours, expected, strict=True):
        # Dot products of 8 float32 numbers and sums of 16 shares: some dozen roundings of 2^-24.
        torch.testing.assert_close(tensor.double(), plain, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_I8_mass_is_conserved_by_attention(dtype: torch.dtype, num_tokens: int) -> None:
    *tensors, visible = toy_attention(6, 2, num_tokens)
    assert isinstance(visible, Visibility)
    query, keys, values, new_keys, new_values = (tensor.to(dtype) for tensor in tensors)
    attended, mass, own_mass = run(query, keys, values, new_keys, new_values, visible)
    assert attended.dtype == dtype
    # Shares are normalised in float32 whatever the dtype: a few roundings of 2^-24.
    live = float(visible.live.sum())
    assert float(mass.sum() + own_mass.sum()) == pytest.approx(6 * live, rel=1e-6)
    hidden = ~visible.cached[: int(live)].any(0)
    assert hidden.any()
    assert (mass[hidden] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_I5_hidden_slots_leave_no_bit_in_attention(dtype: torch.dtype) -> None:
    *tensors, visible = toy_attention(4, 2, 3)
    assert isinstance(visible, Visibility)
    hidden = ~visible.cached.any(0)
    assert hidden.any()
    biggest = torch.finfo(dtype).max
    results = []
    for garbage in (0.0, 1.0, biggest, -biggest):
        query, keys, values, new_keys, new_values = (
            tensor.to(dtype, copy=True) for tensor in tensors
        )
        keys[:, hidden], values[:, hidden] = garbage, -garbage
        keys[:, hidden, ::2] *= -1  # dot products of inf - inf
        outputs = run(query, keys, values, new_keys, new_values, visible)
        results.append([raw_bytes(tensor) for tensor in outputs])
    assert results[0] == results[1] == results[2] == results[3]


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    keys = torch.tensor([[[300.0], [-300.0]]])
    values = torch.tensor([[[1.0], [2.0]]])
    visible = visible_of([True, True], [0, 1], [5], 1)
    zero = torch.zeros(1, 1, 1)
    attended, mass, own_mass = run(torch.full((1, 1, 1), 300.0), keys, values, zero, zero, visible)
    assert attended.tolist() == [[1.0]]
    assert mass.tolist() == [1.0, 0.0]
    assert own_mass.tolist() == [0.0]
    # However far below a visible score lies, a hidden slot stays lower.
    visible = visible_of([False, True], [0, 1], [5], 1)
    low = torch.full((1, 1, 1), -300.0)
    attended, mass, own_mass = run(torch.full((1, 1, 1), 300.0), keys, values, low, zero, visible)
    assert mass.tolist() == [0.0, 0.5]
    assert own_mass.tolist() == [0.5]


@pytest.mark.parametrize("bucket", [0, 6])
@pytest.mark.parametrize("tile", [1, 4, 11, 50])
def test_tiles_are_the_whole(bucket: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many queries attend at a time, and whether what they cannot see is computed."""
    generator = torch.Generator().manual_seed(tile)
    tokens, length = 11, 9
    query = torch.randn(tokens, 4, 8, generator=generator)
    keys, values = torch.randn(2, 2, bucket, 8, generator=generator)
    new_keys, new_values = torch.randn(2, 2, tokens, 8, generator=generator)
    positions = [*range(bucket, bucket + length), 0, 0]
    rows = torch.arange(bucket)
    visible = visibility(rows >= 0, rows, torch.tensor(positions), torch.tensor(length))
    tensors = (query, keys, values, new_keys, new_values, visible)
    monkeypatch.setattr(compiled.attention, "TILE", 1000)
    whole, mass = attend(*tensors)
    monkeypatch.setattr(compiled.attention, "TILE", tile)
    forms: list[Callable[..., tuple[Tensor, Tensor | None]]]
    forms = [attend, attend_per_query, attend_causally]
    # Padding sees rows behind it or does not; nobody looks at what it makes of them.
    for form in forms:
        attended, parts = form(*tensors)
        assert (parts is None) == (form is attend_causally)
        # The same sums of a few numbers of size 1 in another order: 2^-24 each.
        torch.testing.assert_close(attended[:length], whole[:length], rtol=1e-5, atol=1e-6)
        if parts is not None:
            parts = visible.live @ parts if parts.dim() == 2 else parts
            torch.testing.assert_close(parts, mass, rtol=1e-5, atol=1e-5)
            assert parts.sum().item() == pytest.approx(4 * length, rel=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_every_form_is_the_definition(heads: int, kv_heads: int, num_tokens: int) -> None:
    arguments = toy_attention(heads, kv_heads, num_tokens)
    visible = arguments[-1]
    attended, mass = definition(*arguments)
    # Some dozen roundings of 2^-24, as above.
    for form in (attend, attend_per_query):
        ours, parts = form(*arguments)
        torch.testing.assert_close(ours, attended, rtol=1e-5, atol=3e-6)
        summed = visible.live @ parts if parts.dim() == 2 else parts
        torch.testing.assert_close(summed, mass, rtol=1e-5, atol=3e-6)
    plain = torch.cat(plain_attend(*arguments)[1:])
    torch.testing.assert_close(mass.double(), plain, rtol=1e-5, atol=3e-6)
