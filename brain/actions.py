"""What may be asked of the patch, and the check that comes before anything is changed.

Positions in a batch always mean the positions before the batch, so the order of the actions in it
does not matter. A batch is refused as a whole, with nothing changed, or applied as a whole.
"""

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from brain.errors import Refused, shown
from brain.mirror import source_number
from brain.row_index import RowIndex


@dataclass(frozen=True)
class Append:
    """Adds tokens after everything that has been said. Ids are taken literally."""

    ids: Sequence[int]
    source: str = "user"


@dataclass(frozen=True)
class Cull:
    """Forgets the rows at these positions. Their bytes stay until the slots are reused."""

    positions: Sequence[int]


@dataclass(frozen=True)
class Replace:
    """Puts tokens in place of neighbouring rows.

    ``positions`` are consecutive in text order; the new tokens, at most as many, take the first of
    them. Each sees only what precedes its position.
    """

    positions: Sequence[int]
    ids: Sequence[int]
    source: str = "repair"


@dataclass(frozen=True)
class Pin:
    """Protects rows from being forgotten by the loop, or (``pinned=False``) releases them."""

    positions: Sequence[int]
    pinned: bool = True


@dataclass(frozen=True)
class Boost:
    """Adds to the brightness of rows, within 0 and the maximum."""

    positions: Sequence[int]
    amount: float


@dataclass(frozen=True)
class Redact:
    """Forgets rows and overwrites everything that was stored of them."""

    positions: Sequence[int]


@dataclass(frozen=True)
class Rewind:
    """Forgets every row after a position, and the token that has been said and has no row yet: the
    next tick reads the row at that position again. Pinned rows go too.
    """

    position: int


Action = Append | Cull | Replace | Pin | Boost | Redact | Rewind


@dataclass
class Edit:
    """A batch that has been found possible."""

    cull: set[int] = field(default_factory=set)  # positions; includes ``erase``
    erase: set[int] = field(default_factory=set)
    pin: dict[int, bool] = field(default_factory=dict)
    boost: dict[int, float] = field(default_factory=dict)
    replacing: list[tuple[int, int, int]] = field(default_factory=list)  # token, position, source
    appending: list[tuple[int, int]] = field(default_factory=list)  # token, source
    rewinds: bool = False  # whether the pending token is dropped

    def moved(self, positions: Sequence[int]) -> "Edit":
        """The same edit of rows that stood at ``positions``, ascending, and now stand densely."""
        to = {position: place for place, position in enumerate(positions)}
        return Edit(
            cull={to[position] for position in self.cull},
            erase={to[position] for position in self.erase},
            pin={to[position]: pinned for position, pinned in self.pin.items()},
            boost={to[position]: amount for position, amount in self.boost.items()},
            replacing=[(token, to[position], source) for token, position, source in self.replacing],
            appending=self.appending,
            rewinds=self.rewinds,
        )


@dataclass(frozen=True)
class Limits:
    """What a brain can take."""

    vocab_size: int
    capacity: int
    count: int  # rows that are remembered
    unforgettable: int  # rows that may be pinned before the loop finds nothing to forget
    chunk: int  # tokens that are read, and written, at a time
    erasable: int  # rows that one patch can redact
    pending: bool  # a spoken token waits for its row


def listed(values: Iterable[Any], what: str) -> list[Any]:
    """The values, an array or tensor among them, as a list. Raises Refused, naming ``what`` they
    are, if they are not iterable.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()
    try:
        return list(values)
    except TypeError:
        raise Refused(f"{what} must be a list, not {shown(values)}") from None


def integer(value: object) -> int | None:
    """A value as an integer, or None if it is anything else. True and False are not integers."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def token_ids(ids: Iterable[int], vocab_size: int, what: str) -> list[int]:
    """The ids as a list. Raises Refused if there are none, or any is not in the vocabulary."""
    if isinstance(ids, bytes | bytearray | memoryview):
        raise Refused(f"{what}: bytes are not ids; if they are text, decode them first")
    if isinstance(ids, str):
        raise Refused(f"{what}: text is not ids; encode it first, with Brain.encode")
    if isinstance(ids, Set | Mapping):
        raise Refused(f"{what}: ids of a {type(ids).__name__} have no order; give a list")
    checked = []
    for index, token in enumerate(listed(ids, f"{what}: ids")):
        number = integer(token)
        if number is None:
            raise Refused(f"{what}: id {index} is {shown(token)}, not an integer token id")
        if not 0 <= number < vocab_size:
            raise Refused(
                f"{what}: id {number} at index {index} is outside the vocabulary "
                f"(0 to {vocab_size - 1})"
            )
        checked.append(number)
    if not checked:
        raise Refused(f"{what} is empty: give at least one token")
    return checked


def resolve(actions: Sequence[Action], index: RowIndex, limits: Limits) -> Edit:
    """Checks a whole batch against what is remembered. Raises Refused, naming the action."""
    edit = Edit()
    for action in listed(actions, "actions"):
        name = type(action).__name__
        if isinstance(action, Append):
            ids = token_ids(action.ids, limits.vocab_size, name)
            number = source_number(action.source)
            edit.appending += [(token, number) for token in ids]
        elif isinstance(action, Cull):
            _remove(action.positions, edit, index, name)
        elif isinstance(action, Redact):
            edit.erase.update(_remove(action.positions, edit, index, name))
        elif isinstance(action, Rewind):
            _rewind(action, edit, index)
        elif isinstance(action, Replace):
            _replace(action, edit, index, limits)
        elif isinstance(action, Pin):
            for position in _positions(action.positions, index, name):
                if edit.pin.setdefault(position, action.pinned) != action.pinned:
                    raise Refused(f"position {position} is both pinned and released in one batch")
        elif isinstance(action, Boost):
            amount = _finite(action.amount)
            for position in _positions(action.positions, index, name):
                edit.boost[position] = edit.boost.get(position, 0.0) + amount
        else:
            raise Refused(f"{shown(action)} is not an action: use Append, Cull, Replace, Pin, …")
    _check_whole(edit, index, limits)
    return edit


def _finite(amount: object) -> float:
    try:
        if isinstance(amount, numbers.Real) and math.isfinite(amount):
            return float(amount)
    except OverflowError:
        raise Refused("Boost: the amount is too large a number") from None
    raise Refused(f"Boost by {amount!r}: the amount must be a finite number")


def _positions(positions: Sequence[int], index: RowIndex, name: str) -> list[int]:
    checked = []
    for position in listed(positions, f"{name}: positions"):
        number = integer(position)
        if number is None:
            raise Refused(f"{name}: position {position!r} is not an integer")
        index.slot_of(number)
        checked.append(number)
    if len(set(checked)) != len(checked):
        raise Refused(f"{name}: positions {checked} name a row twice")
    return checked


def _remove(positions: Sequence[int], edit: Edit, index: RowIndex, name: str) -> list[int]:
    checked = _positions(positions, index, name)
    for position in checked:
        if position in edit.cull:
            raise Refused(f"{name}: position {position} is removed twice in one batch")
    edit.cull.update(checked)
    return checked


def _rewind(action: Rewind, edit: Edit, index: RowIndex) -> None:
    (position,) = _positions([action.position], index, "Rewind")
    if edit.rewinds:
        raise Refused("Rewind: a batch can hold one")
    edit.rewinds = True
    _remove([after for after in index.positions if after > position], edit, index, "Rewind")


def _replace(action: Replace, edit: Edit, index: RowIndex, limits: Limits) -> None:
    ids = token_ids(action.ids, limits.vocab_size, "Replace")
    number = source_number(action.source)
    positions = sorted(_remove(action.positions, edit, index, "Replace"))
    if not positions:
        raise Refused("Replace: no positions given")
    if len(ids) > len(positions):
        raise Refused(f"Replace: {len(ids)} tokens do not fit in {len(positions)} positions")
    if not index.are_neighbours(positions):
        raise Refused(f"Replace: positions {positions} are not neighbours in what is remembered")
    edit.replacing += [(token, at, number) for token, at in zip(ids, positions, strict=False)]


def _check_whole(edit: Edit, index: RowIndex, limits: Limits) -> None:
    for position in (*edit.pin, *edit.boost):
        if position in edit.cull:
            raise Refused(f"position {position} is both removed and changed in one batch")
    if edit.rewinds and (edit.appending or edit.replacing):
        raise Refused("Rewind: a batch that rewinds cannot put tokens there too: give two")
    new = len(edit.replacing) + len(edit.appending) + bool(limits.pending and edit.appending)
    rows = limits.count - len(edit.cull) + new
    if rows > limits.capacity:
        raise Refused(
            f"memory is full: {rows} rows do not fit in {limits.capacity} slots; cull "
            f"{rows - limits.capacity} first or in the same batch, or feed the text, where "
            "cull lets rows go"
        )
    pinned = len(index.pinned) - sum(position in index.pinned for position in edit.cull)
    pinned += sum(
        bool(wanted) - (position in index.pinned) for position, wanted in edit.pin.items()
    )
    if any(edit.pin.values()) and pinned > limits.unforgettable:
        raise Refused(
            f"{pinned} pinned rows would leave nothing to forget: at most "
            f"{limits.unforgettable} can be pinned at this cull.target"
        )
    if len(edit.erase) > limits.erasable:
        raise Refused(f"{len(edit.erase)} rows to redact: at most {limits.erasable} in one batch")
    if new > limits.chunk and edit.cull:
        raise Refused(
            f"{new} new tokens in one batch with rows to remove: at most {limits.chunk}; "
            "append a longer text in a batch of its own"
        )
