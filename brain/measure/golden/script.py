"""A script: what a golden does with a memory, step by step, as plain data.

Everything that runs a script returns the same thing, :class:`Observed`: one row of logits for
every token of a :class:`Read`, and one surprise for every token of a :class:`Prime` or
:class:`Feed`, in the order of the script.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from brain.errors import Refused


@dataclass(frozen=True)
class Prime:
    """Replaces the context with these tokens."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Feed:
    """Ticks with these tokens instead of sampled ones."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Cull:
    """Forgets the rows at these positions."""

    positions: tuple[int, ...]


@dataclass(frozen=True)
class Read:
    """Reads tokens at positions; of no tokens, reads the last one again (or the pending one)."""

    ids: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()


ScriptStep = Prime | Feed | Cull | Read
Script = tuple[ScriptStep, ...]

_KINDS: dict[str, type[ScriptStep]] = {"prime": Prime, "feed": Feed, "cull": Cull, "read": Read}


class Label(NamedTuple):
    """Which token an observation belongs to."""

    step: int  # of the script, from 0
    token: int
    position: int


class Observed(NamedTuple):
    """What came of a script. A surprise is a token's negative log-likelihood on arrival; that of
    the first token of a context, which nothing foretells, is 0.
    """

    rows: list[Label]  # the token that was read
    logits: Tensor  # [rows, vocab] float32, on the host
    tokens: list[Label]  # the token that was surprising
    surprises: Tensor  # [tokens] float32, nats


def to_json(script: Script) -> list[dict[str, Any]]:
    """A script as JSON."""
    names = {kind: name for name, kind in _KINDS.items()}
    return [{"do": names[type(step)], **vars(step)} for step in script]


def from_json(steps: object, where: str) -> Script:
    """A script from JSON. Raises Refused for anything that :func:`to_json` does not write."""
    if not isinstance(steps, list) or not steps:
        raise Refused(f"{where}: script is not a list of steps; write the golden again")
    return tuple(_step(step, f"{where}: script step {index}") for index, step in enumerate(steps))


def _step(step: object, where: str) -> ScriptStep:
    kind = _KINDS.get(str(step.get("do"))) if isinstance(step, dict) else None
    if kind is None or not isinstance(step, dict):
        raise Refused(f"{where} does not say prime, feed, cull or read")
    numbers = {key: value for key, value in step.items() if key != "do"}
    if set(numbers) != set(kind.__dataclass_fields__):
        raise Refused(f"{where} has other keys than {', '.join(kind.__dataclass_fields__)}")
    return kind(**{key: _integers(value, where) for key, value in numbers.items()})


def _integers(values: object, where: str) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise Refused(f"{where} holds something else than a list of integers")
    return tuple(values)


def labels(step: int, ids: Sequence[int], positions: Sequence[int]) -> list[Label]:
    """One label for each token of a step."""
    return [Label(step, token, where) for token, where in zip(ids, positions, strict=True)]
