"""Bytes as tokens: the alphabet of byte-level BPE, one printable character per byte (Radford et al.
2019, GPT-2), and the ``<0xAB>`` of byte fallback.
"""


def byte_of_character() -> dict[str, int]:
    """The byte each character of a byte-level token stands for: 256 entries. Bytes that are
    printable in Latin-1 stand for themselves; the other 68 follow from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return table


def is_byte_token(text: str) -> bool:
    """Whether a token is one raw byte, written ``<0xAB>``."""
    digits = text[3:5]
    shape = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return shape and all(digit in "0123456789ABCDEFabcdef" for digit in digits)
