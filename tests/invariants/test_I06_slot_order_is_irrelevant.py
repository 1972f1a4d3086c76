"""I6: permuting slots, or shifting all positions, changes logits by rounding only."""

import pytest
import torch

from brain import Brain, Cull
from histories import IDS
from scattered_rows import read_at, scattered

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_I6_permuting_slots_changes_rounding_only(
    engine: str, num_tokens: int, dtype: str, pair: dict[str, Brain]
) -> None:
    b = pair[engine]
    scattered(b)
    straight = read_at(b, num_tokens, 30)
    order = torch.randperm(b.capacity, generator=torch.Generator().manual_seed(9))
    for tensor in b.state:
        tensor.copy_(tensor.index_select(2 if tensor.dim() == 4 else 0, order))
    permuted = read_at(b, num_tokens, 30)
    # Sums of 34 shares in another order. Float32: some 2^-24 each. Bfloat16: a sum that rounds
    # differently at one of two layers is off by 2^-8, of values of order 2.
    tolerance = 1e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(permuted.logits, straight.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(permuted.mass, straight.mass[order], rtol=0, atol=tolerance / 10)


def remembered(b: Brain, ids: list[int], shift: int) -> None:
    """Ids as rows at positions from ``shift`` on, in an empty memory."""
    b.prime(ids[:1])
    b.patch([Cull([0])])
    plan = b.graphs.empty_edit(len(ids))
    reading = b.read(ids, list(range(shift, shift + len(ids))))
    count = len(ids)
    plan.rows["position"].copy_(torch.arange(shift, shift + count))
    plan.rows["token_id"].copy_(torch.tensor(ids))
    plan.slots.copy_(torch.arange(count))
    b.graphs.patch(plan._replace(keys=reading.new_keys, values=reading.new_values))


def test_I6_shifting_all_positions_changes_rounding_only(eager_brain: Brain) -> None:
    b = eager_brain
    results = []
    for shift in (0, 1, 1000, 1 << 20, 1 << 30):
        remembered(b, IDS[:12], shift)
        rows = torch.arange(shift + 12, shift + 16)
        reading = b.graphs.read(torch.tensor(IDS[12:16]), rows, torch.tensor(4), high_water=48)
        results.append(reading)
    for shifted in results[1:]:
        # Cosines and sines are rounded to 2^-24 at every shift, through two layers; and at 2^30
        # the float64 angle itself is off by 2^-23.
        torch.testing.assert_close(shifted.logits, results[0].logits, rtol=5e-5, atol=5e-5)
        torch.testing.assert_close(shifted.mass, results[0].mass, rtol=1e-4, atol=1e-5)
    stretched = torch.tensor([12, 14, 16, 18])  # the check can fail: distances do matter
    remembered(b, IDS[:12], 0)
    other = b.graphs.read(torch.tensor(IDS[12:16]), stretched, torch.tensor(4), high_water=48)
    assert float((other.logits - results[0].logits).abs().max()) > 1e-2
