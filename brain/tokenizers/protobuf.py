"""The little of protobuf's wire format that a SentencePiece model needs to be written.

Source: protobuf "Encoding" documentation. Each function returns one field, key and value.
"""

import struct


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
