"""Matrix products, expressed the way each device runs them fastest.

Captured reads on a CPU pass this module by: ``native.py`` has an operator for all layers. Where
that is not to be had, products of one new token are matrix times vector, bound by memory: compiled
for a CPU, a multiplication followed by a sum becomes one vectorised loop at memory speed, where the
BLAS call behind ``F.linear`` is tuned for many rows (measured on SmolLM2-135M at 512 tokens in
context: 2 times faster per token in float32 and bfloat16).

Many rows in float32 go to oneDNN on a CPU, which ``F.linear`` does only in lower precisions: in
float32 it calls MKL, which is half as fast on processors of other makers (measured on an AMD EPYC:
340 against 160 GFLOP/s). The weights are used as they lie; a reordered copy would be 10% faster and
a second copy. Everywhere else the plain call is the fast one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled.int8 import Int8, Matrix, dequantize

FEW_ROWS = 16
"""Rows up to which a product is bound by reading the weights."""


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
    """Whether a product with these rows may call oneDNN by name. A compiler chooses for itself, and
    ``vmap`` would run it row by row.
    """
    return (
        not torch.compiler.is_compiling()  # first: a compiler cannot follow what comes after it
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (x.dtype == torch.float32 or _is_native_bfloat16(x.dtype))
        and not torch._C._functorch.is_batchedtensor(x)
    )


def _is_native_bfloat16(dtype: torch.dtype) -> bool:
    """Whether this is bfloat16 and oneDNN has it on this processor."""
    if dtype != torch.bfloat16:
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def _product(x: Tensor, weight: Tensor, addend: Tensor | None = None) -> Tensor:
    """``x @ weight.T + addend`` by a library: [N, in] × [out, in] + [N, out] → [N, out]."""
    if _names_onednn(x):
        onednn = torch.ops.mkldnn._linear_pointwise
        product: Tensor
        if addend is not None:
            product = onednn.binary(x, addend, weight, None, "add")
        else:
            product = onednn(x, weight, None, "none", [], "")
        return product
    product = F.linear(x, weight)
    return product if addend is None else product + addend


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
        and not torch._C._functorch.is_batchedtensor(x)
    )


def stored(x: Tensor) -> Tensor:
    """``x``, written down before it is used. A compiler would rather make it anew for every row of
    a matrix: a norm with its root, or an exponential, thousands of times. The operation is
    PyTorch's own (``torch._inductor.test_operators``, which ``capture.py`` imports).
    """
    written: Tensor = torch.ops._inductor_test.realize(x)
    return written


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """``x @ weight.T``: [T, in] × [out, in] → [T, out], in x's dtype."""
    if isinstance(weight, Int8):
        # Eight bits are exact in every floating dtype; the scale comes after the sum.
        if _streams_eight_bits(x):
            row = stored(x.float())
            return ((row * weight.values.float()).sum(-1) * weight.scale).to(x.dtype)[None]
        if x.dtype == torch.float16:  # a sum of unscaled numbers may be more than it can hold
            return _product(x, dequantize(weight).to(x.dtype))
        if _takes_packed(x, weight):
            ones = torch.ones_like(weight.scale, dtype=x.dtype)  # a scale in bfloat16 is too coarse
            sums = torch._weight_int8pack_mm(x, weight.values, ones)
        else:
            sums = _product(x, weight.values.to(x.dtype))
        return (sums.float() * weight.scale).to(x.dtype)
    if streams_rows(x, x.shape[0]):
        return (stored(x.float()) * weight.float()).sum(-1).to(weight.dtype)[None]
    return _product(x, weight)


def look_up(tokens: Tensor, embedding: Matrix) -> Tensor:
    """Rows of the embedding: ``tokens`` [T] int64 → [T, hidden] float32."""
    if isinstance(embedding, Int8):
        rows = F.embedding(tokens, embedding.values).float()
        return rows * embedding.scale[tokens][:, None]
    return F.embedding(tokens, embedding).float()


def dot_rows(query: Tensor, rows: Tensor, addend: Tensor | None = None) -> Tensor:
    """Dot product of every query with every row.

    ``query`` [kv_heads, Q, head_dim] × ``rows`` [kv_heads, N, head_dim], plus ``addend`` [Q, N]
    → [kv_heads, Q, N].
    """
    if len(query) == 1:
        return _product(query[0], rows[0], addend)[None]
    products = torch.bmm(query, rows.transpose(1, 2))
    return products if addend is None else products + addend


def mix_rows(shares: Tensor, rows: Tensor) -> Tensor:
    """Sum of the rows, each weighted by its share, in float32.

    ``shares`` [kv_heads, Q, N] × ``rows`` [kv_heads, N, head_dim] → [kv_heads, Q, head_dim].
    """
    shares = shares.to(rows.dtype)
    if len(shares) == 1:
        return _product(shares[0], rows[0].T)[None].float()
    return torch.bmm(shares, rows).float()


def sum_rows(shares: Tensor, weights: Tensor) -> Tensor:
    """Sum over heads and weighted sum over queries, in float32.

    ``shares`` [heads, T, N] float32, ``weights`` [T] float32 → [N].
    """
    # One matrix–vector product: no second copy of the shares.
    return weights.expand(shares.shape[0], -1).reshape(1, -1).matmul(shares.flatten(0, 1))[0]
