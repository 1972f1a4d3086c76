"""Traps that systems like this one have fallen into, each as an executable test.

Some are here because only real weights show them: toy weights are as fluent without sinks as with
them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import brain
from brain import Brain, Cull
from brain.policies import POLICIES
from compiled.rope import inverse_frequencies, rotation
from fixture_types import OpenTiny
from toys import digest

IDS = [(31 * index + 5) % 300 for index in range(200)]
EVICTING = [name for name in POLICIES if name != "none"]
PASSAGE = (Path(__file__).parent / "golden" / "passage.txt").read_text("utf-8")


def open_real(**overrides: object) -> Brain:
    return brain.open("smollm2", capacity=128, **overrides)


@pytest.mark.usefixtures("smollm2_folder", "all_threads")
def test_trap_evicted_sinks_end_fluency() -> None:
    nats = {}
    for sinks in (0, 4):
        b = open_real(**{"cull": "sink_recent", "cull.target": 64, "cull.sinks": sinks})
        ids = b.encode(PASSAGE)[:200]
        b.prime(ids[:64])
        nats[sinks] = float(b.feed(ids[64:])[16:].mean())
    assert nats[0] > nats[4] + 0.3, nats


@pytest.mark.usefixtures("smollm2_folder", "all_threads")
def test_trap_an_integer_gain_makes_brightness_a_queue() -> None:
    """The original formula, clip(b - 2 + int(10 * attention), 0, 255), on the masses of real
    attention: the gain is zero for nearly every row in nearly every tick, so that among rows of one
    source the order of birth alone decides. Ours tells them apart."""
    b = open_real(**{"cull": "brightness", "cull.target": 128})
    ids = b.encode(PASSAGE)[:120]
    masses = []
    b.observer = lambda step: masses.append(step.reading.mass.clone())
    b.prime(ids[:60])
    b.feed(ids[60:])
    old = torch.arange(4, 60)  # slots of the prompt, in text order, without the sinks
    gains = torch.stack([(10 * mass[old]).to(torch.int64) for mass in masses])
    assert float((gains == 0).float().mean()) > 0.995
    original = torch.full((len(old),), 200, dtype=torch.int64)
    for gain in gains:
        original = (original - 2 + gain).clamp(0, 255)
    assert len(set(original.tolist())) <= 3  # a queue: ties, but for a few lucky rows
    ours = b.state.brightness[old]
    assert len(set(ours.tolist())) == len(old)
    order = torch.argsort(ours)
    assert not torch.equal(order, torch.arange(len(old)))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("policy", EVICTING)
def test_trap_the_newborn_is_not_forgotten_first(policy: str, open_tiny: OpenTiny) -> None:
    """A row that nobody has had time to look at has no attention: without protection the memory
    freezes on the prompt."""
    b = open_tiny(cull=policy, **{"cull.target": 16, "cull.recent": 4})
    b.prime(IDS[:16])
    for token in IDS[16:60]:
        b.feed([token])
        newest = b.mirror.position[-4:].tolist()
        assert newest == list(range(b.memory.account.position - 4, b.memory.account.position))
    assert (b.mirror.position > 30).sum() > 4  # the memory moves on with the text


@pytest.mark.usefixtures("one_thread")
def test_trap_positions_do_not_follow_the_number_of_rows(open_tiny: OpenTiny) -> None:
    b = open_tiny(**{"cull.target": 16})
    b.prime(IDS[:10])
    for number, tick in enumerate(b.stream(40), start=1):
        assert tick.position == 9 + number
    b.patch([Cull(b.mirror.position[4:8].tolist())])
    assert b.tick().position == 50


@pytest.mark.usefixtures("one_thread")
def test_trap_an_unfilled_slot_is_at_no_position(open_tiny: OpenTiny) -> None:
    """Position 0 is a place in the text: a free slot that claims it would be seen by everybody."""
    b = open_tiny()
    assert (b.state.position == -1).all()
    b.prime(IDS[:3])
    assert (b.state.position[3:] == -1).all()
    told = b.read()
    b.state.position[3:] = 0  # even if it did, it is not valid
    assert torch.equal(b.read().logits, told.logits)


@pytest.mark.usefixtures("smollm2_folder")
def test_trap_text_does_not_give_its_ids_back() -> None:
    """The mirror stores ids. Tokenizing its text again gives others: "the" from "th" and "e"."""
    b = open_real(**{"cull": "none"})
    (whole,), parts = b.encode("the"), [b.encode("th")[0], b.encode("e")[0]]
    b.prime([whole, *parts])
    assert b.mirror.token_id.tolist() == [whole, *parts]
    assert b.encode(b.mirror.text()) != b.mirror.token_id.tolist()


@pytest.mark.usefixtures("one_thread")
def test_trap_a_second_shift_adds_to_the_first(open_tiny: OpenTiny) -> None:
    """Two re-basings in a row: the second has nothing left to do, and undoes nothing."""
    b = open_tiny(**{"cull": "none"})
    b.prime(IDS[:20])
    b.patch([Cull([2, 3, 9])])
    b.memory.rebase()
    before = digest(*b.state, *b.cursor)
    b.memory.rebase()
    assert digest(*b.state, *b.cursor) == before


def test_trap_float32_angles_at_a_million() -> None:
    """Angles in float32 are off by 0.03 radians there; ours are not."""
    frequencies = inverse_frequencies(64, 10_000.0)
    position = torch.tensor([1_000_003])
    cos, sin = rotation(position, frequencies)
    exact = 1_000_003 * frequencies.numpy()
    np.testing.assert_allclose(cos[0].numpy(), np.cos(exact), atol=1e-7)
    np.testing.assert_allclose(sin[0].numpy(), np.sin(exact), atol=1e-7)
    coarse = position.float() * frequencies.float()
    assert float((coarse.double() - torch.from_numpy(exact)).abs().max()) > 0.01  # the trap is real
