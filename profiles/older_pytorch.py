"""Imported, lets an older PyTorch than the pinned one capture: for machines that are lent with one.

``torch.compile`` of 2.11 does not know two options that forbid a second compilation. There they are
left out; then only the count of compilations shows that no graph was compiled twice.
"""

import functools
import inspect
from typing import Any

import torch

_compile = torch.compile
_KNOWN = inspect.signature(_compile).parameters


@functools.wraps(_compile)
def _compile_with_what_is_known(*arguments: Any, **options: Any) -> Any:
    return _compile(*arguments, **{name: options[name] for name in options if name in _KNOWN})


if "isolate_recompiles" not in _KNOWN:
    torch.compile = _compile_with_what_is_known
