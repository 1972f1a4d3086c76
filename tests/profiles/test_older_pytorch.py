"""An older PyTorch is given the options that it knows."""

import importlib
from typing import Any

import older_pytorch
import pytest
import torch


def test_options_that_it_does_not_know_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def older(function: Any = None, *, fullgraph: bool = False) -> Any:
        given.append({"fullgraph": fullgraph})
        return function

    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", older)
        importlib.reload(older_pytorch)
        compile_: Any = torch.compile
        compile_(len, fullgraph=True, isolate_recompiles=True, recompile_limit=1)
    importlib.reload(older_pytorch)
    assert given == [{"fullgraph": True}]


def test_the_pinned_one_is_left_as_it_is() -> None:
    before = torch.compile
    importlib.reload(older_pytorch)
    assert torch.compile is before
