"""Philox4x32-10 against the known answers of Random123, and the uniforms made of it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import compiled.philox
from compiled.philox import Words, key_of, philox4x32, uniform

pytestmark = pytest.mark.usefixtures("one_thread")

WORD = st.integers(0, 2**32 - 1)


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.int64) for value in values)


def draw(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = words(*counter)
    k0, k1 = words(*key)
    return tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1)))


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """The paper's definition, in Python's unbounded integers."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 % 2**32, (p0 >> 32) ^ x3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert draw(counter, key) == answer


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_agrees_with_the_definition_everywhere(
    counter: tuple[int, ...], key: tuple[int, int]
) -> None:
    assert draw(counter, key) == plain_philox(counter, key)


def test_lanes_are_drawn_as_if_alone() -> None:
    lanes = torch.tensor([[0, 1, 2**32 - 1], [7, 5, 3]])
    tick, key = torch.tensor(2**33 + 5), key_of(-9)
    together = uniform(key, tick, lanes)
    assert together.shape == lanes.shape
    assert together.dtype == torch.float64
    for index, lane in enumerate(lanes.flatten()):
        assert float(uniform(key, tick, lane[None])[0]) == float(together.flatten()[index])


@given(st.integers(-(2**63), 2**64 - 1))
def test_a_seed_is_its_two_words(seed: int) -> None:
    low, high = key_of(seed).tolist()
    assert (high << 32) + low == seed % 2**64


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_uniforms_lie_strictly_between_0_and_1(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def extreme(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
        drawn = torch.full_like(counter[0], word)
        return drawn, drawn, drawn, drawn

    monkeypatch.setattr(compiled.philox, "philox4x32", extreme)
    drawn = float(uniform(key_of(0), torch.tensor(0), torch.tensor([0]))[0])
    assert 0.0 < drawn < 1.0
    assert math.isfinite(-math.log(-math.log(drawn)))  # what the sampler makes of it


def test_uniforms_are_uniform_and_independent() -> None:
    """Over lanes, over ticks and over seeds. Bounds are 5 standard deviations of the statistic:
    a right generator would miss one of the ten in fewer than one of 10^5 sets of seeds.
    """
    n = 1 << 16
    lanes = torch.arange(n)
    over_lanes = uniform(key_of(1), torch.tensor(0), lanes)
    next_tick = uniform(key_of(1), torch.tensor(1), lanes)
    next_seed = uniform(key_of(2), torch.tensor(0), lanes)
    other_high_word = uniform(key_of(1 + (1 << 32)), torch.tensor(0), lanes)
    late_tick = uniform(key_of(1), torch.tensor(1 << 32), lanes)
    few = 1 << 11
    over_ticks = torch.cat([uniform(key_of(1), torch.tensor(t), lanes[:32]) for t in range(few)])

    for drawn in (over_lanes, over_ticks):
        bins = torch.histc(drawn.float(), bins=256, min=0, max=1)
        expected = len(drawn) / 256
        chi_square = float(((bins - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
        low_bits = (drawn * 2**52).to(torch.int64) & 0xFF
        counts = torch.bincount(low_bits, minlength=256).double()
        assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 5 * math.sqrt(510)

    for other in (next_tick, next_seed, other_high_word, late_tick, over_lanes.roll(1)):
        assert not torch.equal(other, over_lanes)
        correlation = torch.corrcoef(torch.stack([over_lanes, other]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(n)
    by_tick = over_ticks.view(few, 32)[:, 0]
    correlation = torch.corrcoef(torch.stack([by_tick[:-1], by_tick[1:]]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(few)
