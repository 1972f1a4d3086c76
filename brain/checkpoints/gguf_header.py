"""The header of a GGUF file: metadata, and where each tensor is.

Read from the specification rather than by the ``gguf`` package, which believes every count it finds
and would follow one of 2^63 for ever. Here every count and length is held against what is left of
the file before anything is made of it. Little-endian files of versions 2 and 3.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from brain.errors import Refused, one_line, shown
from brain.files import open_plain

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT, MOST_ALIGNMENT = 32, 1 << 16
MOST_FIELDS, MOST_TENSORS, MOST_DIMENSIONS = 1 << 16, 1 << 16, 4
MOST_ELEMENTS = 1 << 22
"""Of an array; the largest are the merges of a vocabulary, a few hundred thousand."""
MOST_HEADER = 1 << 28  # bytes

# Kinds of values
STRING, ARRAY = 8, 9
SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its shape, outermost axis first, its number format, and where its bytes are."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    end: int


class GgufFile:
    """A GGUF file, mapped. ``fields`` holds the metadata as Python values, ``tensors`` by name."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises Refused where the file is missing, truncated or malformed."""
        self.path = path
        try:
            with open_plain(path) as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = _Header(self._map)
            self.fields = dict(header.fields())
            self.tensors = dict(header.tensors(self.fields.get("general.alignment", ALIGNMENT)))
        except (OSError, ValueError) as error:
            raise Refused(f"{path}: not a GGUF file ({one_line(error)}); fetch it again") from None

    def stored(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """The bytes of a tensor as ``gguf.quants.dequantize`` wants them: rows of blocks."""
        flat = np.frombuffer(self._map, np.uint8, tensor.end - tensor.start, tensor.start)
        return flat.reshape(*tensor.shape[:-1], -1)

    def release(self, tensor: StoredTensor) -> None:
        """Lets go of a tensor's resident pages; they would be read again from the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, tensor.end - start)


class _Header:
    """A walk over the header, once, from its beginning to its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0
        self._end = min(len(data), MOST_HEADER)
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not supported; use 2 or 3, little-endian")
        self._tensors = self._count(MOST_TENSORS, 24, "tensors")
        self._fields = self._count(MOST_FIELDS, 13, "metadata entries")

    def fields(self) -> Iterator[tuple[str, Any]]:
        """Every metadata entry. Raises ValueError for a key that is there twice."""
        seen: set[str] = set()
        for _ in range(self._fields):
            key = _new(self._text(), seen)
            yield key, self._value(self._number("<I"))

    def tensors(self, alignment: Any) -> Iterator[tuple[str, StoredTensor]]:
        """Every tensor, none overlapping another: a small file must not become a large model."""
        if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT:
            raise ValueError(f"alignment {shown(alignment)} is not a number up to {MOST_ALIGNMENT}")
        seen: set[str] = set()
        announced = [(_new(self._text(), seen), *self._tensor()) for _ in range(self._tensors)]
        first = -(-self._at // alignment) * alignment
        used = first
        for name, shape, kind, offset in sorted(announced, key=lambda tensor: tensor[3]):
            start = first + offset
            end = start + _bytes(shape, kind, name)
            if offset % alignment or start < used or end > len(self._data):
                raise ValueError(f"tensor {shown(name)} lies outside the file or in another one")
            used = end
            yield name, StoredTensor(shape, kind, start, end)

    def _tensor(self) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
        count = self._number("<I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {count} dimensions; use 1 to {MOST_DIMENSIONS}")
        sizes = [self._number("<Q") for _ in range(count)]
        kind, offset = self._number("<I"), self._number("<Q")
        return tuple(reversed(sizes)), GGMLQuantizationType(kind), offset

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            inner = self._number("<I")
            if inner == STRING:
                return [self._text() for _ in range(self._count(MOST_ELEMENTS, 8, "texts"))]
            width = self._scalar(inner).itemsize
            count = self._count(MOST_ELEMENTS, width, "numbers")
            return np.frombuffer(self._take(count * width), self._scalar(inner)).tolist()
        scalar = self._scalar(kind)
        return np.frombuffer(self._take(scalar.itemsize), scalar)[0].item()

    def _scalar(self, kind: int) -> np.dtype[Any]:
        if kind not in SCALARS:
            raise ValueError(f"a value of kind {kind} is not known")
        return np.dtype(SCALARS[kind])

    def _text(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8")

    def _count(self, most: int, least_bytes: int, what: str) -> int:
        """How many of something follow, each of so many bytes at least."""
        count = self._number("<Q")
        if count > most or count * least_bytes > self._end - self._at:
            raise ValueError(f"{count} {what} do not fit")
        return count

    def _number(self, code: str) -> int:
        (number,) = struct.unpack(code, self._take(struct.calcsize(code)))
        return int(number)

    def _take(self, count: int) -> bytes:
        if count > self._end - self._at:
            raise ValueError(f"{count} bytes at {self._at} are past its end")
        self._at += count
        return self._data[self._at - count : self._at]


def _new(name: str, seen: set[str]) -> str:
    if name in seen:
        raise ValueError(f"the name {shown(name)} is there twice")
    seen.add(name)
    return name


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType, name: str) -> int:
    """What a tensor takes. Its innermost axis is made of whole blocks."""
    elements, size = GGML_QUANT_SIZES[kind]
    if math.prod(shape) == 0 or shape[-1] % elements:
        raise ValueError(f"tensor {shown(name)} is of {list(shape)}, not of whole blocks")
    return math.prod(shape) // elements * size
