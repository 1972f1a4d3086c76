"""One function, captured as one graph: compiled when it is first called, and never again."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from compiled.compiler import prepared


@dataclass
class Capture:
    """One captured graph and its history."""

    name: str
    seconds: float = 0.0  # wall time of all its compilations
    modules: list[GraphModule] = field(default_factory=list)  # one for each compilation

    @property
    def compilations(self) -> int:
        """How often it was compiled: 1 after warm-up, for ever."""
        return len(self.modules)


def captured(
    function: Callable[..., Any], capture: Capture, device: torch.device
) -> Callable[..., Any]:
    """The function, compiled on its first call: ``fullgraph``, no dynamic shapes, and in CUDA-graph
    mode on CUDA. Every compilation is recorded in ``capture``; a second one is an error.

    Later calls enter the graph at once, without Dynamo's guards, which cost more than a patch: the
    tensors that a graph is bound to never change, and its name fixes the shape of the others. The
    graph itself asserts the sizes of all of them.
    """
    import torch._inductor.test_operators
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    options = list_mode_options("reduce-overhead") if device.type == "cuda" else {}
    # To see whether its precompiled headers still hold, Inductor preprocesses them at every start.
    options = {**options, "cpp_cache_precompile_headers": False}

    def inductor(module: GraphModule, inputs: list[Tensor]) -> Any:
        start = time.perf_counter()
        if device.type == "cpu":
            prepared().result()
        compiled_module = compile_fx(module, inputs, config_patches=options)
        capture.seconds += time.perf_counter() - start
        capture.modules.append(module)
        return compiled_module

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    # Code of its own: Dynamo keeps what it makes with the code, and this is to be the only thing.
    call.__code__ = call.__code__.replace(co_name=f"{call.__name__} {capture.name}")
    strict: dict[str, Any] = {"recompile_limit": 1, "isolate_recompiles": True}
    compiled: Callable[..., Any] = torch.compile(
        call,
        fullgraph=True,
        dynamic=False,
        backend=inductor,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        **strict,
    )
    return _Entered(call, compiled) if device.type == "cpu" else compiled


class _Entered:
    """A compiled function whose graph is entered directly from its second call on.

    What ``torch.compile`` does around a call (to find the code that belongs to it, to keep modes of
    dispatch and tracing as they were) takes 0.1 ms of a tick of three graphs. It is of no use where
    there is one piece of code for ever, and nothing else is ever traced within.
    """

    def __init__(self, call: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        assert isinstance(call, FunctionType)
        self._call = call
        self._compiled = compiled
        self._graph: Callable[..., Any] | None = None

    @property
    def is_direct(self) -> bool:
        """Whether the graph is entered directly."""
        return self._graph is not None

    def __call__(self, *arguments: Any) -> Any:
        if self._graph is not None:
            return self._graph(*arguments)
        return self._compile(*arguments)

    def _compile(self, *arguments: Any) -> Any:
        """The first call."""
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        returned = self._compiled(*arguments)
        made = _debug_get_cache_entry_list(self._call.__code__)
        if len(made) == 1:
            call = self._call
            given = (call.__globals__, call.__name__, call.__defaults__, call.__closure__)
            self._graph = FunctionType(made[0].code, *given)
        return returned


class Graph:
    """Stand-in until the merge."""

    def __init__(self, name: str, function: Callable[..., Any], device: torch.device) -> None:
        self.name, self._function, self._device = name, function, device
        self._capture = Capture(name)
        self._enter: Callable[..., Any] | None = None

    @property
    def compilations(self) -> int:
        return self._capture.compilations

    @property
    def seconds(self) -> float:
        return self._capture.seconds

    @property
    def modules(self) -> list[GraphModule]:
        return self._capture.modules

    @property
    def is_direct(self) -> bool:
        return bool(getattr(self._enter, "is_direct", False))

    def __call__(self, *arguments: Any) -> Any:
        if self._enter is None:
            self._enter = captured(self._function, self._capture, self._device)
        return self._enter(*arguments)
