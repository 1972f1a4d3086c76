"""A weight matrix, in whatever form: in floating point, in eight bits, or in a file's own blocks.

What all forms can do is here; products are in ``linear.py``.
"""

from torch import Tensor

from compiled import blocks, int8
from compiled.blocks import Blocks
from compiled.int8 import Int8

Matrix = Tensor | Int8 | Blocks
"""A matrix [out, in], or several stacked."""


def dequantize(matrix: Matrix) -> Tensor:
    """Returns the matrix in floating point: float32, or as it is if it is in that already."""
    if isinstance(matrix, Int8):
        return int8.dequantize(matrix)
    return blocks.dequantize(matrix) if isinstance(matrix, Blocks) else matrix


def part(matrix: Matrix, index: int | slice) -> Matrix:
    """Returns a view of one of the stacked matrices, or of some rows of one."""
    if isinstance(matrix, Int8):
        return Int8(matrix.values[index], matrix.scale[index])
    return blocks.part(matrix, index) if isinstance(matrix, Blocks) else matrix[index]


def flat(matrix: Matrix) -> tuple[Tensor, ...]:
    """Returns the tensors that graphs take of a matrix: one, or in eight bits two. Of blocks it is
    their table, and where there is one matrix of one part its bytes too: in an embedding rows are
    looked up.
    """
    if isinstance(matrix, Blocks):
        only = matrix.layers[0] if len(matrix.layers) == 1 else ()
        return (matrix.table, *(rows.bytes for rows in only if len(only) == 1))
    return tuple(matrix) if isinstance(matrix, Int8) else (matrix,)


def num_rows(matrix: Matrix) -> int:
    """How many output channels one matrix has."""
    if isinstance(matrix, Blocks):
        return sum(len(rows.bytes) for rows in matrix.layers[0])
    return (matrix.values if isinstance(matrix, Int8) else matrix).shape[-2]
