"""Damage that knows a binary format: safetensors, GGUF, SentencePiece's protobuf, zip."""

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from random import Random
from typing import Any

from fuzzing.blind import EXTREMES, EXTREMES_64, damaged
from fuzzing.jsons import DEEP, damaged_value, odd, text_of

DTYPES = (
    "F32",
    "F16",
    "BF16",
    "F64",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "C64",
    "F4",
    "I4",
    "X",
    "",
    7,
)


def damaged_safetensors(content: bytes, rng: Random) -> bytes:
    """Header and data no longer agree, with each other or with anything."""
    if rng.random() < 0.25:
        return damaged(content, rng)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        _strike_header(header, names, len(data), rng)
    text = text_of(header, rng, blows=0.05)
    announced = len(text)
    if rng.random() < 0.15:
        announced = rng.choice((*EXTREMES_64, len(text) + 1, len(text) - 1, 100_000_000))
    if rng.random() < 0.1:
        data = rng.choice((data[:-1], data + b"\0", b"", data * 2))
    return struct.pack("<Q", announced % 2**64) + text + data


def _strike_header(header: dict[str, Any], names: list[str], size: int, rng: Random) -> None:
    name, other = rng.choice(names), rng.choice(names)
    entry = header.get(name)
    if not isinstance(entry, dict) or rng.random() < 0.15:
        header[rng.choice((name, "__metadata__", "new"))] = odd(rng)
        return
    numbers = [*EXTREMES_64, -1, size, size + 1, size - 4, 1.5, "8", None]
    match rng.randrange(9):
        case 0:
            entry["dtype"] = rng.choice(DTYPES)
        case 1:
            entry["data_offsets"] = [rng.choice(numbers), rng.choice(numbers)]
        case 2:
            theirs = header.get(other)
            entry["data_offsets"] = theirs.get("data_offsets") if isinstance(theirs, dict) else []
        case 3:
            entry["shape"] = [rng.choice(numbers) for _ in range(rng.randrange(9))]
        case 4:
            entry["shape"] = rng.choice(([], [0], [0, 2**63], [2**32, 2**32], [1] * 3000, DEEP))
        case 5:
            header[rng.choice(("__metadata__", "x" * 9000, "", "\0", "a.bias"))] = header.pop(name)
        case 6:
            header["__metadata__"] = odd(rng)
        case 7:
            start, shift = rng.randrange(size), rng.choice((1, 3, 4, -4, 64))
            entry["data_offsets"] = [start, start + shift]
        case _:
            header[name] = damaged_value(entry, rng)


# GGUF --------------------------------------------------------------------------------------------

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9


def gguf_marks(content: bytes) -> dict[str, list[int]]:
    """Where the numbers of a well-formed GGUF header lie, by what they are."""
    marks: dict[str, list[int]] = {"u32": [4], "u64": [8, 16], "text": []}
    tensors, fields = struct.unpack_from("<QQ", content, 8)
    at = 24

    def text() -> None:
        nonlocal at
        marks["u64"].append(at)
        (length,) = struct.unpack_from("<Q", content, at)
        marks["text"] += [at + 8] * bool(length)
        at += 8 + length

    def value(kind: int) -> None:
        nonlocal at
        if kind == STRING:
            text()
        elif kind == ARRAY:
            marks["u32"].append(at)
            marks["u64"].append(at + 4)
            inner, length = struct.unpack_from("<IQ", content, at)
            at += 12
            for _ in range(length):
                value(inner)
        else:
            marks.setdefault(SCALARS[kind], []).append(at)
            at += struct.calcsize(SCALARS[kind])

    for _ in range(fields):
        text()
        marks["u32"].append(at)
        (kind,) = struct.unpack_from("<I", content, at)
        at += 4
        value(kind)
    for _ in range(tensors):
        text()
        marks["u32"].append(at)
        (dims,) = struct.unpack_from("<I", content, at)
        marks["u64"] += range(at + 4, at + 4 + 8 * dims, 8)
        at += 4 + 8 * dims
        marks["u32"].append(at)
        marks["u64"].append(at + 4)
        at += 12
    return marks


def damaged_gguf(content: bytes, rng: Random, marks: dict[str, list[int]]) -> bytes:
    """Counts, lengths, kinds, dimensions and offsets that cannot be."""
    if rng.random() < 0.2:
        return damaged(content, rng)
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice([kind for kind in marks if marks[kind]] + ["u64", "u32"] * 3)
        at = rng.choice(marks[kind])
        match kind:
            case "u64":
                small = rng.randrange(400)
                struct.pack_into("<Q", out, at, rng.choice((*EXTREMES_64, small, small)))
            case "u32" | "I":
                struct.pack_into("<I", out, at, rng.choice((*EXTREMES, *range(40))))
            case "f":
                bad = (float("nan"), float("inf"), 0.0, -1.0, 1e-38)
                struct.pack_into("<f", out, at, rng.choice(bad))
            case _:
                out[at] = rng.randrange(256)
    return damaged(bytes(out), rng, 1) if rng.random() < 0.1 else bytes(out)


# Protobuf ----------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def protobuf_fields(content: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """Number, wire type and value of each field of a well-formed message."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(content):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, kind, number()
            continue
        size = number() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, kind, content[at : at + size]
        at += size


def protobuf(fields: list[tuple[int, int, bytes | int]]) -> bytes:
    """The message of these fields."""
    out = b""
    for number, kind, value in fields:
        out += varint((number << 3 | kind) % 2**64)
        if isinstance(value, int):
            out += varint(value % 2**64)
        else:
            out += (varint(len(value)) if kind == 2 else b"") + value
    return out


def damaged_protobuf(content: bytes, rng: Random, depth: int = 0) -> bytes:
    """A message with fields changed, doubled, dropped or moved, at any depth."""
    if depth == 0 and rng.random() < 0.25:
        return damaged(content, rng)
    try:
        fields = list(protobuf_fields(content))
    except (IndexError, KeyError):
        return damaged(content, rng)
    if not fields:
        return rng.randbytes(rng.randrange(9))
    for _ in range(rng.choice((1, 1, 2, 5))):
        # The last fields are few and say what the others mean.
        at = len(fields) - 1 - min(int(rng.expovariate(0.5)), len(fields) - 1)
        if rng.random() < 0.5:
            at = rng.randrange(len(fields))
        number, kind, value = fields[at]
        match rng.randrange(8):
            case 0:
                del fields[at]
                if not fields:
                    break
            case 1:
                fields.insert(rng.randrange(len(fields)), fields[at])
            case 2:
                fields[at] = (rng.choice((0, 1, 2, 3, number + 1, 2**28)), kind, value)
            case 3 if isinstance(value, int):
                fields[at] = (number, kind, rng.choice(EXTREMES_64))
            case 4 if isinstance(value, bytes):
                fields[at] = (number, kind, damaged(value, rng, 1) if kind == 2 else value[::-1])
            case 5 if kind == 2:
                fields[at] = (number, kind, b"x" * rng.choice((0, 1, 70_000)))
            case 6:
                fields.append((number, kind, value))
            case _ if isinstance(value, bytes) and kind == 2 and depth < 3:
                fields[at] = (number, kind, damaged_protobuf(value, rng, depth + 1))
            case _:
                fields[at] = (rng.randrange(1, 60), 0, rng.choice(EXTREMES_64))
    return protobuf(fields)


# Zip ---------------------------------------------------------------------------------------------

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
BOMB = 1 << 24
"""Bytes of a member that takes a thousandth of that."""


def damaged_zip(member: str, content: bytes, rng: Random) -> bytes:
    """An archive that is not what it says, or says what must not be."""
    out = io.BytesIO()
    method = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    names = [member]
    if rng.random() < 0.3:
        names += rng.choice(((member,), ("../../outside/kept.txt",), ("/etc/x",), ("a" * 9000,)))
    with zipfile.ZipFile(out, "w", method) as archive:
        for name in names:
            body = content if rng.random() < 0.8 else damaged(content, rng)
            if rng.random() < 0.002:
                body = bytes(BOMB)
            if name in archive.namelist():
                name = zipfile.ZipInfo(name)  # type: ignore[assignment]
            archive.writestr(name, body)
    made = out.getvalue()
    if rng.random() < 0.6:
        made = damaged(made, rng)
    elif rng.random() < 0.6:
        made = _strike_directory(made, rng)
    return made


def _strike_directory(made: bytes, rng: Random) -> bytes:
    """Changes a number in a record of the archive's directory: method, flags, sizes, offsets."""
    out = bytearray(made)
    for signature in (b"PK\1\2", b"PK\3\4", b"PK\5\6"):
        at = made.rfind(signature)
        if at >= 0 and rng.random() < 0.6:
            field = at + rng.choice(range(4, 44, 2))
            wide = rng.random() < 0.5
            number = rng.choice(EXTREMES) if wide else rng.choice((0, 1, 8, 9, 12, 14, 65535))
            packed = struct.pack("<I" if wide else "<H", number)
            out[field : field + len(packed)] = packed
    return bytes(out)
