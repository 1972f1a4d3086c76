"""I5: what hidden rows and free slots hold never influences logits, to the bit."""

import pytest
import torch

from brain import Brain, Cull
from histories import IDS
from scattered_rows import filled, read_at, scattered
from toys import raw_bytes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]


@pytest.mark.parametrize("num_tokens", [1, 3, 4])
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_I5_garbage_in_hidden_rows_changes_no_bit(
    engine: str, num_tokens: int, pair: dict[str, Brain]
) -> None:
    b = pair[engine]
    results = []
    for seed in (1, 2, 3):
        scattered(b)
        filled(b, seed)
        # As of 25: rows from there on are hidden by position or by the new tokens.
        reading = read_at(b, num_tokens)
        if num_tokens > 1:  # later tokens may see the rows between; keep to the first
            reading = reading._replace(logits=reading.logits[:1])
            results.append(raw_bytes(reading.logits))
        else:
            results.append(b"".join(raw_bytes(tensor) for tensor in reading))
    assert results[0] == results[1] == results[2]
    assert torch.isfinite(reading.logits).all()
    b.state.values[:, :, int(torch.nonzero(b.state.position == 7)[0])] += 1  # a visible row counts
    assert raw_bytes(read_at(b, num_tokens).logits[:1]) != raw_bytes(reading.logits)


def test_I5_ticks_do_not_depend_on_what_free_slots_hold(either_brain: Brain) -> None:
    b = either_brain
    results = []
    for seed in (1, 2):
        b.prime(IDS[:28])
        b.patch([Cull([5, 6, 7, 20])])
        free = ~b.state.valid
        generator = torch.Generator().manual_seed(seed)
        for rows in (b.state.keys, b.state.values):
            noise = torch.randn(rows[:, :, free].shape, generator=generator)
            rows[:, :, free] = noise * 1e30
        for column in (b.state.brightness, b.state.surprise):
            column[free] = seed * 1e30
        b.state.token_id[free] = seed
        b.state.pinned[free] = seed == 1
        ticks = [b.tick() for _ in range(12)]
        results.append([(t.token, t.surprise, t.culled, t.count) for t in ticks])
    assert results[0] == results[1]
