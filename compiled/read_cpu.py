"""The operator that takes a few tokens through all layers on a CPU, built from ``read_cpu.cpp``.

Inductor makes one loop after another of the layers in PyTorch and enters each of them from Python;
the operator is one loop over the model's bytes. It is opaque to the compiler and has no other
meaning than its twin, the layers of ``read.py``: the same arguments, the same results up to
rounding, nothing written but what it returns. On a GPU, in other number formats and where it is
switched off, the twin is what is captured.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled.attention import Visibility
from compiled.int8 import Int8, Matrix
from compiled.llama import LlamaConfig, Weights
from compiled.state import State

_NAMESPACE = "positronic_brain"
_DEFINING = threading.Lock()  # two threads may open the same model at once
SOURCE = Path(__file__).with_name("read_cpu.cpp")

_REALS = {torch.float32: "float", torch.bfloat16: "BFloat16"}
"""Model dtypes that the operator knows, and what it calls them."""


class Decoded(NamedTuple):
    """What comes out of the last layer and the head."""

    logits: Tensor  # [T, vocab] float32
    new_keys: Tensor  # [layers, kv_heads, T, head_dim], RoPE applied
    new_values: Tensor  # [layers, kv_heads, T, head_dim]
    mass: Tensor  # [bucket + T] float32, summed over layers, heads and live tokens; each: [T, …]


Decode = Callable[..., Decoded]
"""The operator bound to one library; see :func:`operator`."""


class Formats(NamedTuple):
    """What ``read_cpu.cpp`` is built for: C++ types of activations and cache, and of matrices."""

    real: str
    weight: str


def formats(dtype: torch.dtype, device: torch.device, *, int8: bool) -> Formats | None:
    """Those of a model; None where the operator does not know its device or number format.
    ``int8``: its matrices are in eight bits.
    """
    real = _REALS.get(dtype)
    if device.type != "cpu" or real is None:
        return None
    return Formats(real, "int8_t" if int8 else real)


def operator(library: Path) -> Decode:
    """The function ``decode(config, weights, state, hidden, cos, sin, visible, each)``.

    ``library`` is ``read_cpu.cpp`` as built for this processor and the model's ``formats``.
    ``hidden`` [T, hidden] float32, the embedded tokens; ``cos``, ``sin`` [T, head_dim / 2] float32;
    ``visible`` over T tokens and a bucket; ``each``: every token's attention mass apart. May be
    traced by a compiler. Raises OSError for a library that cannot be loaded.
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
        each: bool,
    ) -> Decoded:
        matrices = [weights.qkv, weights.attention_out, weights.gate_up, weights.down, weights.head]
        return Decoded(
            *call(
                [weights.attention_norm, weights.mlp_norm, weights.final_norm],
                [_values(matrix) for matrix in matrices],
                [matrix.scale for matrix in matrices if isinstance(matrix, Int8)],
                [state.keys, state.values],
                [hidden, cos, sin],
                list(visible),
                config.rms_norm_eps,
                each,
            )
        )

    return decode


def _values(matrix: Matrix) -> Tensor:
    return matrix.values if isinstance(matrix, Int8) else matrix


@functools.cache
def _registered(library: Path) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The operator as PyTorch knows it. Its name holds the library's, which says what was built
    and how, so that no compiler's cache takes one for another; of two copies of it, one will do.
    """
    loaded = ctypes.CDLL(str(library))
    loaded.workspace_size.restype = ctypes.c_int64
    name = library.stem.replace("-", "_")
    with _DEFINING:
        if not hasattr(getattr(torch.ops, _NAMESPACE), name):
            _define(name, loaded)
    return _named(name)


def _define(name: str, loaded: ctypes.CDLL) -> None:
    torch.library.define(
        f"{_NAMESPACE}::{name}",
        "(Tensor[] norms, Tensor[] matrices, Tensor[] scales, Tensor[] cache, Tensor[] inputs, "
        "Tensor[] visible, float eps, bool each) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    torch.library.register_fake(f"{_NAMESPACE}::{name}", _allocated)
    torch.library.impl(f"{_NAMESPACE}::{name}", "cpu", functools.partial(_run, loaded))


def _named(name: str) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    found: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    found = getattr(getattr(torch.ops, _NAMESPACE), name).default
    return found


class _Given(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    norms: Sequence[Tensor]  # attention, MLP, final
    matrices: Sequence[Tensor]  # qkv, attention_out, gate_up, down, head
    scales: Sequence[Tensor]  # theirs in eight bits, or none
    cache: Sequence[Tensor]  # keys, values
    inputs: Sequence[Tensor]  # hidden, cos, sin
    visible: Sequence[Tensor]  # cached, new, live
    eps: float
    each: bool


def _allocated(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the results, the mass zero."""
    given = _Given(*arguments)
    num_tokens, bucket = given.visible[0].shape
    layers, kv_heads, _, head_dim = given.cache[0].shape
    vocab = given.matrices[4].shape[0]
    width = bucket + num_tokens
    new_rows = (layers, kv_heads, num_tokens, head_dim)
    return (
        given.inputs[0].new_empty((num_tokens, vocab)),
        given.cache[0].new_empty(new_rows),
        given.cache[0].new_empty(new_rows),
        given.inputs[0].new_zeros((num_tokens, width) if given.each else (width,)),
    )


class _Matrix(ctypes.Structure):
    _fields_ = (("values", ctypes.c_void_p), ("scale", ctypes.c_void_p))


class _Decode(ctypes.Structure):
    """``Decode`` of ``read_cpu.cpp``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "hidden_size", "intermediate")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "vocab")),
        *((name, ctypes.c_int64) for name in ("tokens", "capacity", "bucket", "each")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "final_norm")),
        *((name, _Matrix) for name in ("qkv", "attention_out", "gate_up", "down", "head")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "hidden", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("cached", "fresh", "live")),
        *((name, ctypes.c_void_p) for name in ("logits", "new_keys", "new_values", "mass")),
        ("workspace", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


def _run(library: ctypes.CDLL, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _allocated(*arguments)
    norms, matrices, scales, cache, inputs, visible, eps, each = _Given(*arguments)
    # The residual stream is worked on in place; the rest is copied only if it lies in pieces.
    hidden = inputs[0].clone(memory_format=torch.contiguous_format)
    passed = [hidden, *map(Tensor.contiguous, (*inputs[1:], *visible))]
    if not all(map(Tensor.is_contiguous, (*norms, *matrices, *scales, *cache))):
        raise ValueError("weights and cache must lie in one piece")
    num_tokens, bucket = visible[0].shape
    layers, kv_heads, capacity, head_dim = cache[0].shape
    scaled: list[int | None] = [*map(Tensor.data_ptr, scales)] or [None] * len(matrices)
    told = _Decode(
        layers,
        norms[0].shape[1],
        matrices[3].shape[2],
        matrices[1].shape[2] // head_dim,
        kv_heads,
        head_dim,
        matrices[4].shape[0],
        num_tokens,
        capacity,
        bucket,
        each,
        eps,
        *map(Tensor.data_ptr, norms),
        *(_Matrix(m.data_ptr(), scale) for m, scale in zip(matrices, scaled, strict=True)),
        *map(Tensor.data_ptr, (*cache, *passed, *results)),
        None,
        torch.get_num_threads(),
    )
    reference = ctypes.byref(told)
    workspace = hidden.new_empty(library.workspace_size(reference))
    told.workspace = workspace.data_ptr()
    library.decode(reference)
    return results
