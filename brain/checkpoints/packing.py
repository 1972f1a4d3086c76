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
from compiled import blocks as in_blocks
from compiled import large_pages
from compiled.blocks import Blocks, Rows
from compiled.int8 import Int8, quantize
from compiled.llama import LlamaConfig, Weights, frequency_table, weight_shapes
from compiled.matrix import Matrix
from conf.schema import WeightFormat

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

    def blocks(self) -> Rows | None:
        """Its bytes where they lie, if they are blocks that are multiplied as they are."""

    def release(self) -> None:
        """Lets go of its resident pages."""


def load_weights(
    config: LlamaConfig,
    tensors: Mapping[str, InFile],
    *,
    dtype: torch.dtype,
    device: torch.device,
    weights: WeightFormat = WeightFormat.model,
    blocks: bool = False,
    frequencies: Tensor | None = None,
    neighbour_heads: tuple[int, ...] = (),
) -> Weights:
    """The packed weights: views of the mapped files where possible, else one copy each. Raises
    Refused, before allocating, where they do not fit. ``config`` is that of ``tensors``, which are
    called as in ``llama_names``. ``frequencies``: [kinds, head_dim / 2] float64; None: by
    ``config``.

    A packed tensor is a view where its parts lie one after the other in one file, in ``dtype``,
    and ``device`` is the CPU. Otherwise it is allocated once and filled part by part, each part's
    mapped pages being released at once: no second copy of the weights is ever in memory.
    ``weights`` says whether matrices are rounded to eight or four bits, part by part from what the
    file holds. With ``blocks`` those of four bits stay so, and blocks of the file are not converted
    at all; else both become ``dtype``. ``neighbour_heads``: see ``compiled.blocks.Blocks``.
    """
    if dtype not in DTYPES.values():
        raise Refused(f"dtype {dtype} is not supported; use float32, bfloat16 or float16")
    shapes = weight_shapes(config)
    plain: dict[str, list[InFile]] = {}
    matrices: dict[str, list[InFile]] = {}
    keeps = blocks or weights is WeightFormat.int8
    for field, parts in packed_parts(config).items():
        apart = keeps and all(len(shape) == 2 for _, shape in parts)
        (matrices if apart else plain)[field] = [tensors[name] for name, _ in parts]
    path = tensors[EMBEDDING].path
    four = weights is WeightFormat.int4
    _require_room(plain.values(), matrices.values(), path, dtype, weights, device)
    packed: dict[str, Matrix] = {
        field: _pack(stored, dtype, device, four=four).view(shapes[field])
        for field, stored in plain.items()
    }
    for field, stored in matrices.items():
        if weights is WeightFormat.int8:
            packed[field] = _quantized(stored, shapes[field], device)
        else:
            heads = neighbour_heads if field == "qkv" else ()
            layers = config.num_layers if len(shapes[field]) == 3 else 1
            packed[field] = _in_blocks(stored, layers, heads, four=four)
    packed.setdefault("head", packed["embedding"])
    if frequencies is None:
        frequencies = frequency_table(config)
    return Weights(**packed, inverse_frequencies=frequencies.to(device))  # type: ignore[arg-type]


def bytes_of(columns: int, weights: WeightFormat) -> float:
    """What a number takes in memory, in a matrix of so many columns that is not kept in the model's
    dtype: with ``model`` bfloat16, in place of blocks that are not multiplied as they are.
    """
    if weights is WeightFormat.int8:
        return 1
    kind = in_blocks.KINDS[_kind(columns) if weights is WeightFormat.int4 else "BF16"]
    return kind.bytes / kind.weights


def _count(parts: Sequence[InFile]) -> int:
    """Elements of all of them."""
    return sum(prod(part.shape) for part in parts)


def _in_place(
    parts: Sequence[InFile], dtype: torch.dtype, device: torch.device, *, four: bool
) -> Tensor | None:
    """The parts flattened, [elements], where they lie in their file as they are packed, so that no
    copy is needed. With ``four`` matrices are not: they are rounded.
    """
    stored = [part for part in parts if isinstance(part, Stored)]
    if len(stored) < len(parts) or device.type != "cpu":
        return None
    if four and any(len(part.shape) == 2 for part in parts):
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
    matrices: Iterable[Sequence[InFile]],
    path: Path,
    dtype: torch.dtype,
    weights: WeightFormat,
    device: torch.device,
) -> None:
    """Refuses weights whose copies do not fit: a file may claim more than there is on any disk."""
    four = weights is WeightFormat.int4
    copied = [parts for parts in plain if _in_place(parts, dtype, device, four=four) is None]
    needed: float = sum(map(_count, copied)) * dtype.itemsize
    for parts in matrices:
        made = parts
        if weights is WeightFormat.model:  # in blocks, and what is not is made bfloat16
            made = [part for part in parts if part.blocks() is None]
        needed += sum(_count([part]) * bytes_of(part.shape[1], weights) for part in made)
    free = free_bytes(device)
    if free is not None and needed > free:
        raise Refused(
            f"{path}: its model needs {needed / 1e9:.1f} GB of memory but {free / 1e9:.1f} GB are "
            f"free on {device}; use a smaller model"
        )


def _pack(parts: list[InFile], dtype: torch.dtype, device: torch.device, *, four: bool) -> Tensor:
    """The parts flattened, one after the other: [elements]; with ``four`` their matrices rounded to
    four bits.
    """
    if (there := _in_place(parts, dtype, device, four=four)) is not None:
        return there
    packed = large_pages.zeros((_count(parts),), dtype, device)
    offset = 0
    for part in parts:
        for stored in part.rows():
            rows = in_blocks.numbers(*_rounded(stored)) if four and len(part.shape) == 2 else stored
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


def _in_blocks(
    parts: list[InFile], layers: int, neighbour_heads: tuple[int, ...], *, four: bool
) -> Blocks:
    """The parts as matrices in blocks: as they lie, or with ``four`` rounded to four bits. What is
    in other blocks becomes bfloat16.
    """
    each = len(parts) // layers
    made = [(None if four else part.blocks()) or _made_blocks(part, four=four) for part in parts]
    stacked = tuple(tuple(made[layer * each :][:each]) for layer in range(layers))
    return in_blocks.stacked(stacked, neighbour_heads)


def _made_blocks(part: InFile, *, four: bool) -> Rows:
    """A matrix in blocks of our own making, in memory."""
    rows, columns = part.shape
    kind = _kind(columns) if four else "BF16"
    _, weights, size = in_blocks.KINDS[kind]
    made = large_pages.zeros((rows, columns // weights * size), torch.uint8, torch.device("cpu"))
    at = 0
    for stored in part.rows():
        blocks = (_rounded(stored) if four else _bfloat16(stored)).bytes
        made[at : at + len(blocks)].copy_(blocks)
        at += len(blocks)
    part.release()
    return Rows(made, kind)


def _kind(columns: int) -> str:
    """What rows of so many numbers are rounded to for ``int4``: whole blocks, or bfloat16."""
    return "BF16" if columns % in_blocks.KINDS[in_blocks.FOUR_BITS].weights else in_blocks.FOUR_BITS


def _rounded(rows: Tensor) -> Rows:
    """Rows as ``int4`` has them."""
    return _bfloat16(rows) if _kind(rows.shape[1]) == "BF16" else in_blocks.quantize(rows)


def _bfloat16(rows: Tensor) -> Rows:
    return Rows(rows.to(torch.bfloat16).view(torch.uint8), "BF16")
