"""The little of protobuf's wire format that it takes to write a SentencePiece model, and to look
at one.

Source: protobuf "Encoding" documentation. What ends in ``field`` returns one, key and value.
"""

import struct
from collections.abc import Iterator
from itertools import islice


def varint(value: int) -> bytes:
    """An unsigned integer in groups of seven bits, least significant first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer_field(number: int, value: int) -> bytes:
    """An int32, bool or enum field; negative values as 64-bit two's complement."""
    return varint(number << 3) + varint(value & 0xFFFF_FFFF_FFFF_FFFF)


def float_field(number: int, value: float) -> bytes:
    """A float (32-bit) field."""
    return varint(number << 3 | 5) + struct.pack("<f", value)


def bytes_field(number: int, value: bytes) -> bytes:
    """A string, bytes or embedded-message field."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number and value, bytes unless it is a varint. Raises ValueError."""
    rest = iter(message)

    def number() -> int:
        value = shift = 0
        for byte in rest:
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        return value

    while key := number():  # no field has the number 0
        if key & 7 == 0:
            yield key >> 3, number()
        elif key & 7 in (1, 2, 5):
            yield key >> 3, bytes(islice(rest, {1: 8, 5: 4}.get(key & 7) or number()))
        else:
            raise ValueError(f"wire type {key & 7}")
