"""From named tensors in files to the packed tensors of ``Weights``, copying only where needed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from brain.checkpoints.llama_names import EMBEDDING, packed_parts
from brain.checkpoints.safetensors_file import DTYPES
from brain.checkpoints.stored import Stored
from brain.errors import Refused
from brain.machine.memory import free_bytes
from compiled import large_pages
from compiled.int8 import Int8, Matrix, quantize
from compiled.llama import LlamaConfig, Weights, frequency_table, weight_shapes

CACHE_LINE = 64


class InFile(Protocol):
    """A tensor of the model in a file, of whatever format."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the model's tensor."""

    def rows(self) -> Iterator[Tensor]:
        """Its numbers, some rows at a time."""

    def release(self) -> None:
        """Lets go of its resident pages."""


def load_weights(
    config: LlamaConfig,
    tensors: Mapping[str, InFile],
    *,
    dtype: torch.dtype,
    device: torch.device,
    int8: bool = False,
    frequencies: Tensor | None = None,
) -> Weights:
    """The packed weights: views of the mapped files where possible, else one copy each. Raises
    Refused, before allocating, where they do not fit. ``config`` is that of ``tensors``, which are
    called as in ``llama_names``. ``frequencies``: [kinds, head_dim / 2] float64; None: by
    ``config``.

    A packed tensor is a view where its parts lie one after the other in one file, in ``dtype``,
    and ``device`` is the CPU. Otherwise it is allocated once and filled part by part, each part's
    mapped pages being released at once: no second copy of the weights is ever in memory.
    With ``int8`` every matrix is rounded to eight bits, part by part from what the file holds.
    """
    if dtype not in DTYPES.values():
        raise Refused(f"dtype {dtype} is not supported; use float32, bfloat16 or float16")
    shapes = weight_shapes(config)
    plain: dict[str, list[InFile]] = {}
    rounded: dict[str, list[InFile]] = {}
    for field, parts in packed_parts(config).items():
        is_rounded = int8 and all(len(shape) == 2 for _, shape in parts)
        (rounded if is_rounded else plain)[field] = [tensors[name] for name, _ in parts]
    path = tensors[EMBEDDING].path
    _require_room(plain.values(), rounded.values(), path, dtype, device)
    packed: dict[str, Matrix] = {
        field: _pack(stored, dtype, device).view(shapes[field]) for field, stored in plain.items()
    }
    for field, stored in rounded.items():
        packed[field] = _quantized(stored, shapes[field], device)
    packed.setdefault("head", packed["embedding"])
    if frequencies is None:
        frequencies = frequency_table(config)
    return Weights(**packed, inverse_frequencies=frequencies.to(device))  # type: ignore[arg-type]


def _count(parts: Sequence[InFile]) -> int:
    """Elements of all of them."""
    return sum(prod(part.shape) for part in parts)


def _in_place(parts: Sequence[InFile], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The parts flattened, [elements], where they lie in their file as they are packed, so that no
    copy is needed.
    """
    stored = [part for part in parts if isinstance(part, Stored)]
    if len(stored) < len(parts) or device.type != "cpu":
        return None
    file, start = stored[0].file, stored[0].entry.start
    lies_so = (
        start % CACHE_LINE == 0  # kernels load whole cache lines
        and all(DTYPES[p.entry.dtype] == dtype and p.file is file for p in stored)
        and all(a.entry.end == b.entry.start for a, b in pairwise(stored))
    )
    return file.view(start, (_count(parts),), dtype) if lies_so else None


def _require_room(
    plain: Iterable[Sequence[InFile]],
    rounded: Iterable[Sequence[InFile]],
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuses weights whose copies do not fit: a file may claim more than there is on any disk."""
    copied = [parts for parts in plain if _in_place(parts, dtype, device) is None]
    needed = sum(map(_count, copied)) * dtype.itemsize + sum(map(_count, rounded))
    free = free_bytes(device)
    if free is not None and needed > free:
        raise Refused(
            f"{path}: its model needs {needed / 1e9:.1f} GB of memory but {free / 1e9:.1f} GB are "
            f"free on {device}; use a smaller model"
        )


def _pack(parts: list[InFile], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The parts flattened, one after the other: [elements]."""
    if (there := _in_place(parts, dtype, device)) is not None:
        return there
    packed = large_pages.zeros((_count(parts),), dtype, device)
    offset = 0
    for part in parts:
        for rows in part.rows():
            packed[offset : offset + rows.numel()].copy_(rows.view(-1))
            offset += rows.numel()
        part.release()
    return packed


def _quantized(parts: list[InFile], shape: tuple[int, ...], device: torch.device) -> Int8:
    """The parts in eight bits, their rows one after the other, as a matrix of this shape."""
    values = large_pages.zeros(shape, torch.int8, device)
    scale = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    offset = 0
    for part in parts:
        for stored in part.rows():
            rows = quantize(stored)
            after = offset + len(stored)
            values.view(-1, shape[-1])[offset:after].copy_(rows.values)
            scale.view(-1)[offset:after].copy_(rows.scale)
            offset = after
        part.release()
    return Int8(values, scale)
