"""Philox4x32-10, a counter-based random generator (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"; reference implementation and known answers: Random123).

A draw is a function of (key, counter) alone: no generator state, nothing to save, the same number
for the same tick whatever ran before. Words of 32 bits are carried in int64 tensors.
"""

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds of Philox4x32 over tensors of any common shape, values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves exact.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        high_0, low_0 = (product_0 >> 32) & _WORD, product_0 & _WORD
        high_1, low_1 = (product_1 >> 32) & _WORD, product_1 & _WORD
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def key_of(seed: int) -> Tensor:
    """The key of a seed: [2] int64, its low and high words. Seeds are taken modulo 2^64."""
    return torch.tensor([seed & _WORD, (seed >> 32) & _WORD], dtype=torch.int64)


def uniform(key: Tensor, tick: Tensor, lane: Tensor) -> Tensor:
    """Independent uniforms in the open interval (0, 1), one per lane: float64, shape of ``lane``.

    ``key`` [2] int64, ``tick`` [] int64, ``lane`` int64 in [0, 2^32).
    """
    tick = tick.expand_as(lane)
    counter = (tick & _WORD, (tick >> 32) & _WORD, lane, torch.zeros_like(lane))
    word_0, word_1, _, _ = philox4x32(counter, (key[0].expand_as(lane), key[1].expand_as(lane)))
    bits = ((word_0 << 20) ^ word_1) & ((1 << 52) - 1)
    return (bits.to(torch.float64) + 0.5) * 2.0**-52
