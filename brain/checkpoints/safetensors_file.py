"""Safetensors files: mapped for reading, and written with the tensors in a chosen order.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps.
"""

import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from brain.errors import Refused, one_line
from brain.files import open_plain, parse_json

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PAGE = mmap.PAGESIZE
DATA_ALIGNMENT = 4096
MOST_HEADER = 1 << 24  # bytes; a model of 4,096 layers has a third of that


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its dtype's name, shape, and byte range within the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file, mapped. Nothing is read from disk before it is used.

    Tensors are views of the mapping, which is private to the process: writing into one would
    never reach the file. The mapping lives as long as any tensor made from it.
    """

    def __init__(self, path: Path) -> None:
        """Maps the file. Raises Refused where it is missing, truncated or malformed."""
        self.path = path
        try:
            with open_plain(path) as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > MOST_HEADER:
                    raise ValueError(f"its header of {length} bytes is too long")
                header = parse_json(file.read(length))
                # The library's parser checks the rest: lengths, overlaps, gaps, dtype sizes.
                with safe_open(path, framework="pt") as checked:
                    checked.keys()
                # Private rather than read-only: torch warns about memory that it cannot write.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (
            *(OSError, MemoryError, ValueError, RuntimeError),
            *(SafetensorError, struct.error),
        ) as error:
            raise Refused(
                f"{path}: not a complete safetensors file ({one_line(error)}); fetch it again"
            ) from None
        header.pop("__metadata__", None)
        self.entries: dict[str, Entry] = {
            name: Entry(e["dtype"], tuple(e["shape"]), *(8 + length + o for o in e["data_offsets"]))
            for name, e in header.items()
        }

    def view(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape over the file's bytes from ``start`` on: no copy."""
        flat = torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=start)
        return flat.view(*shape)

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored: no copy. Its dtype must be one of ``DTYPES``."""
        entry = self.entries[name]
        return self.view(entry.start, entry.shape, DTYPES[entry.dtype])

    def release(self, name: str) -> None:
        """Lets go of a tensor's resident pages; they would be read again from the file."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        entry = self.entries[name]
        start = entry.start // PAGE * PAGE
        self._map.madvise(mmap.MADV_DONTNEED, start, entry.end - start)


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, Sequence[int], Callable[[], Tensor]]],
    dtype: torch.dtype,
) -> None:
    """Writes tensors, each given by name, shape and a function that makes it: in this order, one in
    memory at a time. The header is padded so that the data begin on a page. Syncs the file to disk.
    Raises OSError.
    """
    items = list(tensors)
    code = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in items:
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = text.ljust((8 + len(text) + DATA_ALIGNMENT - 1) // DATA_ALIGNMENT * DATA_ALIGNMENT - 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(padded)))
        file.write(padded)
        for name, shape, make in items:
            tensor = make()
            if tensor.shape != tuple(shape):
                raise ValueError(f"{name} is {list(tensor.shape)}, announced as {list(shape)}")
            stored = tensor.to(dtype).contiguous()
            file.write(stored.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
