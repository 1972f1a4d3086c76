"""A brain whose matrices are rounded to eight bits."""

import pytest
import torch

from compiled.int8 import Int8
from compiled.matrix import dequantize
from fixture_types import OpenTiny

IDS = [(7 * token) % 300 for token in range(40)]


def test_weights_are_rounded_and_everything_else_is_not(open_tiny: OpenTiny) -> None:
    plain = open_tiny(dtype="bfloat16").checkpoint.weights
    rounded = open_tiny(dtype="bfloat16", weights="int8").checkpoint.weights
    for name in ("embedding", "qkv", "attention_out", "gate_up", "down", "head"):
        matrix, exact = getattr(rounded, name), dequantize(getattr(plain, name)).float()
        assert isinstance(matrix, Int8), name
        step = exact.abs().amax(-1, keepdim=True) / 127
        # Half a step of rounding; the exact weights are themselves seen in bfloat16, off by 2^-9.
        error = (dequantize(matrix) - exact).abs()
        assert bool((error <= 0.5 * step + 2**-8 * exact.abs() + 2**-8 * step).all()), name
    assert rounded.final_norm.equal(plain.final_norm)
    assert rounded.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_and_eager_reads_agree_in_eight_bits(dtype: str, open_tiny: OpenTiny) -> None:
    overrides = {"weights": "int8", "dtype": dtype, "lookup": "ngram", "lookup.width": 3}
    overrides |= {"cull": "none", "sampler": "greedy"}  # what follows a read knows no weights
    eager = open_tiny(engine="eager", **overrides)
    captured = open_tiny(engine="compiled", **{"engine.widths": [1, 4]}, **overrides)
    for b in (eager, captured):
        b.prime(IDS[:20])
        b.feed(IDS[20:24])
    for ids in (None, IDS[:1], IDS[:3]):
        ours, theirs = (b.read(ids).logits for b in (captured, eager))
        # Float32: sums in another order. Bfloat16: each a dozen roundings of 2^-8 from the truth.
        tolerance = 1e-4 if dtype == "float32" else 24 * 2**-8
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())
    spoken = [tick.token for tick in captured.stream(ticks=12)]
    assert len(spoken) == 12
