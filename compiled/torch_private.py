"""Everything that is used of PyTorch without being promised by it.

Names with an underscore, operators for PyTorch's own use and settings of its compiler may change
with any release. They are all here, and ``test_torch_private.py`` fails for each one that no
longer does what it did. This module knows nothing of models: whoever calls says why.
"""

import functools
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

# The compiler ------------------------------------------------------------------------------------

PROBED_WITH = (
    "torch._dynamo",
    "torch._inductor.codecache",
    "torch._inductor.cpp_builder",
    "torch._inductor.cpu_vec_isa",
    "torch.utils.cpp_extension",
)
"""All that :func:`probe_processor` imports as it goes."""


def probe_processor() -> None:
    """Finds out what Inductor asks once in a process: which vector instructions the C++ compiler
    and the processor have, by ten processes one after another, and a hash of PyTorch's own source,
    which is part of every key of its cache. It remembers both.
    """
    from torch._inductor.codecache import torch_key
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    valid_vec_isa_list()
    torch_key()


def inductor(
    device: torch.device, *, joined: bool = False
) -> Callable[[GraphModule, list[Tensor]], Any]:
    """Inductor as a backend of ``torch.compile``: with CUDA graphs on CUDA. ``joined``: kernels of
    a GPU that do not depend on each other are launched as one.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    options = list_mode_options("reduce-overhead") if device.type == "cuda" else {}
    # To see whether its precompiled headers still hold, Inductor preprocesses them at every start.
    # And what is tuned by timing may be another every time.
    joining = {"combo_kernels": joined, "combo_kernels_autotune": 0}
    options = {**options, "cpp_cache_precompile_headers": False, **joining}
    return functools.partial(compile_fx, config_patches=options)


def materialise(x: Tensor) -> Tensor:
    """``x``, written to memory before it is used; for what is compiled by :func:`inductor`.

    Inductor would rather compute it anew in the loop of every row that it is multiplied by: a norm
    with its root, or an exponential, thousands of times.

    The operator is one that PyTorch tests Inductor with. One of our own would need a lowering,
    which has no public interface either, and Inductor's cache does not know those: it would reuse
    what was compiled without it. ``as_strided`` makes Inductor write its argument, too, but adds a
    loop where that is a view of what has not been written (tried with the float32 read of one
    token).
    """
    written: Tensor = torch.ops._inductor_test.realize(x)
    return written


def compiled_codes(code: CodeType) -> list[CodeType]:
    """What Dynamo made of a function's code: one code object for each time it was compiled."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return [entry.code for entry in _debug_get_cache_entry_list(code)]


def compiler_error() -> type[Exception]:
    """What Dynamo raises for all that fails while it compiles, in it and in its backend."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def keep_address(tensor: Tensor) -> None:
    """Tells CUDA graphs that this tensor never moves, so that they use it where it lies."""
    torch._dynamo.mark_static_address(tensor)


def compiling_without_collection() -> AbstractContextManager[Any]:
    """Within this, Dynamo does not collect garbage after every graph that it compiles."""
    patched: AbstractContextManager[Any] = torch._dynamo.config.patch(run_gc_after_compile=False)
    return patched


def with_kernel_profile() -> AbstractContextManager[Any]:
    """What is compiled within this tells PyTorch's profiler of every loop nest on a CPU."""
    patched: AbstractContextManager[Any]
    patched = torch._inductor.config.patch({"cpp.enable_kernel_profile": True})
    return patched


def graph_folder() -> str:
    """Where Inductor keeps what it compiles, made where it is absent. Raises OSError."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def silence_profiler() -> None:
    """Has the profiler keep from standard error when it begins and ends."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above USDT, its highest


def computes(operator: str) -> bool:
    """Whether an operator such as ``aten::add`` returns new numbers, or writes, in every overload;
    False for one that only looks at its arguments in another way.
    """
    returned = [
        alias.alias_info
        for schema in torch._C._jit_get_schemas_for_operator(operator)
        for alias in schema.returns
    ]
    return bool(returned) and all(alias is None or alias.is_write for alias in returned)


# Products on a CPU -------------------------------------------------------------------------------


def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN has instructions of this processor for products in bfloat16 or float16. On
    x86 it also says yes to bfloat16 where it has AVX-512 and has to make do without them.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    onednn = torch.ops.mkldnn
    supported: bool = onednn._is_mkldnn_fp16_supported()
    if dtype == torch.bfloat16:
        supported = onednn._is_mkldnn_bf16_supported()
        if platform.machine() in ("x86_64", "AMD64"):
            supported = supported and torch.cpu._is_avx512_bf16_supported()
    return supported


def onednn_linear(
    x: Tensor, weight: Tensor, addend: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias + addend`` by oneDNN: [N, in] × [out, in] + [out] + [N, out] →
    [N, out].
    """
    onednn = torch.ops.mkldnn._linear_pointwise
    product: Tensor
    if addend is not None:
        product = onednn.binary(x, addend, weight, bias, "add")
    else:
        product = onednn(x, weight, bias, "none", [], "")
    return product


def int8_linear(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """``x @ values.T * scale`` by a kernel for few rows: [N, in] × [out, in] int8 × [out] →
    [N, out]. It reads whole vectors: ``in`` must be a multiple of 64, ``out`` of 4.
    """
    return torch._weight_int8pack_mm(x, values, scale)
