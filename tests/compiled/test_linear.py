"""The streaming form of every product is the product."""

import math

import pytest
import torch
import torch._inductor.test_operators

import compiled.linear
from compiled import torch_private
from compiled.int8 import quantize
from compiled.linear import dot_rows, linear, streams_rows
from compiled.matrix import Matrix, dequantize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_is_the_same_product(
    dtype: torch.dtype, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, generator=generator).to(dtype)
    weight: Matrix = torch.randn(48, 64, generator=generator).to(dtype)
    if int8:
        weight = quantize(dequantize(weight))
    plain = linear(x, weight)
    monkeypatch.setattr(compiled.linear, "streams_rows", lambda x, num_tokens: True)
    streamed = linear(x, weight)
    assert plain.dtype == streamed.dtype == dtype
    assert plain.shape == streamed.shape == (1, 48)
    # Sums of 64 terms in another order: 2^-24 each. Bfloat16 rounds results to 2^-8.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(plain, streamed, rtol=tolerance, atol=tolerance)


def test_nothing_streams_in_eager_mode() -> None:
    assert not streams_rows(torch.zeros(1, 4), 1)


@pytest.fixture(params=[False, True], ids=["narrow", "wide"])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a processor without instructions for 16 bits, and as on one that has them."""
    monkeypatch.setattr(compiled.linear, "WIDE_ROWS", 20)
    monkeypatch.setattr(compiled.linear, "FEW_ROWS", 2)
    is_wide: bool = request.param

    def multiplies_wide(x: torch.Tensor) -> bool:
        if not is_wide and x.dtype != torch.float32 and not torch_private.multiplies_in(x.dtype):
            pytest.skip("this processor has no instructions for it")
        return is_wide and x.dtype != torch.float32

    monkeypatch.setattr(compiled.linear, "_multiplies_wide", multiplies_wide)
    return is_wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("int8", [False, True])
def test_a_product_is_the_product(rows: int, dtype: torch.dtype, int8: bool, wide: bool) -> None:
    """Whichever library makes it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, rows, 64, generator=generator).to(dtype)
    plain = torch.randn(48, 64, generator=generator).to(dtype)
    weight = quantize(plain) if int8 else plain
    exact = x.double() @ (dequantize(weight) if int8 else plain).double().T
    # 64 terms of size 1, rounded to 2^-24 each; in 16 bits the sum itself, to 2^-9 or 2^-11, and
    # eight-bit sums once more before they are scaled. Float16 rounds weights out of eight bits.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8 if not int8 else 2**-7
    alone = torch.stack([linear(one, weight) for one in x])
    assert alone.dtype == dtype
    torch.testing.assert_close(alone.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_added_is_added_by_whichever_library(
    heads: int, dtype: torch.dtype, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(heads, 6, 8, generator=generator).to(dtype)
    rows = torch.randn(heads, 5, 8, generator=generator).to(dtype)
    barrier = torch.zeros(6, 5, dtype=dtype)
    barrier[:, 3:] = -math.inf
    scores = dot_rows(query, rows, barrier)
    open_columns, closed = scores[..., :3], scores[..., 3:]
    assert torch.equal(closed, torch.full_like(closed, -math.inf))
    exact = query.double() @ rows.double().transpose(1, 2)
    # 8 terms of size 1, rounded to 2^-24 each; in bfloat16 the sum itself, to 2^-9.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(
        open_columns.double(), exact[..., :3], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_added_before_the_sum_is_rounded(
    dtype: torch.dtype, rows: int, int8: bool
) -> None:
    """As in transformers. A bias that takes the rounded sum away leaves what was rounded off."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 64, generator=generator).to(dtype).expand(rows, 64).contiguous()
    plain = torch.randn(40, 64, generator=generator).to(dtype)
    weight: Matrix = quantize(plain) if int8 else plain
    exact = x[0].double() @ dequantize(weight).double().T
    bias = -exact.to(dtype)
    left = linear(x, weight, bias).double()
    step = 2.0**-24 if dtype == torch.float32 else 2.0**-9
    expected = (exact + bias).expand(rows, 40)
    if dtype == torch.bfloat16 and not int8:
        torch.testing.assert_close(left, expected, rtol=2**-7, atol=1e-5)
        assert float(expected.abs().amax()) > step
    else:  # sums of eight bits are rounded to 16 before they are scaled
        torch.testing.assert_close(left, expected, rtol=0, atol=64 * step)
    far = linear(x, weight, torch.full((40,), 100.0).to(dtype)).double()
    assert float((far - exact - 100).abs().amax()) < 264 * step
