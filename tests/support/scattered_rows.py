"""A memory whose rows lie in scattered slots, with garbage in the slots between."""

import torch

from brain import Brain
from compiled.read import Reading, trimmed
from histories import IDS


def filled(b: Brain, seed: int) -> None:
    """Overwrites every free slot, and every row from position 25 on, with finite garbage."""
    generator = torch.Generator().manual_seed(seed)
    hidden = ~b.state.valid | (b.state.position >= 25)
    for rows in (b.state.keys, b.state.values):
        noise = torch.randn(rows[:, :, hidden].shape, generator=generator)
        largest = torch.finfo(rows.dtype).max * 0.99
        rows[:, :, hidden] = (noise.clamp(-1, 1) * largest).to(rows.dtype)
    b.state.token_id[~b.state.valid] = seed
    b.state.position[~b.state.valid] = seed  # a free slot's position means nothing


def scattered(b: Brain) -> None:
    """Rows at positions 0 to 29 in scattered slots, free ones between, without any graph."""
    generator = torch.Generator().manual_seed(5)
    slots = torch.randperm(b.capacity, generator=generator)[:30]
    b.state.valid.zero_()
    b.state.valid[slots] = True
    b.state.position[slots] = torch.arange(30)
    b.state.token_id[slots] = torch.tensor(IDS[:30])
    for rows in (b.state.keys, b.state.values):
        rows.normal_(generator=generator)


def read_at(b: Brain, num_tokens: int, first: int = 25) -> Reading:
    """A read over all slots, whatever the brain believes about them."""
    width = b.graphs.read_width(num_tokens)
    padding = [0] * (width - num_tokens)
    reading = b.graphs.read(
        torch.tensor([*IDS[50 : 50 + num_tokens], *padding]),
        torch.tensor([*range(first, first + num_tokens), *padding]),
        torch.tensor(num_tokens),
        high_water=b.capacity,
    )
    return trimmed(reading, num_tokens)
