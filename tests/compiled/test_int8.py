"""Weights in eight bits."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiled.int8 import Int8, dequantize, num_rows, part, quantize
from compiled.linear import embed, linear
from compiled.llama import LayerWeights, Weights, layer_weights
from compiled.read import read, scored_prefill
from toys import toy_config, toy_state, toy_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def in_eight_bits(weights: Weights) -> Weights:
    """Every matrix rounded; the head stays the embedding where it was."""
    matrices = ("embedding", "qkv", "attention_out", "gate_up", "down", "head")
    rounded: dict[str, Any] = {
        name: quantize(dequantize(getattr(weights, name))) for name in matrices
    }
    if weights.head is weights.embedding:
        rounded["head"] = rounded["embedding"]
    return weights._replace(**rounded)


def told_again(weights: Weights) -> Weights:
    """The same numbers, as float32 matrices."""
    fields: dict[str, Any] = {
        name: dequantize(value) if isinstance(value, Int8) else value
        for name, value in zip(Weights._fields, weights, strict=True)
    }
    return Weights(**fields)


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.integers(0, 2**31),
)
def test_every_number_is_off_by_half_a_step_at_most(
    rows: int, columns: int, size: float, seed: int
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    matrix[0] = 0
    rounded = quantize(matrix)
    assert rounded.values.dtype == torch.int8
    assert rounded.scale.dtype == torch.float32
    step = matrix.abs().amax(-1, keepdim=True) / 127
    # Half a step, and the float32 rounding of the scale times up to 127 of it.
    error = (dequantize(rounded) - matrix).abs()
    assert bool((error <= step * (0.5 + 1e-4) + 1e-38).all())
    assert (dequantize(rounded)[0] == 0).all()


def test_a_matrix_of_its_own_numbers_is_kept_exactly() -> None:
    values = torch.tensor([[127, -3, 0], [-127, 64, 1]], dtype=torch.int8)
    rounded = quantize(values.float() * torch.tensor([[0.5], [2.0]]))
    assert torch.equal(rounded.values, values)
    assert rounded.scale.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("shape", [(40, 64), (40, 20), (39, 64), (7, 24)])
def test_a_product_is_that_of_the_numbers_told(
    shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = quantize(torch.randn(shape, generator=generator))
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    product = linear(x, matrix)
    assert product.dtype == dtype
    exact = x.double() @ dequantize(matrix).double().T
    # Up to 64 terms of size 1 at 2^-24 each; in bfloat16 the sum and the scaled sum, 2^-9 each.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(product.double(), exact, rtol=tolerance, atol=tolerance)
    tokens = torch.tensor([3, 0, shape[0] - 1])
    assert torch.equal(embed(tokens, matrix), dequantize(matrix)[tokens])


def test_sums_that_float16_cannot_hold_are_scaled_first() -> None:
    matrix = quantize(torch.full((8, 64), 0.01))
    product = linear(torch.full((3, 64), 600.0, dtype=torch.float16), matrix)
    assert product.dtype == torch.float16
    torch.testing.assert_close(product.float(), torch.full((3, 8), 384.0), rtol=2**-9, atol=0)


def test_parts_are_views_and_layers_are_flat() -> None:
    weights = in_eight_bits(toy_weights(toy_config()))
    layer = layer_weights(weights, 1)
    assert isinstance(layer.qkv, Int8)
    assert isinstance(weights.qkv, Int8)
    assert layer.qkv.values.data_ptr() == weights.qkv.values[1].data_ptr()
    again = LayerWeights.from_tensors(layer.tensors())
    for one, other in zip(again.tensors(), layer.tensors(), strict=True):
        assert one is other
    rows = part(weights.head, slice(2, 5))
    assert num_rows(rows) == 3
    assert torch.equal(dequantize(rows), dequantize(weights.head)[2:5])
    assert all(isinstance(tensor, Tensor) for tensor in weights.tensors())


def test_a_read_in_eight_bits_is_a_read_of_the_rounded_model() -> None:
    config = toy_config()
    weights, state = in_eight_bits(toy_weights(config)), toy_state(config, 12, {0: 0, 5: 1})
    tokens, positions = torch.tensor([3, 8, 1]), torch.tensor([10, 11, 12])
    arguments = (state, tokens, positions, torch.tensor(3))
    ours = read(config, weights, *arguments, bucket=12)
    plain = read(config, told_again(weights), *arguments, bucket=12)
    for one, other in zip(ours, plain, strict=True):
        # The scale after the sum instead of before it: roundings of 2^-24 in sums of 24 terms.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    targets = torch.tensor([8, 1, 4])
    told = scored_prefill(config, weights, *arguments, targets, bucket=12)
    expected = scored_prefill(config, told_again(weights), *arguments, targets, bucket=12)
    torch.testing.assert_close(told.surprises, expected.surprises, rtol=1e-4, atol=1e-5)
