"""How many kernels a tick starts on a GPU, counted without one.

    python profiles/kernels_on_paper.py smollm2 tinyllama      # with engine.kernels=true

PyTorch's compiler is given the graphs of a tick as they are traced here, and told that their
tensors lie on an H100: it writes the program that it would write there, and nothing is built or
run. Kernels of our own are opaque calls in that program; how many each of them starts is counted in
a tick of a tiny model, whose kernels are interpreted. Calls of PyTorch's library are counted as
two: a selection of up to some thousand rows, the only one there is, launches as many.

This module knows the inside of the compiler of the release that is pinned.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from seeded_folder import SHAPES
from torch import Tensor
from torch._inductor import compile_fx as compiler
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from brain.brain import Brain
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.measure.golden.seeded import SeededModel
from compiled import kernel_launch, torch_private
from compiled.choose import choose
from compiled.kernel_launch import Launch
from compiled.llama import LlamaConfig
from compiled.read import Reading

CUDA = torch.device("cuda", 0)
H100 = dict.fromkeys(DeviceProperties._fields) | {
    **{"type": "cuda", "index": 0, "cc": 90, "major": 9, "multi_processor_count": 132},
    **{"warp_size": 32, "max_threads_per_multi_processor": 2048},
    "regs_per_multiprocessor": 65536,
}
TINY = LlamaConfig(64, 8, 8, 1, 2, 1, 8, 1e-5, 1e4, 8192)
OF_A_LIBRARY_CALL = 2
OWN = {
    "project": "read_cuda",
    **dict.fromkeys(("attend", "combine", "add_out", "gate_up", "add_down", "head"), "read_cuda"),
    **dict.fromkeys(("mark", "score", "pick"), "draw_cuda"),
    **dict.fromkeys(("rank_rows", "choose_rows"), "cull_cuda"),
    **dict.fromkeys(("find_broken", "join_flags"), "not_finite_cuda"),
    **dict.fromkeys(("find_free", "carry_out"), "patch_cuda"),
}
"""The operator that starts each kernel."""


class Written(Exception):
    """The program has been written: nothing is to be built."""


@contextmanager
def an_h100() -> Iterator[None]:
    """Within this the compiler believes that there is one."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    hashed = SimpleNamespace(hash=lambda: "none")
    answers: list[tuple[str, Any]] = [
        ("torch.cuda.is_available", lambda: True),
        ("torch.cuda.current_device", lambda: 0),
        ("torch.cuda.get_device_capability", lambda *_: (9, 0)),
        ("torch.cuda.get_device_properties", lambda *_: properties),
        ("torch.version.cuda", "13.0"),
        ("torch.utils._triton.has_triton", lambda *_: True),
        ("torch._inductor.scheduler.has_triton", lambda *_: True),
        ("torch.utils._triton.triton_backend", lambda: hashed),
        ("torch._inductor.async_compile.AsyncCompile.triton", lambda *_, **__: None),
        ("torch._inductor.utils.get_gpu_type", lambda: "cuda"),
        ("torch._inductor.utils.get_gpu_shared_memory", lambda: 232448),
    ]
    with ExitStack() as entered:
        for name, answer in answers:
            entered.enter_context(mock.patch(name, answer))
        made = classmethod(lambda cls, device: DeviceProperties(**H100))  # type: ignore[arg-type]
        entered.enter_context(mock.patch.object(DeviceProperties, "create", made))
        yield


def move(module: GraphModule) -> None:
    """Says of every tensor of a traced graph that it lies on the GPU."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(tensor, FakeTensor):
                tensor.fake_device = CUDA
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
    for part in module.children():
        if isinstance(part, GraphModule):
            move(part)


def program_of(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What the compiler writes for a function of these tensors on a GPU."""
    programs: list[str] = []

    def write(module: GraphModule, inputs: list[Tensor], **_: Any) -> Any:
        compiler._recursive_record_original_output_strides(module)
        compiler._recursive_post_grad_passes(module, True)
        mode = torch._guards.detect_fake_mode(inputs)
        assert mode is not None
        move(module)
        for tensor in inputs:
            if isinstance(tensor, FakeTensor):
                tensor.fake_device = CUDA
        with an_h100(), V.set_fake_mode(mode), V.set_debug_handler(mock.MagicMock()):
            lowered = GraphLowering(module, example_inputs=inputs, shape_env=mode.shape_env)
            with V.set_graph_handler(lowered):
                lowered.run(*inputs)
                programs.append(lowered.codegen()[0].value)
        raise Written

    def backend(module: GraphModule, inputs: list[Tensor]) -> Any:
        with torch._inductor.config.patch(options):
            return compiler.compile_fx(module, inputs, inner_compile=write)

    torch._dynamo.reset()
    try:
        compiled: Any = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        compiled(*arguments)
    except Exception:
        if not programs:
            raise
    return programs[0]


def calls_of(program: str) -> tuple[list[str], list[str]]:
    """The compiler's own kernels and the library's calls, in the order in which they are made."""
    kernels = re.findall(r"(triton_\w+)\.run\(", program)
    return kernels, re.findall(
        r"(?:torch\.ops|extern_kernels)\.(?:\w+\.)*?(\w+)(?:\.default|\.out)?\(", program
    )


def buffers_of(program: str) -> list[int]:
    """Numbers in each buffer that the program allocates."""
    shapes = re.findall(r"= empty_strided_cuda\(\(([^)]*)\)", program)
    return [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]


def brain_of(config: LlamaConfig, engine: str) -> Brain:
    """A brain of random weights, with kernels."""
    asked = [f"engine={engine}", "device=cpu", "dtype=bfloat16", "engine.native=false"]
    asked += ["engine.kernels=true", "capacity=1024", "engine.smallest_bucket=1024"]
    settings = settings_of(compose_conf(asked))
    checkpoint = SeededModel("counted", config, seed=7).checkpoint(settings.dtype, settings.device)
    return Brain(checkpoint, settings)


def started() -> dict[str, Counter[str]]:
    """How many kernels each of our operators starts, of a tick of models of one and two layers."""
    found: list[Counter[str]] = []
    for layers in (1, 2):
        b, counted = brain_of(replace(TINY, num_layers=layers), "eager"), Counter[str]()
        b.prime([1, 2, 3])

        def start(launch: Launch, *, overlaps: bool, seen: Counter[str] = counted) -> None:
            seen[OWN[launch.kernel.__name__]] += 1

        with mock.patch.object(kernel_launch, "start", start):
            b.tick()
        found.append(counted)
    return {"one": found[0], "each_layer_more": found[1] - found[0]}


def counted(config: LlamaConfig) -> dict[str, Any]:
    """Kernels of a tick, and of the patch of an edit; of that also what it allocates."""
    b = brain_of(replace(config, num_layers=2), "compiled")
    graphs, state, cursor = b.graphs, b.state, b.cursor
    rows = (2, config.num_kv_heads, 1, config.head_dim)
    new = torch.zeros(rows, dtype=torch.bfloat16)
    logits, mass = torch.zeros(1, config.vocab_size), torch.zeros(b.capacity)
    reading = Reading(logits, new, new.clone(), mass, torch.zeros(1))
    spec, unforced = graphs.spec, b._unforced
    choice = choose(
        *(state, cursor, reading, graphs.sampling, unforced),
        method=spec.method,
        eviction=spec.eviction,
    )
    plan = choice.plan(reading)
    step = (b.checkpoint.weights, state, cursor, b.graphs.one, graphs.sampling, unforced)
    given = {("step", 1, 1024): step, ("patch tick", 1, 0): (state, cursor, plan)}
    options = torch_private.inductor(CUDA, joined=True).keywords["config_patches"]  # type: ignore[attr-defined]
    of_ours, told, total = started(), {}, 0
    for key, arguments in given.items():
        graph = graphs.table[key]
        kernels, calls = calls_of(program_of(graph._call, arguments, options))
        counts = {"compiler": len(kernels), "library": 0}
        for call in calls:
            own = of_ours["one"][call] + (config.num_layers - 1) * of_ours["each_layer_more"][call]
            if own:
                counts[call] = own
            else:
                counts["library"] += OF_A_LIBRARY_CALL
        told[graph.name] = counts
        total += sum(counts.values())
    width = graphs.edit_widths[0]
    edit = graphs.table["patch edit", width, 0]
    program = program_of(edit._call, (state, cursor, graphs.empty_edit(width)), options)
    told_of_edit = {
        "kernels": len(calls_of(program)[0]),
        "library": len(calls_of(program)[1]),
        "largest_buffer": max(buffers_of(program)),
        "row": 2 * config.num_kv_heads * config.head_dim,  # of its keys in two layers
        "width": width,
        "slots": b.capacity,
    }
    return {"graphs": told, "kernels": total, "edit": told_of_edit}


def main() -> None:
    """Prints one JSON line: models, and the kernels of a tick of each."""
    torch.set_num_threads(1)
    print(json.dumps({name: counted(SHAPES[name]) for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
