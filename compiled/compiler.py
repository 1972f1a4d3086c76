"""What the compiler does once in a process before it compiles anything, done beside other work."""

import functools
import importlib
from concurrent.futures import Future
from threading import Thread

LAZILY_IMPORTED = (
    "torch._dynamo",
    "torch._inductor.codecache",
    "torch._inductor.compile_fx",
    "torch._inductor.cpp_builder",
    "torch._inductor.cpu_vec_isa",
)


@functools.cache
def prepared() -> Future[None]:
    """Begins to prepare PyTorch's compiler for this processor; wait for the result before it is
    asked to compile. The first call imports it, which takes two seconds, and returns.

    Inductor tries out which vector instructions the C++ compiler and the processor have, in up to
    ten processes one after another, and remembers it until this one ends. Nothing is decided here,
    only when: while it waits for those processes, weights are loaded and the first graph is traced.
    """
    for name in LAZILY_IMPORTED:  # all of them here: two threads that import could meet half-way
        importlib.import_module(name)
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    found: Future[None] = Future()

    def find() -> None:
        try:
            valid_vec_isa_list()
        except BaseException as error:
            found.set_exception(error)
        else:
            found.set_result(None)

    # A daemon: whoever is refused meanwhile need not wait for what nobody will ask for.
    Thread(target=find, name="vector-instructions", daemon=True).start()
    return found
