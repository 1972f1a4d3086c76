"""Damage that knows nothing of formats: bytes in, bytes out."""

import struct
from random import Random

EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
EXTREMES_64 = (*EXTREMES, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)


def damaged(content: bytes, rng: Random, times: int | None = None) -> bytes:
    """The bytes after one to four blows, or so many."""
    for _ in range(rng.choice((1, 1, 2, 4)) if times is None else times):
        content = rng.choice(_BLOWS)(content, rng)
    return content


def _flip(content: bytes, rng: Random) -> bytes:
    if not content:
        return content
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 16))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _truncate(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _behead(content: bytes, rng: Random) -> bytes:
    return content[rng.randrange(len(content) + 1) :]


def _splice(content: bytes, rng: Random) -> bytes:
    start, at = rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)
    part = content[start : start + rng.choice((1, 4, 64, 4096))]
    return content[:at] + part + content[at + rng.choice((0, len(part))) :]


def _repeat(content: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    part = content[start : start + rng.choice((1, 2, 8, 64))]
    return content[:start] + part * rng.choice((2, 50, 400)) + content[start:]


def _fill(content: bytes, rng: Random) -> bytes:
    start, length = rng.randrange(len(content) + 1), rng.choice((1, 4, 8, 64, 1024))
    filling = bytes([rng.choice((0, 0xFF, 0x20, 0x0A, rng.randrange(256)))])
    return content[:start] + filling * min(length, len(content) - start) + content[start + length :]


def _number(content: bytes, rng: Random) -> bytes:
    """Puts an extreme number where there may have been one."""
    wide = rng.random() < 0.6
    number = (
        struct.pack("<Q", rng.choice(EXTREMES_64))
        if wide
        else struct.pack("<I", rng.choice(EXTREMES))
    )
    at = rng.randrange(max(1, len(content) - len(number) + 1))
    if rng.random() < 0.5:
        at = min(at, rng.randrange(1, 65))  # headers are where numbers are believed
    return content[:at] + number + content[at + len(number) :]


def _garbage(content: bytes, rng: Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 7, 8, 24, 200)))


_SMALL = (_flip, _flip, _flip, _truncate, _behead, _splice, _repeat, _fill, _number, _number)
_BLOWS = (*_SMALL, *_SMALL, _garbage)
