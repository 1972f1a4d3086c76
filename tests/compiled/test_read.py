"""The read against a plain float64 reference, at every edge of the visibility rule."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brain.machine.cpu_operator import native_libraries
from compiled.llama import LlamaConfig, Weights
from compiled.matrix import dequantize
from compiled.read import Reading, read, scored_prefill, trimmed
from compiled.read_cpu import Formats, operator
from compiled.sample import surprises
from compiled.state import State
from plain import PlainReading, plain_read
from toys import EVERYTHING, digest, raw_bytes, toy_config, toy_state, toy_weights

CAPACITY = 10
ROWS = {0: 0, 1: 1, 2: 2, 3: 3, 5: 9, 6: 4, 8: 7}  # slot → position: holes, and out of order


Run = Callable[..., Reading]
"""A read of lists: (config, weights, state, tokens, positions, length[, bucket])."""


@pytest.fixture(scope="module", params=["layers", "operator", "operator on 3 threads"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The layers in PyTorch, and the operator that stands for them."""
    decode = None
    if request.param != "layers":
        decode = operator(native_libraries(Formats("float", "float")).read)

    def run_(
        config: LlamaConfig,
        weights: Weights,
        state: State,
        tokens: list[int],
        positions: list[int],
        length: int,
        bucket: int = CAPACITY,
    ) -> Reading:
        placed = torch.tensor(tokens), torch.tensor(positions), torch.tensor(length)
        return read(config, weights, state, *placed, bucket=bucket, decode=decode)

    before = torch.get_num_threads()
    torch.set_num_threads(3 if request.param.endswith("threads") else 1)
    yield run_
    torch.set_num_threads(before)


def assert_agrees(reading: Reading, expected: PlainReading, length: int) -> None:
    """Every output of every live token. Float32 against float64: products of 24 to 40 terms of
    order 1 through two layers, some hundred roundings of 2^-24, amplified by the softmax."""
    for name, theirs in vars(expected).items():
        ours, plain = getattr(reading, name), torch.from_numpy(theirs)
        if name in ("new_keys", "new_values"):
            ours, plain = ours[:, :, :length], plain[:, :, :length]
        elif name == "logits":
            ours, plain = ours[:length], plain[:length]
        torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=5e-5, msg=name)


CASES = {
    "next token": ([3], [10], 1),
    "re-reads the last": ([3], [9], 1),
    "re-reads one within": ([3], [3], 1),
    "as of an old position": ([3], [5], 1),
    "sees nothing": ([3], [0], 1),
    "far away": ([3], [1_000_000], 1),
    "chunk": ([3, 4, 5], [10, 11, 12], 3),
    "chunk with padding": ([3, 4, 0, 0], [10, 11, 0, 0], 2),
    "padding over a row": ([3, 9, 9], [10, 4, 7], 1),
    "nothing but padding": ([0, 0], [0, 0], 0),
    "neighbours re-read together": ([3, 4], [3, 4], 2),
    "out of order": ([3, 4, 5, 6], [12, 2, 10, 7], 4),
    "out of order with padding": ([3, 4, 5, 6], [12, 2, 10, 7], 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "more"),
    [(2, 2, {}), (4, 2, {}), (3, 1, {}), *((4, 2, {k: v}) for k, v in EVERYTHING.items())],
)
def test_read_is_that_of_plain_loops(
    run: Run, case: str, heads: int, kv_heads: int, more: dict[str, Any]
) -> None:
    tokens, positions, length = CASES[case]
    config = dataclasses.replace(toy_config(heads, kv_heads), **more)
    weights, state = toy_weights(config), toy_state(config, CAPACITY, ROWS)
    reading = run(config, weights, state, tokens, positions, length)
    assert_agrees(reading, plain_read(config, weights, state, tokens, positions, length), length)


def test_an_empty_memory_is_read_like_any_other(run: Run) -> None:
    config = toy_config()
    weights, state = toy_weights(config), toy_state(config, CAPACITY, {})
    tokens, positions = [1, 2, 3], [0, 1, 2]
    expected = plain_read(config, weights, state, tokens, positions)
    for bucket in (1, CAPACITY):
        reading = run(config, weights, state, tokens, positions, 3, bucket)
        assert_agrees(reading, expected, 3)
        assert (reading.mass == 0).all()


@settings(max_examples=40)
@given(st.data())
def test_read_is_that_of_plain_loops_anywhere(run: Run, data: st.DataObject) -> None:
    config = dataclasses.replace(toy_config(4, 2), **data.draw(st.sampled_from([{}, EVERYTHING])))
    slots = data.draw(st.lists(st.integers(0, CAPACITY - 1), unique=True), "slots")
    where = st.integers(0, 20)
    rows = data.draw(st.lists(where, min_size=len(slots), max_size=len(slots), unique=True))
    positions = data.draw(st.lists(where, min_size=1, max_size=5, unique=True), "positions")
    length = data.draw(st.integers(1, len(positions)), "length")
    tokens = [7 * index % config.vocab_size for index, _ in enumerate(positions)]
    bucket = data.draw(st.integers(max(slots, default=0) + 1, CAPACITY), "bucket")
    weights = toy_weights(config)
    state = toy_state(config, CAPACITY, dict(zip(slots, rows, strict=True)))
    reading = run(config, weights, state, tokens, positions, length, bucket)
    assert_agrees(reading, plain_read(config, weights, state, tokens, positions, length), length)
    # I8, here for every layout at once.
    assert float(reading.mass.sum() + reading.own_mass.sum()) == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_I8_mass_is_conserved_by_the_read(run: Run, case: str) -> None:
    tokens, positions, length = CASES[case]
    config = toy_config(3, 1)
    state = toy_state(config, CAPACITY, ROWS)
    reading = run(config, toy_weights(config), state, tokens, positions, length)
    # Sums of up to 40 float32 shares, each off by 2^-24.
    total = float(reading.mass.sum() + reading.own_mass.sum())
    assert total == pytest.approx(length, rel=1e-5, abs=1e-12)
    assert (reading.mass >= 0).all()
    assert (reading.own_mass[length:] == 0).all()
    assert (reading.mass[~state.valid] == 0).all()


def test_I1_a_read_writes_no_byte(run: Run) -> None:
    config = toy_config()
    weights, state = toy_weights(config), toy_state(config, CAPACITY, ROWS)
    inputs = (*weights.tensors(), *state)
    before = digest(*inputs), [tensor._version for tensor in inputs]
    for tokens, positions, length in CASES.values():
        reading = run(config, weights, state, tokens, positions, length)
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        assert not any(tensor.untyped_storage().data_ptr() in storages for tensor in reading)
    assert (digest(*inputs), [tensor._version for tensor in inputs]) == before


def test_I5_hidden_rows_leave_no_bit_in_the_read(run: Run) -> None:
    config = toy_config()
    weights = toy_weights(config)
    for tokens, positions, length in CASES.values():
        results = []
        for seed in (1, 2):
            state = toy_state(config, CAPACITY, ROWS)
            generator = torch.Generator().manual_seed(seed)
            for slot in range(CAPACITY):
                where = int(state.position[slot])
                seen = bool(state.valid[slot]) and where < max(positions[: max(1, length)])
                if not seen or where in positions[:length]:
                    noise = torch.randn(2, *state.keys[:, :, slot].shape, generator=generator)
                    state.keys[:, :, slot], state.values[:, :, slot] = noise * 1e38
            reading = trimmed(run(config, weights, state, tokens, positions, length), length)
            results.append([raw_bytes(tensor) for tensor in reading])
        assert results[0] == results[1]


def test_the_bucket_changes_rounding_only(run: Run) -> None:
    config = toy_config()
    weights = toy_weights(config)
    state = toy_state(config, 40, {slot: slot for slot in range(9)})
    readings = [
        run(config, weights, state, [1, 2], [9, 10], 2, bucket) for bucket in (9, 10, 16, 40)
    ]
    for reading in readings[1:]:
        assert reading.mass.shape == (40,)
        for name in ("logits", "new_keys", "new_values", "mass", "own_mass"):
            # The same sums with zeros added, perhaps in another order: a few roundings of 2^-24.
            torch.testing.assert_close(
                getattr(reading, name), getattr(readings[0], name), rtol=1e-5, atol=1e-5
            )


def test_padding_changes_rounding_only(run: Run) -> None:
    config = toy_config()
    weights, state = toy_weights(config), toy_state(config, CAPACITY, ROWS)
    exact = run(config, weights, state, [3, 4], [10, 11], 2)
    for token, position in ((0, 0), (39, 10), (5, 11), (5, 1 << 40)):
        padded = run(config, weights, state, [3, 4, token, token], [10, 11, position, position], 2)
        for ours, expected in zip(trimmed(padded, 2), exact, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_trimmed_drops_padding_and_nothing_else(run: Run) -> None:
    config = toy_config()
    state = toy_state(config, CAPACITY, ROWS)
    reading = run(config, toy_weights(config), state, [1, 2, 3], [10, 11, 0], 2)
    kept = trimmed(reading, 2)
    assert kept.logits.shape == (2, config.vocab_size)
    assert kept.new_keys.shape == kept.new_values.shape == (2, 2, 2, 8)
    assert kept.own_mass.shape == (2,)
    assert kept.mass is reading.mass
    assert torch.equal(kept.new_keys, reading.new_keys[:, :, :2])


def test_rounding_of_the_reference_is_not_what_is_compared(run: Run) -> None:
    """The comparisons above can fail: a wrong scale, theta or epsilon is far out of tolerance."""
    config = toy_config()
    weights, state = toy_weights(config), toy_state(config, CAPACITY, ROWS)
    expected = plain_read(config, weights, state, [3, 4], [10, 11])
    wrong_theta = weights._replace(inverse_frequencies=weights.inverse_frequencies * 1.01)
    with pytest.raises(AssertionError):
        assert_agrees(run(config, wrong_theta, state, [3, 4], [10, 11], 2), expected, 2)
    wrong_scale = weights._replace(qkv=dequantize(weights.qkv) * math.sqrt(1.001))
    with pytest.raises(AssertionError):
        assert_agrees(run(config, wrong_scale, state, [3, 4], [10, 11], 2), expected, 2)
    wrong_eps = dataclasses.replace(config, rms_norm_eps=1e-2)
    with pytest.raises(AssertionError):
        assert_agrees(run(wrong_eps, weights, state, [3, 4], [10, 11], 2), expected, 2)


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["a Llama", "everything"])
def test_a_scored_prefill_is_a_read_with_surprises_instead_of_logits(more: dict[str, Any]) -> None:
    config = dataclasses.replace(toy_config(), **more)
    weights, state = toy_weights(config), toy_state(config, CAPACITY, ROWS)
    tokens, positions = torch.tensor([3, 8, 1, 0]), torch.tensor([10, 11, 12, 0])
    length, targets = torch.tensor(3), torch.tensor([8, 1, 39, 0])
    arguments = (config, weights, state, tokens, positions, length)
    reading = read(*arguments, bucket=CAPACITY)
    scored = scored_prefill(*arguments, targets, bucket=CAPACITY)
    # One mask on top of all columns or of those that need it: the same numbers in other orders.
    for name in ("new_keys", "new_values"):
        rows, expected_rows = getattr(scored, name)[:, :, :3], getattr(reading, name)[:, :, :3]
        torch.testing.assert_close(rows, expected_rows, rtol=1e-5, atol=1e-6)
    # Logits of order 1 from products of 24 terms, summed in another order.
    expected = surprises(reading.logits, targets)
    torch.testing.assert_close(scored.surprises[:3], expected[:3], rtol=1e-5, atol=1e-5)
