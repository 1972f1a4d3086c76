"""Looks into captured graphs: what they write, call, allocate and ask the host for."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from brain import Brain
from compiled.capture import Graph


class Inlined(Interpreter):
    """Runs a captured graph with its layers in line, so that every operation is in sight."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.invoke_subgraph:
            region, _, *operands = args
            return region(*operands)
        if isinstance(target, OpOverload) and target.namespace == "positronic_brain":
            lists = zip(target._schema.arguments, args, strict=True)
            written = [some for argument, some in lists if argument.alias_info is not None]
            if written:  # it is for a device that need not be there: as if it wrote zeros
                for one in chain(*written):
                    one.zero_()
                return None
        return super().call_function(target, args, kwargs)


def inputs_of(module: GraphModule) -> list[Tensor]:
    """Real tensors like those the graph was captured with."""
    examples = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    return [
        torch.empty_strided(e.shape, e.stride(), dtype=e.dtype, device="cpu").zero_()
        for e in examples
    ]


def mutated_inputs(module: GraphModule) -> set[str]:
    """Names of the inputs that the graph writes: what is copied back once it is functional."""
    functional = torch.func.functionalize(lambda *inputs: Inlined(module).run(*inputs))
    traced = make_fx(functional)(*inputs_of(module))
    names = [node.target for node in module.graph.find_nodes(op="placeholder")]
    placeholders = dict(
        zip(traced.graph.find_nodes(op="placeholder"), map(str, names), strict=True)
    )
    written = set()
    for node in traced.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "_schema", None) is not None:
            for index, argument in enumerate(node.target._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.add(placeholders[node.args[index]])
    return written


def aliased_inputs(module: GraphModule) -> int:
    """How many outputs share memory with an input."""
    inputs = inputs_of(module)
    outputs = Inlined(module).run(*inputs)
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return sum(
        tensor.untyped_storage().data_ptr() in storages for tensor in outputs if tensor.numel() > 0
    )


def captured(b: Brain, prefix: str) -> Iterator[Graph]:
    found = [capture for name, capture in b.graphs.captured.items() if name.startswith(prefix)]
    assert found
    yield from found


def compile_counts() -> dict[str, int]:
    counters: dict[str, Counter[str]] = torch._dynamo.utils.counters
    return {
        "breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"]["unique_graphs"],
        "recompiles": sum(counters["recompiles"].values()),
        "kernels": counters["inductor"]["fxgraph_cache_hit"]
        + counters["inductor"]["fxgraph_cache_miss"],
    }


SYNCING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "equal")


def operations(module: GraphModule) -> set[str]:
    traced = make_fx(lambda *inputs: Inlined(module).run(*inputs))(*inputs_of(module))
    return {
        str(node.target).removeprefix("aten.").split(".")[0]
        for node in traced.graph.nodes
        if node.op == "call_function"
    }


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation, and the bytes of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        # In-place operations and views make nothing.
        if not any(r.alias_info is not None for r in func._schema.returns):
            made = result if isinstance(result, tuple | list) else [result]
            sizes = [tensor.nbytes for tensor in made if isinstance(tensor, Tensor)]
            self.largest = max(self.largest, *sizes, 0)
        return result


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of everything that was allocated on the CPU."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
