"""The operator that takes some tokens through all layers on a CPU, built from ``read_cpu.cpp``.

Inductor makes one loop after another of the layers in PyTorch and enters each of them from Python.
The operator is one loop over the model's bytes. It is opaque to the compiler and means what its
twin means, the layers of ``read.py``: the same arguments, the same results up to rounding, nothing
written but what it returns. On a GPU, in other number formats and where it is switched off, the
twin is what is captured.

This module knows a built library and calls it. Where a library comes from is not its business.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled.attention import Visibility
from compiled.blocks import Blocks
from compiled.cpu_library import defined, load
from compiled.int8 import Int8
from compiled.llama import LlamaConfig, Weights
from compiled.matrix import Matrix
from compiled.state import State

SOURCE = Path(__file__).with_name("read_cpu.cpp")

MOST_TOKENS = 128
"""Of a read that the operator is for. So far it is as fast as the libraries' products of many rows,
or faster (measured on SmolLM2-135M: as fast at 128, 1.3 to 2 times at 64, 4 to 8 times at 9).
"""

_REALS = {torch.float32: "float", torch.bfloat16: "BFloat16"}
"""Model dtypes that the operator knows, and what it calls them."""

_MATRICES: dict[type, str] = {Int8: "int8_t", Blocks: "InBlocks"}
"""Matrices that are not in the model's dtype, and what the operator calls them."""


class Decoded(NamedTuple):
    """What comes out of the last layer and the head."""

    logits: Tensor  # [T, vocab] float32; of a read with targets, their surprises [T], nats
    new_keys: Tensor  # [layers, kv_heads, T, head_dim], RoPE applied
    new_values: Tensor  # [layers, kv_heads, T, head_dim]
    mass: Tensor  # [bucket + T] or [T, bucket + T] float32, summed over layers and heads


Decode = Callable[..., Decoded]
"""The operator bound to one library; see :func:`operator`."""


class Formats(NamedTuple):
    """What ``read_cpu.cpp`` is built for: C++ types of activations and cache, and of matrices."""

    real: str
    weight: str


def formats(
    dtype: torch.dtype, device: torch.device, matrices: type[Tensor | Int8 | Blocks]
) -> Formats | None:
    """Names the formats of a model.

    Args:
        dtype: Of activations and cache.
        device: Of the model.
        matrices: What its matrices are.
    Returns:
        None where the operator does not know the device or the number format.
    """
    real = _REALS.get(dtype)
    if device.type != "cpu" or real is None:
        return None
    return Formats(real, _MATRICES.get(matrices, real))


def operator(library: Path) -> Decode:
    """Binds the operator to a library.

    Args:
        library: ``read_cpu.cpp`` as built for this processor and the model's ``formats``.
    Returns:
        ``decode(config, weights, state, hidden, cos, sin, visible, *, per_query, targets=None)``,
        which a compiler may trace. ``hidden`` [T, hidden] float32 are the embedded tokens; ``cos``
        and ``sin`` [kinds, T, head_dim / 2] float32 their angles; ``visible`` is over T tokens and
        a bucket; ``per_query`` asks for the attention mass [T, bucket + T] of every token apart.
        With ``targets`` [T] int64, what follows each token, logits are never kept.
    Raises:
        OSError: The library cannot be loaded, or takes other arguments than this module passes.
    """
    call = _registered(library)

    def decode(
        config: LlamaConfig,
        weights: Weights,
        state: State,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible: Visibility,
        *,
        per_query: bool,
        targets: Tensor | None = None,
    ) -> Decoded:
        matrices = [weights.qkv, weights.attention_out, weights.gate_up, weights.down, weights.head]
        return Decoded(
            *call(
                [weights.attention_norm, weights.mlp_norm, weights.final_norm],
                [_values(matrix) for matrix in matrices],
                [matrix.scale for matrix in matrices if isinstance(matrix, Int8)],
                [state.keys, state.values],
                [hidden, cos, sin, *([] if targets is None else [targets])],
                list(visible),
                [config.intermediate_size, config.num_heads, config.vocab_size],
                config.stream_eps,
                per_query,
                [] if weights.qkv_bias is None else [weights.qkv_bias],
                [] if weights.qk_gain is None else [weights.qk_gain],
                config.layer_kinds,
                config.rms_norm_eps,
                config.attention_scale or 0.0,
                config.logit_divisor,
                isinstance(weights.qkv, Blocks) and bool(weights.qkv.neighbour_heads),
            )
        )

    return decode


def _values(matrix: Matrix) -> Tensor:
    """What the operator reads a matrix by: of blocks their table."""
    if isinstance(matrix, Blocks):
        return matrix.table
    return matrix.values if isinstance(matrix, Int8) else matrix


@functools.cache
def _registered(library: Path) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    loaded = load(library, Arguments)
    loaded.workspace_size.restype = ctypes.c_int64
    return defined(
        library,
        loaded,
        "(Tensor[] norms, Tensor[] matrices, Tensor[] scales, Tensor[] cache, Tensor[] inputs, "
        "Tensor[] visible, int[] sizes, float eps, bool per_query, Tensor[] qkv_bias, "
        "Tensor[] qk_gain, int[] kinds, float head_eps, float attention_scale, "
        "float logit_divisor, bool neighbours) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _run,
        _allocated,
    )


class _Given(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    norms: Sequence[Tensor]  # attention, MLP, final
    matrices: Sequence[Tensor]  # qkv, attention_out, gate_up, down, head
    scales: Sequence[Tensor]  # theirs in eight bits, or none
    cache: Sequence[Tensor]  # keys, values
    inputs: Sequence[Tensor]  # hidden, cos, sin, and targets if there are any
    visible: Sequence[Tensor]  # cached, new, live
    sizes: Sequence[int]  # intermediate, heads, vocab
    eps: float
    per_query: bool
    qkv_bias: Sequence[Tensor]  # one, or none
    qk_gain: Sequence[Tensor]  # one, or none
    kinds: Sequence[int]  # of each layer, which of cos and sin turn it
    head_eps: float
    attention_scale: float  # 0: head_dim ** -0.5
    logit_divisor: float
    neighbours: bool  # of queries and keys in blocks: whether RoPE turns rows side by side


def _allocated(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the results, the mass zero."""
    given = _Given(*arguments)
    num_tokens, bucket = given.visible[0].shape
    layers, kv_heads, _, head_dim = given.cache[0].shape
    vocab = given.sizes[2]
    width = bucket + num_tokens
    new_rows = (layers, kv_heads, num_tokens, head_dim)
    return (
        given.inputs[0].new_empty((num_tokens, vocab) if len(given.inputs) < 4 else (num_tokens,)),
        given.cache[0].new_empty(new_rows),
        given.cache[0].new_empty(new_rows),
        given.inputs[0].new_zeros((num_tokens, width) if given.per_query else (width,)),
    )


class _Matrix(ctypes.Structure):
    _fields_ = (
        *(("values", ctypes.c_void_p), ("scale", ctypes.c_void_p)),
        ("parts", ctypes.c_int64),
    )


class Arguments(ctypes.Structure):
    """``Decode`` of ``read_cpu.cpp``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "hidden_size", "intermediate")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "vocab")),
        *((name, ctypes.c_int64) for name in ("tokens", "capacity", "bucket", "per_query")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "final_norm")),
        *((name, _Matrix) for name in ("qkv", "attention_out", "gate_up", "down", "head")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "hidden", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("visible_cached", "visible_new", "live")),
        ("targets", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("logits", "new_keys", "new_values", "mass")),
        ("workspace", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "qk_gain", "kinds")),
        *((name, ctypes.c_double) for name in ("head_eps", "attention_scale", "logit_divisor")),
        ("neighbours", ctypes.c_int64),
    )


def _run(library: ctypes.CDLL, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _allocated(*arguments)
    asked = _Given(*arguments)
    norms, matrices, scales, cache, inputs, visible, sizes = asked[:7]
    intermediate, heads, vocab = sizes
    # The residual stream is worked on in place; the rest is copied only if it lies in pieces.
    hidden = inputs[0].clone(memory_format=torch.contiguous_format)
    given = [hidden, *map(Tensor.contiguous, (*inputs[1:3], *visible))]
    targets = [tensor.contiguous() for tensor in inputs[3:]]
    optional = (*asked.qkv_bias, *asked.qk_gain)
    if not all(map(Tensor.is_contiguous, (*norms, *matrices, *scales, *cache, *optional))):
        raise ValueError("weights and cache must lie in one piece")
    num_tokens, bucket = visible[0].shape
    layers, kv_heads, capacity, head_dim = cache[0].shape
    of_layers = (ctypes.c_int64 * layers)(*asked.kinds)  # lives as long as the call
    scaled: list[int | None] = [*map(Tensor.data_ptr, scales)] or [None] * len(matrices)
    passed = Arguments(
        layers,
        norms[0].shape[1],
        intermediate,
        heads,
        kv_heads,
        head_dim,
        vocab,
        num_tokens,
        capacity,
        bucket,
        asked.per_query,
        asked.eps,
        *map(Tensor.data_ptr, norms),
        *(
            _Matrix(matrix.data_ptr(), scale, matrix.shape[1])
            for matrix, scale in zip(matrices, scaled, strict=True)
        ),
        *map(Tensor.data_ptr, (*cache, *given)),
        targets[0].data_ptr() if targets else None,
        *map(Tensor.data_ptr, results),
        None,
        torch.get_num_threads(),
        *(some[0].data_ptr() if some else None for some in (asked.qkv_bias, asked.qk_gain)),
        ctypes.addressof(of_layers),
        *(asked.head_eps, asked.attention_scale, asked.logit_divisor),
        asked.neighbours,
    )
    reference = ctypes.byref(passed)
    workspace = hidden.new_empty(library.workspace_size(reference))
    passed.workspace = workspace.data_ptr()
    library.decode(reference)
    return results
