"""Lets PyTorch's compiler parse its own C++ headers once, and not for every graph.

The product does not: whether precompiled headers still hold is found out at every start, and it
compiles a few graphs in a process. The tests compile some hundred.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from compiled import torch_private


def precompile_headers() -> None:
    """From here on, for all graphs of this process."""
    product = torch_private.inductor

    def inductor(device: torch.device, *, joined: bool = False) -> Callable[..., Any]:
        compile_fx = product(device, joined=joined)
        assert isinstance(compile_fx, functools.partial)
        options = {**compile_fx.keywords["config_patches"], "cpp_cache_precompile_headers": True}
        return functools.partial(compile_fx, config_patches=options)

    torch_private.inductor = inductor
