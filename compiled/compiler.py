"""What the compiler does once in a process before it compiles anything, done beside other work."""

import functools
import importlib
from concurrent.futures import Future
from threading import Thread

FOR_THE_SEARCH = (
    "torch._dynamo",
    "torch._inductor.codecache",
    "torch._inductor.cpp_builder",
    "torch._inductor.cpu_vec_isa",
    "torch.utils.cpp_extension",
)
"""All that the search imports as it goes. Imported before it begins: two
threads that import could meet half-way in a circle of modules.
"""


@functools.cache
def prepared() -> Future[None]:
    """Begins to prepare PyTorch's compiler for this processor; wait for the result before it is
    asked to compile. The first call imports it, which takes two seconds, and returns.

    Inductor tries out which vector instructions the C++ compiler and the processor have, in up to
    ten processes one after another, and reads PyTorch's own source, for a key of its cache; it
    remembers both until this process ends. Nothing is decided here, only when: meanwhile weights
    are loaded and the first graph is traced.
    """
    for name in FOR_THE_SEARCH:
        importlib.import_module(name)
    from torch._inductor.codecache import torch_key
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    found: Future[None] = Future()

    def find_out() -> None:
        try:
            valid_vec_isa_list()
            torch_key()
        except BaseException as error:
            found.set_exception(error)
        else:
            found.set_result(None)

    # A daemon: whoever is refused meanwhile need not wait for what nobody will ask for.
    Thread(target=find_out, name="compiler", daemon=True).start()
    importlib.import_module("torch._inductor.compile_fx")
    return found
