"""A user's own policy: imported by name, or given as a function.

A policy is code, so the user names it, never a file: saves and records keep its name and the hash
of its source, and are refused to another one.
"""

import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brain.errors import Refused, one_line
from compiled.choose import KeepScore, Look
from compiled.state import Cursor, State


@dataclass(frozen=True)
class CustomPolicy:
    """A policy with its name, ``package.module:function``, and the hash of its source."""

    name: str
    function: KeepScore
    sha256: str

    def __call__(self, state: State, look: Look) -> Tensor:
        """The policy's keep-scores. Raises Refused, naming the place, for whatever it gets wrong;
        not while it is compiled, where :meth:`try_out` has looked before.
        """
        if torch.compiler.is_compiling():
            return self.function(state, look)
        try:
            scores: Any = self.function(state, look)
        except Exception as error:
            raise self._refusal(error) from None
        wanted = f"float32 {list(state.valid.shape)}"
        found = type(scores).__name__
        if isinstance(scores, Tensor):
            found = f"{str(scores.dtype).removeprefix('torch.')} {list(scores.shape)}"
        if found != wanted:
            raise Refused(
                f"policy {self.name} returns {found}: it must return a tensor {wanted}, one score "
                "for each slot"
            )
        return scores  # type: ignore[no-any-return]

    def try_out(self, state: State, cursor: Cursor, *, compiled: bool) -> None:
        """Asks the policy once, before anything depends on it. Raises Refused if it raises, writes,
        returns another shape or, where it will be ``compiled``, cannot be captured in a graph.
        """
        tick = cursor.tick + 1
        one = torch.ones_like(tick)
        look = Look(torch.zeros_like(state.brightness), cursor.position[0], one, tick)
        before = [tensor._version for tensor in state]
        self(state, look)
        for name, tensor, version in zip(State._fields, state, before, strict=True):
            if tensor._version != version:
                raise Refused(f"policy {self.name} writes to {name}: a policy only looks")
        if compiled:
            call: Callable[..., Any] = torch.compile(
                self.function, fullgraph=True, dynamic=False, backend="eager"
            )
            try:
                call(state, look)
            except Exception as error:
                raise Refused(
                    f"policy {self.name} cannot be captured ({one_line(error)}): use tensor "
                    "operations of fixed shapes alone, or engine=eager"
                ) from None

    def _refusal(self, error: Exception) -> Refused:
        file = inspect.getsourcefile(inspect.unwrap(_definition(self.function)))
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if f.filename == file), frames[-1])
        return Refused(
            f"policy {self.name} failed at {place.filename}:{place.lineno} "
            f"({type(error).__name__}: {one_line(error)})"
        )


def custom_policy(given: str | KeepScore) -> CustomPolicy:
    """The policy of a name ``package.module:function``, looked for in the current folder, too, or
    of a function. Raises Refused.
    """
    if isinstance(given, str):
        return _described(given, _imported(given))
    definition = _definition(given)
    name = f"{definition.__module__}:{getattr(definition, '__qualname__', '?')}"
    return _described(name, given)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the module, which may raise anything
        raise Refused(
            f"cull.policy={name} cannot be imported ({type(error).__name__}: {one_line(error)}): "
            "give package.module:function"
        ) from None
    finally:
        sys.path.remove(here)
    return found


def _described(name: str, function: Any) -> CustomPolicy:
    if not callable(function):
        raise Refused(f"cull.policy={name} is {type(function).__name__}, not a function")
    try:
        source = inspect.getsource(_definition(function))
    except (OSError, TypeError):
        raise Refused(
            f"policy {name} has no source that can be read: define it in a file, so that a save "
            "can tell it from another one"
        ) from None
    if not inspect.isfunction(function):
        source += repr(function)  # of an instance its numbers count, too
    if re.search(r" at 0x[0-9a-f]+", source) or getattr(function, "__closure__", None):
        raise Refused(
            f"policy {name} holds values that its source does not show: write a function, or a "
            "class whose repr shows its numbers"
        )
    return CustomPolicy(name, function, hashlib.sha256(source.encode()).hexdigest())


def _definition(function: Any) -> Any:
    """Whose source is the policy's: a function's own, or that of an instance's class."""
    return function if inspect.isroutine(function) else type(function)
