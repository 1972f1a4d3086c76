"""From rows and edits, as the host knows them, to the tensors of one patch."""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from brain.actions import Edit
from brain.mirror import Mirror
from compiled.patch import Plan, RowColumns
from compiled.score import Brightness, Novelty, seed_brightness
from compiled.state import NOWHERE, Cursor, State


@dataclass(frozen=True)
class Row:
    """A token to be remembered: its id, where it stands in the text, and who put it there."""

    token: int
    position: int
    source: int


class Told(NamedTuple):
    """How a token came: its own surprise, and the running mean up to it. Nats."""

    surprise: float
    novelty: float


UNTOLD = Told(0.0, 0.0)
"""Of a token that nothing came before."""


class Link(NamedTuple):
    """What a new row tells of the row after it. Nats."""

    novelty: float
    next_surprise: float


@dataclass(frozen=True)
class Standing:
    """A cursor at a row that is remembered already (or, with position NOWHERE, at nothing)."""

    token: int = 0
    position: int = NOWHERE
    told: Told = UNTOLD
    source: int = 0

    def cursor(self, tick: int, device: torch.device) -> Cursor:
        """The same as tensors."""
        return Cursor(
            token=torch.tensor([self.token], dtype=torch.int64, device=device),
            position=torch.tensor([self.position], dtype=torch.int64, device=device),
            surprise=torch.tensor([self.told.surprise], dtype=torch.float32, device=device),
            novelty=torch.tensor([self.told.novelty], dtype=torch.float32, device=device),
            source=torch.tensor([self.source], dtype=torch.uint8, device=device),
            uncommitted=torch.zeros((), dtype=torch.int64, device=device),
            tick=torch.tensor(tick, dtype=torch.int64, device=device),
        )


def predecessor(row: Row, previous: Row | None, mirror: Mirror) -> int | None:
    """Index in the mirror of the remembered row that foretells this one.

    None if there is no such row, or if ``previous``, the new row before this one, stands nearer.
    """
    index = bisect.bisect_left(mirror.position, row.position) - 1
    if index < 0 or (previous is not None and previous.position >= mirror.position[index]):
        return None
    return index


def standing_after(
    rows: Sequence[Row], told: Sequence[Told], edit: Edit, mirror: Mirror
) -> Standing:
    """The newest row there will be, once the edit is applied and the rows are committed."""
    kept = [index for index, p in enumerate(mirror.position.tolist()) if p not in edit.cull]
    if rows and (not kept or rows[-1].position > mirror.position[kept[-1]]):
        return Standing(rows[-1].token, rows[-1].position, told[-1], rows[-1].source)
    if not kept:
        return Standing()
    newest = kept[-1]
    return Standing(
        int(mirror.token_id[newest]),
        int(mirror.position[newest]),
        Told(float(mirror.surprise[newest]), float(mirror.novelty[newest])),
        int(mirror.source[newest]),
    )


def echoes_of(
    rows: Sequence[Row], told: Sequence[Told], said: Sequence[bool], constants: Novelty
) -> tuple[list[float], float]:
    """What each of these rows hears of those after it, and what a row just before the first that is
    ``said`` (rather than put in an old place) hears of them all, but for that one step: nats, as
    ``score.echo`` would add up one by one.
    """
    heard = [0.0] * len(rows)
    after, at = 0.0, 0  # heard at position ``at`` of everything said from there on
    for index in reversed(range(len(rows))):
        if not said[index]:
            continue
        if after:
            heard[index] = after * constants.decay ** (at - rows[index].position)
        after = heard[index] + constants.fresh * told[index].surprise
        at = rows[index].position
    return heard, after


def row_columns(
    rows: Sequence[Row],
    told: Sequence[Told],
    echoes: Sequence[float],
    width: int,
    born: int,
    constants: Brightness,
    device: torch.device,
) -> RowColumns:
    """Mirror columns of rows about to be appended, padded to ``width``."""
    padding = [0] * (width - len(rows))

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor([*values, *padding], dtype=dtype, device=device)

    source = column([row.source for row in rows], torch.uint8)
    return RowColumns(
        token_id=column([row.token for row in rows], torch.int64),
        position=column([row.position for row in rows], torch.int64),
        brightness=seed_brightness(source, constants),
        surprise=column([one.surprise for one in told], torch.float32),
        novelty=column(
            [one.novelty + echo for one, echo in zip(told, echoes, strict=True)], torch.float32
        ),
        source=source,
        born=torch.full((width,), born, dtype=torch.int64, device=device),
        lit=torch.full((width,), born, dtype=torch.int64, device=device),
        pinned=torch.zeros(width, dtype=torch.bool, device=device),
        length=torch.tensor(len(rows), dtype=torch.int64, device=device),
    )


def with_edit(plan: Plan, state: State, edit: Edit, mirror: Mirror, constants: Brightness) -> Plan:
    """The plan, doing everything the edit asks for as well."""
    device = state.valid.device

    def slots(positions: Iterable[int]) -> list[int]:
        return [int(mirror.slot[mirror.index_of(position)]) for position in positions]

    if edit.cull:
        cull = torch.zeros(state.capacity, dtype=torch.bool)
        cull[slots(edit.cull)] = True
        plan = plan._replace(cull=cull.to(device))
    if edit.boost:
        brightness = state.brightness.to("cpu", copy=True)
        for slot, amount in zip(slots(edit.boost), edit.boost.values(), strict=True):
            boosted = float(brightness[slot]) + amount
            brightness[slot] = min(max(boosted, 0.0), constants.maximum)
        plan = plan._replace(brightness=brightness.to(device))
    if edit.pin:
        pinned = state.pinned.to("cpu", copy=True)
        for slot, wanted in zip(slots(edit.pin), edit.pin.values(), strict=True):
            pinned[slot] = wanted
        plan = plan._replace(pinned=pinned.to(device))
    if edit.erase:
        erase = torch.full((plan.rows.token_id.shape[0],), NOWHERE, dtype=torch.int64)
        erase[: len(edit.erase)] = torch.tensor(slots(edit.erase), dtype=torch.int64)
        plan = plan._replace(erase=erase.to(device))
    return plan


def lean(plan: Plan, length: int, *, culls: bool, erases: bool) -> Plan:
    """The plan without what it does not need, for a patch that is not captured: those of all
    captured ones have the same shape, whatever they are asked for.

    ``length`` rows are live; whether it culls or erases anything is as told.
    """
    padded = length < plan.rows.token_id.shape[0]
    return plan._replace(
        erase=plan.erase if erases else None,
        padded=padded,
        fresh=not (padded or culls or erases),
    )


def with_saved_rows(
    plan: Plan,
    rows: Mapping[str, Tensor],
    slot: Tensor,
    start: int,
    length: int,
    device: torch.device,
) -> Plan:
    """The plan, writing slots ``start`` to ``start + length - 1``: the saved rows of those that
    have one, at their places, and zeros in the holes between them.
    """
    first, last = torch.searchsorted(slot, torch.tensor([start, start + length])).tolist()
    place = slot[first:last] - start  # [rows in this range]

    def placed(empty: Tensor, name: str, axis: int = 0) -> Tensor:
        saved = rows[name].narrow(axis, first, last - first).to(device)
        return empty.index_copy(axis, place.to(device), saved)

    columns = {
        name: placed(getattr(plan.rows, name), name)
        for name in RowColumns._fields
        if name != "length"
    }
    return plan._replace(
        keys=placed(plan.keys, "keys", 2),
        values=placed(plan.values, "values", 2),
        rows=RowColumns(**columns, length=torch.tensor(length, device=device)),
    )
