"""I8: the mass of the cache and of the new tokens is the number of tokens read."""

import pytest

from brain import Brain
from histories import mixed_up
from scattered_rows import filled, read_at, scattered

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 9, 16])
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_I8_mass_is_conserved(engine: str, num_tokens: int, pair: dict[str, Brain]) -> None:
    b = pair[engine]
    for first in (0, 12, 25, 30, 31):  # nothing to see … everything
        scattered(b)
        filled(b, 4)
        if first > 25:
            scattered(b)
        reading = read_at(b, num_tokens, first)
        # Shares are float32 in every dtype; sums of up to 48 * 6 * 2 of them.
        total = float(reading.mass.sum() + reading.own_mass.sum())
        assert total == pytest.approx(num_tokens, rel=1e-5)
        assert reading.mass.shape == (48,)
        assert (reading.mass[~b.state.valid] == 0).all()
        assert (reading.mass >= 0).all()


def test_I8_mass_is_conserved_on_every_tick(either_brain: Brain) -> None:
    b = mixed_up(either_brain)
    sums = []
    b.observer = lambda step: sums.append(
        float(step.reading.mass.sum() + step.reading.own_mass.sum())
    )
    for _ in range(30):
        b.tick()
    b.observer = None
    assert sums == pytest.approx([1.0] * 30, rel=1e-5)
