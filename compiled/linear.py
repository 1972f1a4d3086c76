"""Matrix products, expressed the way each device runs them fastest.

Captured reads on a CPU do without this module: ``read_cpu.py`` has one operator for all layers.
Where that is not to be had, a product with one new token is matrix times vector, bound by memory.
Compiled for a CPU, a multiplication followed by a sum becomes one vectorised loop at memory speed,
where the BLAS call behind ``F.linear`` is tuned for many rows (measured on SmolLM2-135M at 512
tokens in context: 2 times faster per token in float32 and bfloat16).

Products with many rows go to oneDNN on a CPU, which ``F.linear`` calls only in lower precisions. In
float32 it calls MKL, which is half as fast on processors of other makers (measured on an AMD EPYC:
340 against 160 GFLOP/s). The weights are used as they lie; a reordered copy would be 10% faster and
a second copy. On a CPU without instructions for 16-bit floats such products, and all of attention,
go by way of float32 (measured with AVX2 only: a text of 862 tokens in a sixth of the time in
bfloat16, a quarter in float16; with AVX-512 but without bf16, a third in bfloat16); one row is
faster as it is. Everywhere else the plain call is the fast one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled import blocks, torch_private
from compiled.blocks import Blocks
from compiled.int8 import Int8, dequantize
from compiled.matrix import Matrix

FEW_ROWS = 16
"""Rows up to which a product is bound by reading the weights."""

WIDE_ROWS = 512
"""Rows of a matrix that are made float32 at a time, so that they stay in the processor's cache."""


def streams_rows(x: Tensor, num_tokens: int) -> bool:
    """Whether products over this many new tokens are compiled as streaming loops."""
    return num_tokens == 1 and x.device.type == "cpu" and torch.compiler.is_compiling()


def _streams_eight_bits(x: Tensor) -> bool:
    """Whether a product with eight-bit weights is compiled as a streaming loop: that of one row, on
    a GPU too. Its libraries have no such product, and their call would want a matrix of numbers:
    five bytes moved in place of each.
    """
    alone = x.shape[0] == 1 and x.device.type == "cuda" and torch.compiler.is_compiling()
    return alone or streams_rows(x, x.shape[0])


def _names_onednn(x: Tensor) -> bool:
    """Whether a product with these rows may call oneDNN by name. A compiler chooses for itself."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler cannot follow what comes after it
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (
            x.dtype == torch.float32
            or (x.dtype == torch.bfloat16 and torch_private.multiplies_in(x.dtype))
        )
    )


def _multiplies_wide(x: Tensor) -> bool:
    """Whether products in this dtype go by way of float32: on a CPU without instructions for it,
    whose libraries then take up to ten times as long as for float32.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and not torch_private.multiplies_in(x.dtype)


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32, whatever they are in: [N, in] × [out, in] → [N, out]. Some rows
    of the weights are made float32 at a time, not all.
    """
    wide = x.float()
    return torch.cat([_product(wide, some.float()) for some in torch.split(weight, WIDE_ROWS)], -1)


def _product(
    x: Tensor, weight: Tensor, addend: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias + addend`` by a library: [N, in] × [out, in] + [out] + [N, out] →
    [N, out]. A bias is added before the sum is rounded.
    """
    if x.shape[0] >= FEW_ROWS and _multiplies_wide(x):
        product = _biased(_wide_product(x, weight), bias).to(x.dtype)
        return product if addend is None else product + addend
    if _names_onednn(x):
        return torch_private.onednn_linear(x, weight, addend, bias)
    product = F.linear(x, weight, bias)
    return product if addend is None else product + addend


def _biased(sums: Tensor, bias: Tensor | None) -> Tensor:
    """[N, out] float32, with what every row adds, if it adds anything."""
    return sums if bias is None else sums + bias.float()


def _takes_packed(x: Tensor, weight: Int8) -> bool:
    """Whether a product with eight-bit weights goes to PyTorch's own kernel for few rows, which
    reads them as they lie. It is for bfloat16 (measured: 10 times as fast as making a matrix of
    numbers for one row, as fast for 16; in float32 it is slower). It reads whole vectors, so sizes
    must be multiples of them.
    """
    rows, columns = weight.values.shape
    return (
        not torch.compiler.is_compiling()  # first: Inductor takes it for weights that never change
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.shape[0] <= FEW_ROWS
        and columns % 64 == 0
        and rows % 4 == 0
        and x.is_contiguous()
        and weight.values.is_contiguous()
    )


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ weight.T + bias`` in the form that is fastest for this device and this many
    rows.

    Args:
        x: [T, in] in the model's dtype.
        weight: [out, in] in the same dtype, in eight bits, or in blocks.
        bias: [out] in the same dtype, added before the sum is rounded; None: nothing.
    Returns:
        [T, out] in the dtype of ``x``.
    """
    if isinstance(weight, Blocks):  # whose numbers need float32
        return _biased(_product(x.float(), blocks.dequantize(weight)), bias).to(x.dtype)
    if isinstance(weight, Int8):
        # Eight bits are exact in every floating dtype; the scale comes after the sum.
        if _streams_eight_bits(x):
            row = torch_private.materialise(x.float())
            sums = (row * weight.values.float()).sum(-1) * weight.scale
            return _biased(sums, bias).to(x.dtype)[None]
        if _takes_packed(x, weight):
            ones = torch.ones_like(weight.scale, dtype=x.dtype)  # a scale in bfloat16 is too coarse
            sums = torch_private.int8_linear(x, weight.values, ones)
        elif _multiplies_wide(x):
            sums = _wide_product(x, weight.values)
        elif x.dtype == torch.float16:  # a sum of unscaled numbers may be more than it can hold
            return _product(x, dequantize(weight).to(x.dtype), bias=bias)
        else:
            sums = _product(x, weight.values.to(x.dtype))
        return _biased(sums.float() * weight.scale, bias).to(x.dtype)
    if streams_rows(x, x.shape[0]):
        sums = (torch_private.materialise(x.float()) * weight.float()).sum(-1)
        return _biased(sums, bias).to(weight.dtype)[None]
    return _product(x, weight, bias=bias)


def embed(tokens: Tensor, embedding: Matrix) -> Tensor:
    """Looks the tokens' rows of the embedding up: [T] int64 → [T, hidden] float32."""
    if isinstance(embedding, Blocks):
        return blocks.looked_up(tokens, embedding)
    if isinstance(embedding, Int8):
        rows = F.embedding(tokens, embedding.values).float()
        return rows * embedding.scale[tokens][:, None]
    return F.embedding(tokens, embedding).float()


def dot_rows(query: Tensor, rows: Tensor, addend: Tensor | None = None) -> Tensor:
    """Computes the dot product of every query with every row.

    Args:
        query: [kv_heads, Q, head_dim].
        rows: [kv_heads, N, head_dim].
        addend: [Q, N], added to the products of every head.
    Returns:
        [kv_heads, Q, N], in float32 where products go by way of it.
    """
    if _multiplies_wide(query):
        return dot_rows(query.float(), rows.float(), None if addend is None else addend.float())
    if len(query) == 1:
        return _product(query[0], rows[0], addend)[None]
    products = torch.bmm(query, rows.transpose(1, 2))
    return products if addend is None else products + addend


def weighted_rows(probabilities: Tensor, rows: Tensor) -> Tensor:
    """Sums the rows, each weighted by its probability.

    Args:
        probabilities: [kv_heads, Q, N], rounded first to the dtype in which products are made.
        rows: [kv_heads, N, head_dim].
    Returns:
        [kv_heads, Q, head_dim] float32.
    """
    if _multiplies_wide(rows):
        rows = rows.float()
    probabilities = probabilities.to(rows.dtype)
    if len(probabilities) == 1:
        return _product(probabilities[0], rows[0].T)[None].float()
    return torch.bmm(probabilities, rows).float()


def summed_probabilities(probabilities: Tensor, weights: Tensor) -> Tensor:
    """Sums over heads, and over queries by their weights.

    Args:
        probabilities: [heads, T, N] float32.
        weights: [T] float32.
    Returns:
        [N] float32.
    """
    # One matrix–vector product: no second copy of the probabilities.
    by_head = weights.expand(probabilities.shape[0], -1).reshape(1, -1)
    return by_head.matmul(probabilities.flatten(0, 1))[0]
