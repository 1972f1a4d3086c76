"""Compiles Triton kernels for GPUs that need not be there, and tells what they take."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled.kernel_launch import STAGES, Launch

SHARED = 101376
"""Bytes of shared memory that a program may have on the GPUs that have least of it: 8.6 and 8.9."""

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class CompiledKernel(NamedTuple):
    """What a compiler made of a launch."""

    stack: int  # bytes: spilled registers
    registers: int  # of a thread
    shared: int  # bytes of shared memory
    ptx: str


def compiled_for(launch: Launch, capability: int) -> CompiledKernel:
    """Compiles a launch for one generation of GPUs, 90 being Hopper; with PDL where it has it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    names = kernel.arg_names
    constants = {**launch.constants, "PDL": capability >= 90}
    signature: dict[str, str] = dict.fromkeys(names, "constexpr")
    hints: dict[tuple[int], Any] = {}
    for number, (name, argument) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(argument, Tensor):
            signature[name] = _TYPES[argument.dtype]
            hints[(number,)] = [["tt.divisibility", 16]]
        elif argument == 1:  # as it is specialised
            constants[name] = 1
        else:
            signature[name] = "i32"
            if argument % 16 == 0:
                hints[(number,)] = [["tt.divisibility", 16]]
    assert {name for name, kind in signature.items() if kind == "constexpr"} == {*constants}
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, hints
    )
    options = {
        "num_warps": launch.num_warps,
        "num_stages": STAGES,
        "launch_pdl": capability >= 90,
    }
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert used, told
    ptx = str(made.asm["ptx"])
    return CompiledKernel(int(used[2]), int(used[1]), int(made.metadata.shared), ptx)
