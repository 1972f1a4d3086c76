"""The streaming form of every product is the product."""

import pytest
import torch

import compiled.products
from compiled.products import dot_rows, linear, mix_rows, streams_rows, sum_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_is_the_same_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, generator=generator).to(dtype)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    query = torch.randn(2, 3, 8, generator=generator).to(dtype)
    rows = torch.randn(2, 30, 8, generator=generator).to(dtype)
    shares = torch.softmax(torch.randn(2, 3, 30, generator=generator), -1)
    live = torch.tensor([1.0, 1.0, 0.0])
    # Sums of 64 terms in another order: 2^-24 each. Bfloat16 rounds results (and shares) to 2^-8.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for plain, streamed in (
        (dot_rows(query, rows, False).float(), dot_rows(query, rows, True)),
        (mix_rows(shares, rows, False), mix_rows(shares, rows, True)),
        (sum_rows(shares, live, False), sum_rows(shares, live, True)),
    ):
        assert plain.dtype == streamed.dtype == torch.float32
        torch.testing.assert_close(plain, streamed, rtol=tolerance, atol=2 * tolerance)
    assert dot_rows(query, rows, False).dtype == dtype  # the softmax converts
    plain = linear(x, weight)
    monkeypatch.setattr(compiled.products, "streams_rows", lambda x, num_tokens: True)
    streamed = linear(x, weight)
    assert plain.dtype == streamed.dtype == dtype
    assert plain.shape == streamed.shape == (1, 48)
    torch.testing.assert_close(plain, streamed, rtol=tolerance, atol=tolerance)


def test_nothing_streams_in_eager_mode() -> None:
    assert not streams_rows(torch.zeros(1, 4), 1)
