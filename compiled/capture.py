"""One function, one graph, one compilation."""

import contextlib
import functools
import importlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from threading import Thread
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from compiled import torch_private

Capturing = Callable[[str], AbstractContextManager[Any]]


class NotCaptured(RuntimeError):
    """A function was called as it is."""


class Graph:
    """A function, compiled when it is first called and never again: ``fullgraph``, no dynamic
    shapes, and in CUDA-graph mode on CUDA. A second compilation is an error.

    Later calls enter the graph without Dynamo's guards, which cost more than a patch: the tensors
    that a graph is bound to never change, and its name fixes the shape of the others. The graph
    itself asserts the sizes of all of them. On a CPU they enter it directly: what
    ``torch.compile`` does around a call (to find the code that belongs to it, to keep modes of
    dispatch and tracing as they were) takes some 0.03 ms, and is of no use where there is one piece
    of code for ever, and nothing else is ever traced within.

    Attributes:
        name: Of the graph, unique among those of a brain.
        is_direct: Whether calls enter the graph directly.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        device: torch.device,
        capturing: Capturing = contextlib.nullcontext,
        *,
        joined: bool = False,
    ) -> None:
        """Names what is to be compiled. Costs nothing: nothing is imported or compiled yet.

        Args:
            name: See the attribute.
            function: What is compiled: of tensors, and tuples of them, alone.
            device: Where the tensors are.
            capturing: Opened around compilation, with the name.
            joined: Whether small kernels of a GPU are launched as one.
        """
        self.name = name
        self._capturing = capturing
        self.is_direct = False
        self._device, self._joined = device, joined
        # PyTorch keeps the backend with the code, out of the garbage collector's sight. So the
        # backend knows this list, not the graph.
        self._made: list[tuple[GraphModule, float]] = []
        self._call: FunctionType = _own_code(name, function)
        self._compiled: Callable[..., Any] | None = None  # holds the code that is entered
        self._enter: Callable[..., Any] = self._first_call

    @property
    def modules(self) -> list[GraphModule]:
        """What Dynamo traced: one module for each compilation."""
        return [module for module, _ in self._made]

    @property
    def seconds(self) -> float:
        """Wall time of all compilations."""
        return sum(seconds for _, seconds in self._made)

    @property
    def compilations(self) -> int:
        """How often the function was compiled: 1 after warm-up, for ever."""
        return len(self._made)

    def __call__(self, *arguments: Any) -> Any:
        """The function of these arguments, by its graph."""
        return self._enter(*arguments)

    def _first_call(self, *arguments: Any) -> Any:
        """Compiles, and lets later calls enter what was made. A call that is interrupted after
        compiling finds what was made when it is repeated.
        """
        if self._compiled is None:
            strict: dict[str, Any] = {"recompile_limit": 1, "isolate_recompiles": True}
            self._compiled = torch.compile(
                self._call,
                fullgraph=True,
                dynamic=False,
                backend=_backend(self._made, self._device, joined=self._joined),
                options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
                **strict,
            )
        with self._capturing(self.name):
            returned = self._compiled(*arguments)
            if not self.compilations:
                raise NotCaptured("PyTorch was told to compile nothing")
        self._enter = self._compiled
        if self._device.type == "cpu":
            call, made = self._call, torch_private.compiled_codes(self._call.__code__)
            if len(made) == 1:
                given = (call.__globals__, call.__name__, call.__defaults__, call.__closure__)
                self._enter = FunctionType(made[0], *given)
                self.is_direct = True
        return returned


def _own_code(name: str, function: Callable[..., Any]) -> FunctionType:
    """The function, called by code that nobody else has: Dynamo keeps with a function's code what
    it makes of it, and that is to be one graph.
    """

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    assert isinstance(call, FunctionType)
    call.__code__ = call.__code__.replace(co_name=f"{call.__name__} {name}")
    return call


def _backend(
    made: list[tuple[GraphModule, float]], device: torch.device, *, joined: bool
) -> Callable[[GraphModule, list[Tensor]], Any]:
    """Inductor, noting in ``made`` every module that it compiles and the seconds it took."""
    inductor = torch_private.inductor(device, joined=joined)

    def compile_module(module: GraphModule, inputs: list[Tensor]) -> Any:
        start = time.perf_counter()
        if device.type == "cpu":
            prepared().exception()  # if it failed, the compiler does it again, and says so
        compiled_module = inductor(module, inputs)
        made.append((module, time.perf_counter() - start))
        return compiled_module

    return compile_module


@functools.cache
def prepared() -> Future[None]:
    """Begins to prepare PyTorch's compiler for this processor, beside other work.

    The first call imports the compiler, which takes two seconds, and returns while a thread does
    what the compiler does once in a process. Nothing is decided here, only when: meanwhile weights
    are loaded and the first graph is traced.
    Returns:
        What to wait for before the compiler is asked to compile.
    """
    # Imported before the thread begins: two that import could meet half-way in a circle of modules.
    for name in torch_private.PROBED_WITH:
        importlib.import_module(name)
    done: Future[None] = Future()

    def probe() -> None:
        try:
            torch_private.probe_processor()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    # A daemon: whoever is refused meanwhile need not wait for what nobody will ask for.
    Thread(target=probe, name="compiler", daemon=True).start()
    importlib.import_module("torch._inductor.compile_fx")
    return done
