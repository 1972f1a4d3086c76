"""Whatever fails in a tick, the tick is made again as if nothing had happened."""

from collections.abc import Callable
from typing import Any

import pytest

from brain import Brain
from fixture_types import OpenTiny

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [(7 * n) % 300 for n in range(64)]


def ready(b: Brain, ids: int = 20, ticks: int = 3) -> Brain:
    b.prime(IDS[:ids])
    for _ in range(ticks):
        assert b.tick().text is not None
    return b


class Mishap(Exception):
    """Anything."""


def once(call: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """The function, but its first call fails: before it has done anything, or when it is done."""
    left = [True]

    def failing(*arguments: Any, **named: Any) -> Any:
        if left[0] and not after:
            left[0] = False
            raise Mishap
        result = call(*arguments, **named)
        if left[0]:
            left[0] = False
            raise Mishap
        return result

    return failing


STEPS = {
    "step": lambda b, patched: patched.setattr(b.graphs, "step", once(b.graphs.step)),
    "after the step": lambda b, patched: patched.setattr(
        b.graphs, "step", once(b.graphs.step, after=True)
    ),
    "patch": lambda b, patched: patched.setattr(b.graphs, "patch", once(b.graphs.patch)),
    "observer": lambda b, patched: patched.setattr(b, "observer", once(lambda step: None)),
    "text": lambda b, patched: patched.setattr(
        b.loop.detokenizer._decoder, "push", once(b.loop.detokenizer._decoder.push)
    ),
    "text, too late": lambda b, patched: patched.setattr(
        b.loop.detokenizer._decoder, "push", once(b.loop.detokenizer._decoder.push, after=True)
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_mishap_in_any_step_of_a_tick_is_of_no_consequence(
    step: str, either_brain: Brain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tick is made again, and nothing that is said, or its text, is another."""
    b = ready(either_brain, 24, 0)
    ticks = [b.tick() for _ in range(30)]
    whole = [tick.token for tick in ticks], "".join(tick.text for tick in ticks)
    ready(b, 24, 0)
    ticks, mishaps = [], 0
    while len(ticks) < 30:
        with monkeypatch.context() as patched:
            if mishaps == 0 and len(ticks) == 12:  # eight of them wait for their text by now
                STEPS[step](b, patched)
            try:
                ticks.append(b.tick())
            except Mishap:
                mishaps += 1
    assert mishaps == 1
    assert ([tick.token for tick in ticks], "".join(tick.text for tick in ticks)) == whole


def test_a_tick_that_failed_after_its_repair_does_not_repair_again(
    open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> tuple[Brain, list[Any]]:
        b = open_tiny(**{"repair": "pairs", "repair.every": 2, "repair.least_gain": -100.0})
        told: list[Any] = []
        b.loop.repairs.on_repair = told.append
        b.prime(IDS[:24])
        return b, told

    b, told = opened()
    whole = [(t.token, t.count, t.repaired) for t in b.stream(6)]
    assert len(told) >= 2
    b, told_again = opened()
    found = []
    for number in range(6):
        with monkeypatch.context() as patched:
            patched.setattr(b.graphs, "step", once(b.graphs.step))
            with pytest.raises(Mishap):
                b.tick()
        assert b.ticks == number
        t = b.tick()
        found.append((t.token, t.count, t.repaired))
    assert found == whole
    assert told_again == told
