"""Why numbers were not finite, and what usually helps: one line for a person."""

import torch
from torch import Tensor

from brain.checkpoints import Checkpoint
from brain.checkpoints.llama_names import packed_parts
from brain.errors import NotFinite
from compiled.blocks import Blocks, numbers
from compiled.finite import PARTS
from compiled.int8 import Int8

FINITE_BLOCK = 1 << 24
"""Elements that are looked at at a time."""
FINITE_ROWS = 256
"""The same in rows of blocks, which are made float32 for it."""


def not_finite_error(flag: int, when: str, checkpoint: Checkpoint) -> NotFinite:
    """The refusal for a flag of ``compiled/finite.py``, after looking through the weights.

    Args:
        flag: Not 0.
        when: What was being done, like ``tick 7``.
        checkpoint: The model.
    """
    parts = [part for bit, part in enumerate(PARTS) if flag >> bit & 1]
    what = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    damaged = damaged_tensor(checkpoint)
    dtype = str(checkpoint.weights.dtype).removeprefix("torch.")
    if damaged is not None:
        remedy = f"the weights hold NaN or infinity in {damaged}: fetch the model again"
        if dtype == "float16":
            remedy += ", or use dtype=bfloat16 if its numbers are beyond 65504"
    elif dtype == "float32":
        remedy = "the weights are finite but too large for float32: the model is damaged"
    else:
        remedy = f"the model overflows {dtype}: use dtype=" + (
            "bfloat16 or float32" if dtype == "float16" else "float32"
        )
    return NotFinite(f"{when}: NaN or infinity in {what}; {remedy}")


def damaged_tensor(checkpoint: Checkpoint) -> str | None:
    """The stored name of the first weight that holds NaN or infinity."""
    weights = checkpoint.weights
    for field, parts in packed_parts(checkpoint.config).items():
        matrix = getattr(weights, field)
        if isinstance(matrix, Blocks):
            stored = [rows for layer in matrix.layers for rows in layer]
            for (name, _), rows in zip(parts, stored, strict=True):
                some = torch.split(rows.bytes, FINITE_ROWS)
                if not all(_is_finite(numbers(blocks, rows.kind).view(-1)) for blocks in some):
                    return name
            continue
        rounded = isinstance(matrix, Int8)
        flat = (matrix.scale if rounded else matrix).view(-1)
        start = 0
        for name, shape in parts:
            # Of a matrix in eight bits every row has a scale, which is where it shows.
            size = shape[0] if rounded or len(shape) == 1 else shape[0] * shape[1]
            if not _is_finite(flat[start : start + size]):
                return name
            start += size
    return None


def _is_finite(flat: Tensor) -> bool:
    return all(bool(torch.isfinite(block).all()) for block in torch.split(flat, FINITE_BLOCK))
