"""Weights in the blocks of a GGUF file: a matrix as it lies there, and its numbers.

A block holds some whole numbers, and a scale, and in some kinds a minimum, for every 16 or 32 of
them. Nothing is converted when a model is opened: ``read_cpu.cpp`` multiplies the blocks where they
lie, and here is its twin, which makes float32 of them first. Layouts: ggml's ``ggml-common.h``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """A kind of block, by ggml's number."""

    number: int
    weights: int  # of a block
    bytes: int


KINDS = {
    "F32": Kind(0, 1, 4),
    "F16": Kind(1, 1, 2),
    "BF16": Kind(30, 1, 2),
    "Q4_0": Kind(2, 32, 18),
    "Q4_1": Kind(3, 32, 20),
    "Q5_0": Kind(6, 32, 22),
    "Q5_1": Kind(7, 32, 24),
    "Q8_0": Kind(8, 32, 34),
    "Q4_K": Kind(12, 256, 144),
    "Q5_K": Kind(13, 256, 176),
    "Q6_K": Kind(14, 256, 210),
}
"""What a matrix may be made of."""


class Rows(NamedTuple):
    """Some rows of a matrix, in one kind of block."""

    bytes: Tensor  # [rows, bytes of a row] uint8
    kind: str


class Blocks(NamedTuple):
    """A matrix [out, in], or several stacked, in blocks."""

    layers: tuple[tuple[Rows, ...], ...]  # of every matrix, from its first row on
    table: Tensor  # [layers, parts, 3] int64: address, kind and how many of the rows, for C++
    neighbour_heads: tuple[int, ...] = ()
    """Of queries and keys: how many heads are in the first parts, if rows that RoPE turns together
    lie side by side, as llama.cpp has them for Llama; else nothing."""


def stacked(layers: tuple[tuple[Rows, ...], ...], neighbour_heads: tuple[int, ...] = ()) -> Blocks:
    """Matrices in blocks, of as many parts each, which must stay where they are."""
    told = [
        [[rows.bytes.data_ptr(), KINDS[rows.kind].number, len(rows.bytes)] for rows in parts]
        for parts in layers
    ]
    return Blocks(layers, torch.tensor(told, dtype=torch.int64), neighbour_heads)


def numbers(blocks: Tensor, kind: str) -> Tensor:
    """Makes float32 of blocks: the same finite numbers as llama.cpp.

    Args:
        blocks: [rows, bytes of a row] uint8.
        kind: One of ``KINDS``.
    Returns:
        [rows, weights of a row] float32.
    """
    if kind in _PLAIN:
        return blocks.contiguous().view(_PLAIN[kind]).float()
    rows = len(blocks)
    one = blocks.reshape(-1, KINDS[kind].bytes)  # [blocks, bytes]
    if kind == "Q8_0":
        made = _half(one[:, :2]) * one[:, 2:].view(torch.int8).float()
    elif kind == "Q6_K":
        made = _sixes(one)
    elif kind in ("Q4_K", "Q5_K"):
        made = _fours(one, five=kind == "Q5_K")
    else:
        made = _groups(one, five=kind.startswith("Q5"), least=kind.endswith("1"))
    return made.view(rows, -1)


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _half(two: Tensor) -> Tensor:
    """[N, 2] uint8 → [N, 1] float32."""
    return two.contiguous().view(torch.float16).float()


def _groups(one: Tensor, *, five: bool, least: bool) -> Tensor:
    """Blocks [N, bytes] of 32 weights, four or five bits each: [N, 32] float32."""
    scale = _half(one[:, :2])
    offset = _half(one[:, 2:4]) if least else scale * (-16.0 if five else -8.0)
    rest = one[:, 4 if least else 2 :]
    nibbles = rest[:, 4:] if five else rest
    whole = torch.cat([nibbles & 15, nibbles >> 4], -1)
    if five:
        whole = whole | (_bits(rest[:, :4]) << 4)
    return scale * whole.float() + offset


def _bits(words: Tensor) -> Tensor:
    """The bits of bytes, the lowest first: [N, B] uint8 → [N, 8 B] uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    return (words[:, :, None] >> shifts & 1).flatten(1)


def _fours(one: Tensor, *, five: bool) -> Tensor:
    """Blocks [N, bytes] of Q4_K or Q5_K: [N, 256] float32."""
    scales, minima = _six_bits(one[:, 4:16])
    scale, least = _half(one[:, :2]) * scales, _half(one[:, 2:4]) * minima  # [N, 8]
    nibbles = one[:, 48 if five else 16 :].view(-1, 4, 1, 32)
    whole = torch.cat([nibbles & 15, nibbles >> 4], 2).view(-1, 8, 32)
    if five:
        shifts = torch.arange(8, dtype=torch.uint8, device=one.device)[:, None]
        whole = whole | ((one[:, None, 16:48] >> shifts & 1) << 4)
    return (scale[:, :, None] * whole.float() - least[:, :, None]).flatten(1)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima in twelve bytes: [N, 12] uint8 → twice [N, 8] float32."""
    a, b, c = torch.split(packed, 4, -1)
    scales = torch.cat([a & 63, c & 15 | a >> 6 << 4], -1)
    minima = torch.cat([b & 63, c >> 4 | b >> 6 << 4], -1)
    return scales.float(), minima.float()


def _sixes(one: Tensor) -> Tensor:
    """Blocks [N, bytes] of Q6_K: [N, 256] float32."""
    scale = _half(one[:, 208:]) * one[:, 192:208].view(torch.int8).float()  # [N, 16]
    low = one[:, :128].view(-1, 2, 1, 64)
    nibbles = torch.cat([low & 15, low >> 4], 2).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=one.device)[:, None]
    high = one[:, 128:192].view(-1, 2, 1, 32) >> shifts & 3
    whole = (nibbles | high << 4).view(-1, 16, 16).float() - 32.0
    return (scale[:, :, None] * whole).flatten(1)


def dequantize(matrix: Blocks) -> Tensor:
    """One matrix in float32, [out, in], its rows in the order in which queries and keys are
    turned here.
    """
    (parts,) = matrix.layers
    made = [numbers(*rows) for rows in parts]
    heads = [*matrix.neighbour_heads, *(0 for _ in parts)]
    return torch.cat(
        [_apart(rows, each) if each else rows for rows, each in zip(made, heads, strict=False)]
    )


def _apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of which RoPE turns neighbours, so that it turns those half a head apart."""
    columns = rows.shape[1]
    return rows.view(heads, -1, 2, columns).transpose(1, 2).reshape(-1, columns)


def part(matrix: Blocks, index: int | slice) -> Blocks:
    """One of the stacked matrices; or some rows of the only one, which must be one part."""
    if isinstance(index, int):
        layers, table = matrix.layers[index : index + 1], matrix.table[index : index + 1]
        return Blocks(layers, table, matrix.neighbour_heads)
    ((rows,),) = matrix.layers
    return stacked(((Rows(rows.bytes[index], rows.kind),),))


def looked_up(tokens: Tensor, embedding: Blocks) -> Tensor:
    """Rows of the embedding, which is one part: [T] int64 → [T, hidden] float32."""
    ((rows,),) = embedding.layers
    return numbers(rows.bytes[tokens], rows.kind)


FOUR_BITS = "Q4_1"
"""The kind that numbers are rounded to: four bits with a scale and a minimum, five in all."""
LARGEST = 65504.0  # of float16
FITS = 2
"""Times that scale and minimum are fitted to what was rounded with the ones before."""


def quantize(rows: Tensor) -> Rows:
    """Rounds numbers to four bits, each 32 with the scale and minimum that lose the least.

    Scale and minimum begin as the range of the 32, then are fitted by least squares to the whole
    numbers that came of them, as long as that helps. They have sixteen bits: what is beyond 65504
    becomes that, and what is less than 6e-8 becomes 0.

    Args:
        rows: [N, in] in any floating dtype, ``in`` a multiple of 32.
    Returns:
        Blocks of ``FOUR_BITS``.
    Raises:
        ValueError: Rows are not whole blocks.
    """
    if rows.shape[-1] % KINDS[FOUR_BITS].weights:
        raise ValueError(f"rows of {rows.shape[-1]} numbers are not whole blocks")
    numbers = rows.float().reshape(-1, 32)
    least, most = numbers.aminmax(dim=-1, keepdim=True)
    best = _rounded(numbers, (most - least) / 15, least)
    for _ in range(FITS):
        whole = best.whole.float()
        spread = whole - whole.mean(-1, keepdim=True)
        power = spread.square().sum(-1, keepdim=True)
        scale = (spread * numbers).sum(-1, keepdim=True) / power.where(power > 0, 1.0)
        least = numbers.mean(-1, keepdim=True) - scale * whole.mean(-1, keepdim=True)
        fitted = _rounded(numbers, scale, least)
        better = fitted.loss < best.loss
        best = _Rounded(*(torch.where(better, a, b) for a, b in zip(fitted, best, strict=True)))
    packed = best.whole[:, :16] | best.whole[:, 16:] << 4
    halves = torch.cat([best.scale, best.least], -1).view(torch.uint8)
    return Rows(torch.cat([halves, packed], -1).view(len(rows), -1), FOUR_BITS)


class _Rounded(NamedTuple):
    whole: Tensor  # [N, 32] uint8, 0 to 15
    scale: Tensor  # [N, 1] float16
    least: Tensor  # [N, 1] float16
    loss: Tensor  # [N, 1] float32, the sum of squares


def _rounded(numbers: Tensor, scale: Tensor, least: Tensor) -> _Rounded:
    """Numbers [N, 32] by these, themselves rounded first."""
    scale, least = (some.clamp(-LARGEST, LARGEST).half() for some in (scale, least))
    step, low = scale.float(), least.float()
    whole = ((numbers - low) / step.where(step > 0, 1.0)).round().clamp(0, 15)
    loss = (whole * step + low - numbers).square().sum(-1, keepdim=True)
    return _Rounded(whole.to(torch.uint8), scale, least, loss)
