"""Edits: rows that are put into a memory, or changed there, between two ticks.

Four cases, each a function:

* ``replace_all``: a prompt takes the place of everything, in one patch.
* ``edit``: a batch of actions changes a running memory, in one patch.
* ``append_in_chunks``: a text longer than one read, chunk by chunk, each read against those before
  it; taken back as a whole if anything interrupts it.
* ``restore``: saved rows go back into their slots.

All of them read first and then patch. They know rows, not text; they never write a tensor
themselves. What they are given has been checked (``actions.py``, ``saves.py``).
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from brain.actions import Edit
from brain.diagnosis import not_finite_error
from brain.machine.signals import Uninterrupted
from brain.memory import EMPTY, Account, Memory
from brain.mirror import Mirror
from compiled.choose import Eviction
from compiled.finite import not_finite
from compiled.graphs import Graphs, Uncaptured
from compiled.plan import Plan, new_rows
from compiled.read import ScoredPrefill
from compiled.sample import surprises
from compiled.score import echo, running_novelty, seed_brightness
from compiled.state import NOWHERE, ROW_COLUMNS, Cursor


@dataclass(frozen=True)
class Row:
    """A token to be remembered: its id, where it stands in the text, and who put it there."""

    token: int
    position: int
    source: int


class Arrival(NamedTuple):
    """What a token's row gets from the tokens before it, in nats."""

    surprise: float  # its own, after them
    novelty: float  # running mean of surprise up to it


FIRST = Arrival(0.0, 0.0)
"""Of a token that nothing came before."""


class Carry(NamedTuple):
    """What a new row carries over to the row after it, in nats."""

    novelty: float
    next_surprise: float


def replace_all(memory: Memory, rows: Sequence[Row], nothing: Mirror) -> None:
    """Replaces everything that is remembered by a prompt, in one patch that is not captured.

    Args:
        memory: The memory.
        rows: At least one and at most ``chunk`` rows, at positions 0, 1, …
        nothing: An empty mirror: no old row is seen by a new one.
    """
    known = [FIRST, *[None] * (len(rows) - 1)]
    uncaptured = memory.graphs.uncaptured
    draft = _draft(memory, uncaptured, EMPTY, rows, known, None, [], Edit(), nothing)
    plan = draft.plan._replace(cull=memory.state.valid.logical_or(memory.state.valid))
    plan = _trimmed(plan, len(rows), culls=memory.account.count > 0, erases=False)
    _commit(memory, draft._replace(plan=plan))


def edit(memory: Memory, edit: Edit, mirror: Mirror) -> None:
    """Changes a running memory, in one patch; in several where a long text is appended. An append
    also commits the pending token, if there is one.

    Args:
        memory: The memory.
        edit: What is asked for.
        mirror: What is remembered.
    """
    account, cursor, run = memory.account, memory.cursor, memory.graphs
    rows = [Row(*row) for row in edit.replacing]
    pending: Arrival | None = None
    if edit.appending:
        rows += [
            Row(token, account.position + 1 + offset, source)
            for offset, (token, source) in enumerate(edit.appending)
        ]
        if account.uncommitted:
            rows.append(Row(int(cursor.token[0]), account.position, int(cursor.source[0])))
            pending = Arrival(float(cursor.surprise[0]), float(cursor.novelty[0]))
    rows.sort(key=lambda row: row.position)
    if len(rows) > run.chunk:
        append_in_chunks(memory, run, rows, edit, mirror, pending)
        return
    known = _known_arrivals(memory, rows, mirror, pending)
    _commit(memory, _draft(memory, run, account, rows, known, None, [], edit, mirror))


def append_in_chunks(
    memory: Memory,
    run: Graphs | Uncaptured,
    rows: Sequence[Row],
    edit: Edit,
    mirror: Mirror,
    pending: Arrival | None,
) -> None:
    """Appends a text of any length, chunk by chunk; the edit comes with the last one.

    Args:
        memory: The memory.
        run: Its graphs, or ``uncaptured`` for a text that it begins with.
        rows: Any number of rows, sorted by position, after all that is remembered.
        edit: What else is asked for: nothing that removes a row.
        mirror: What is remembered before it.
        pending: How the pending token came, if its row is among them.
    """
    known = _known_arrivals(memory, rows, mirror, pending)
    undo = memory.graphs.empty_edit(run.edit_width(1))._replace(
        cull=memory.state.valid.logical_not()  # of what is there then: all that is new
    )
    before, carry = memory.account, None
    for start in range(0, len(rows), memory.graphs.chunk):
        end = start + memory.graphs.chunk
        last, settled = end >= len(rows), memory.account
        try:
            draft = _draft(
                memory,
                run,
                memory.account,
                rows[start:end],
                known[start:end],
                carry,
                rows[end : end + 1],
                edit if last else Edit(),
                mirror,
            )
            carry = draft.carry
            _commit(memory, draft)
            del draft  # its keys and values: the next chunk is read without them
        except BaseException:
            done = last and memory.account is not settled  # interrupted after the last patch
            if memory.account is not before and not done:
                with Uninterrupted():
                    memory.graphs.begin_step()
                    run.patch(undo)
                    memory.account = before
            raise


def restore(memory: Memory, rows: Mapping[str, Tensor], cursor: Cursor, high_water: int) -> None:
    """Puts saved rows back into their slots, and the cursor where it stood.

    The one patch knows only "the lowest free slot", so the holes between the rows are filled first
    and forgotten again. Nothing is captured. Whatever interrupts it leaves an empty memory.

    Args:
        memory: The memory; what it holds is forgotten.
        rows: Keys, values and columns of n rows, and their ``slot`` [n] int64, ascending.
        cursor: The saved cursor.
        high_water: Over how many slots a read sums, and so how it rounds.
    """
    memory.forget_everything()
    try:
        _restore(memory, rows, cursor, high_water)
    except BaseException:
        memory.forget_everything()
        raise


def _restore(memory: Memory, rows: Mapping[str, Tensor], cursor: Cursor, high_water: int) -> None:
    graphs, slot = memory.graphs, rows["slot"]
    size = int(slot[-1]) + 1 if len(slot) else 0
    for start in range(0, size, graphs.chunk):
        length = min(graphs.chunk, size - start)
        plan = _saved(graphs.empty_edit(length), rows, slot, start, length, memory)
        plan = _trimmed(plan, length, culls=False, erases=False)
        account = memory.account.after_edit(start + length, NOWHERE, uncommitted=False)
        _commit(memory, _Draft(graphs.uncaptured, plan, account))
    holes = torch.zeros(memory.state.capacity, dtype=torch.bool)
    holes[:size] = True
    holes[slot] = False
    cursor = Cursor(*(tensor.to(memory.device) for tensor in cursor))
    plan = graphs.empty_edit(1)._replace(cull=holes.to(memory.device), cursor=cursor)
    account = Account(
        count=len(slot),
        high_water=high_water,
        tick=int(cursor.tick),
        position=int(cursor.position[0]),
        uncommitted=bool(int(cursor.uncommitted)),
    )
    _commit(memory, _Draft(graphs.uncaptured, plan, account))


def _saved(
    plan: Plan,
    rows: Mapping[str, Tensor],
    slot: Tensor,
    start: int,
    length: int,
    memory: Memory,
) -> Plan:
    """The plan, writing slots ``start`` to ``start + length - 1``: the saved rows of those that
    have one, at their places, and zeros in the holes between them.
    """
    first, last = torch.searchsorted(slot, torch.tensor([start, start + length])).tolist()
    place = (slot[first:last] - start).to(memory.device)  # [rows in this range]

    def placed(empty: Tensor, name: str, axis: int = 0) -> Tensor:
        saved = rows[name].narrow(axis, first, last - first).to(memory.device)
        return empty.index_copy(axis, place, saved)

    return plan._replace(
        keys=placed(plan.keys, "keys", 2),
        values=placed(plan.values, "values", 2),
        rows={name: placed(plan.rows[name], name) for name in ROW_COLUMNS},
        length=memory.int64(length),
    )


# Reading, and planning what to write


class _Draft(NamedTuple):
    """A patch that is ready to be made."""

    run: Graphs | Uncaptured  # who makes it
    plan: Plan
    account: Account  # after it
    carry: Carry | None = None  # what its last row carries over
    scored: ScoredPrefill | None = None  # held until the patch is done, as in the rehearsal


def _commit(memory: Memory, draft: _Draft) -> None:
    """The patch and the account of it: both or neither."""
    with Uninterrupted():
        draft.run.patch(draft.plan)
        memory.account = draft.account


def _known_arrivals(
    memory: Memory, rows: Sequence[Row], mirror: Mirror, pending: Arrival | None
) -> list[Arrival | None]:
    """How each row comes, as far as the memory tells: None where the new row before it does."""
    known: list[Arrival | None] = []
    for index, row in enumerate(rows):
        previous = rows[index - 1] if index else None
        before = bisect.bisect_left(mirror.position, row.position) - 1
        if row.position == memory.account.position and pending is not None:
            known.append(pending)
        elif before >= 0 and (previous is None or previous.position < mirror.position[before]):
            known.append(_arrival_after(memory, mirror, before, row.token))
        else:
            known.append(None if index else FIRST)
    return known


def _arrival_after(memory: Memory, mirror: Mirror, index: int, token: int) -> Arrival:
    """How a token comes behind the remembered row at an index of the mirror: reads that row."""
    logits = memory.logits_after(int(mirror.token_id[index]), int(mirror.position[index]))
    surprise = surprises(logits, memory.int64([token]))
    _require_finite(memory, surprise)
    nats = float(surprise[0])
    constants = memory.graphs.spec.eviction.novelty
    return Arrival(nats, running_novelty(float(mirror.novelty[index]), nats, constants))


def _require_finite(memory: Memory, *parts: Tensor) -> None:
    """Raises NotFinite, before anything is written, unless all of these numbers are finite; they
    are named by ``compiled.finite.PARTS``.
    """
    flag = int(not_finite(*parts))
    if flag:
        raise not_finite_error(flag, "reading what is to be remembered", memory.checkpoint)


def _draft(
    memory: Memory,
    run: Graphs | Uncaptured,
    account: Account,
    rows: Sequence[Row],
    known: Sequence[Arrival | None],
    carry: Carry | None,
    following: Sequence[Row],
    edit: Edit,
    mirror: Mirror,
) -> _Draft:
    """Reads some rows and plans the one patch that adds them and makes the edit.

    Args:
        memory: The memory.
        run: How the work is called, if it has graphs of this width; otherwise it is not captured.
        account: What the rows are read against.
        rows: Rows to add, at most ``chunk``.
        known: How each comes; None where the row before it tells.
        carry: What the row before the first one carries over to it, if it was new.
        following: The row after the last one, or none.
        edit: What else is asked for.
        mirror: What is remembered, but for new rows of the same text.
    """
    graphs, eviction = memory.graphs, memory.graphs.spec.eviction
    needed = max(1, len(rows), len(edit.erase))
    captured = run.is_captured(needed)
    if not captured:
        run = graphs.uncaptured
    width = run.edit_width(needed)
    scored, arrivals = None, []
    graphs.begin_step()
    if rows:
        padding = [0] * (width - len(rows))
        targets = [row.token for row in (*rows[1:], *following)]
        scored = run.scored_prefill(
            memory.int64([*(row.token for row in rows), *padding]),
            memory.int64([*(row.position for row in rows), *padding]),
            memory.int64(len(rows)),
            memory.int64(targets + [0] * (width - len(targets))),
            high_water=account.high_water,
        )
        count = len(rows)
        _require_finite(
            memory,
            scored.surprises[:count],
            scored.new_keys[:, :, :count],
            scored.new_values[:, :, :count],
        )
        for arrival, next_surprise in zip(known, scored.surprises.tolist(), strict=False):
            if arrival is None:
                assert carry is not None
                mean = running_novelty(carry.novelty, carry.next_surprise, eviction.novelty)
                arrival = Arrival(carry.next_surprise, mean)
            arrivals.append(arrival)
            carry = Carry(arrival.novelty, next_surprise)
    plan = graphs.empty_edit(width, scored)  # after the read, which needs the most memory

    if account.uncommitted and not (rows and rows[-1].position > account.position):
        cursor, position, uncommitted = plan.cursor, account.position, True
    else:
        cursor, position = _cursor_after(memory, account, rows, arrivals, edit, mirror)
        uncommitted = False
    newest = int(mirror.position[-1]) if len(mirror) else NOWHERE
    new = [row.position > newest for row in rows]
    echoes, strength = _echoes(rows, arrivals, new, eviction)
    plan = plan._replace(
        rows=_columns(rows, arrivals, echoes, width, account.tick, memory, eviction),
        length=memory.int64(len(rows)),
        cursor=cursor,
    )
    if any(new):
        at = memory.int64(rows[new.index(True)].position)
        novelty = echo(memory.state, at, memory.float32(strength), eviction.novelty)
        plan = plan._replace(updates=plan.updates | {"novelty": novelty})
    plan = _with_edit(plan, memory, edit, mirror)
    if not captured:
        plan = _trimmed(plan, len(rows), culls=bool(edit.cull), erases=bool(edit.erase))
    count = account.count - len(edit.cull) + len(rows)
    after = account.after_edit(count, position, uncommitted=uncommitted)
    return _Draft(run, plan, after, carry, scored)


def _trimmed(plan: Plan, length: int, *, culls: bool, erases: bool) -> Plan:
    """The plan without what it does not need: a patch that is not captured may have any shape."""
    padded = length < plan.keys.shape[2]
    return plan._replace(
        erase=plan.erase if erases else None,
        padded=padded,
        only_appends=not (padded or culls or erases),
    )


def _cursor_after(
    memory: Memory,
    account: Account,
    rows: Sequence[Row],
    arrivals: Sequence[Arrival],
    edit: Edit,
    mirror: Mirror,
) -> tuple[Cursor, int]:
    """A cursor at the newest row there will be, to be read again, and its position."""
    kept = [index for index, p in enumerate(mirror.position.tolist()) if p not in edit.cull]
    if rows and (not kept or rows[-1].position > mirror.position[kept[-1]]):
        row, arrival = rows[-1], arrivals[-1]
    elif kept:
        newest = {name: column[kept[-1]].item() for name, column in mirror.columns.items()}
        row = Row(newest["token_id"], newest["position"], newest["source"])
        arrival = Arrival(newest["surprise"], newest["novelty"])
    else:
        row, arrival = Row(0, NOWHERE, 0), FIRST
    cursor = Cursor(
        token=memory.int64([row.token]),
        position=memory.int64([row.position]),
        surprise=torch.tensor([arrival.surprise], dtype=torch.float32, device=memory.device),
        novelty=torch.tensor([arrival.novelty], dtype=torch.float32, device=memory.device),
        source=torch.tensor([row.source], dtype=torch.uint8, device=memory.device),
        uncommitted=memory.int64(0),
        tick=memory.int64(account.tick),
    )
    return cursor, row.position


def _echoes(
    rows: Sequence[Row], arrivals: Sequence[Arrival], new: Sequence[bool], eviction: Eviction
) -> tuple[list[float], float]:
    """What ``score.echo`` would add up one by one, in nats: for each of these rows, the echo of
    those after it; and of them all, one step before the first ``new`` row (rather than one in an
    old place).
    """
    decay, share = eviction.novelty.decay, eviction.novelty.own_share
    echoes = [0.0] * len(rows)
    after, at = 0.0, 0  # echo at position ``at`` of everything new from there on
    for index in reversed(range(len(rows))):
        if not new[index]:
            continue
        if after:
            echoes[index] = after * decay ** (at - rows[index].position)
        after = echoes[index] + share * arrivals[index].surprise
        at = rows[index].position
    return echoes, after


def _columns(
    rows: Sequence[Row],
    arrivals: Sequence[Arrival],
    echoes: Sequence[float],
    width: int,
    born: int,
    memory: Memory,
    eviction: Eviction,
) -> dict[str, Tensor]:
    """Mirror columns of rows about to be appended, padded to ``width``."""
    padding = [0] * (width - len(rows))

    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor([*values, *padding], dtype=dtype, device=memory.device)

    source = column((row.source for row in rows), torch.uint8)
    ticks = torch.full((width,), born, dtype=torch.int64, device=memory.device)
    pairs = zip(arrivals, echoes, strict=True)
    return new_rows(
        width,
        memory.device,
        token_id=column((row.token for row in rows), torch.int64),
        position=column((row.position for row in rows), torch.int64),
        brightness=seed_brightness(source, eviction.brightness),
        surprise=column((arrival.surprise for arrival in arrivals), torch.float32),
        novelty=column((arrival.novelty + echo for arrival, echo in pairs), torch.float32),
        source=source,
        born=ticks,
        lit=ticks.add(0),
    )


def _with_edit(plan: Plan, memory: Memory, edit: Edit, mirror: Mirror) -> Plan:
    """The plan, doing everything the edit asks for as well."""
    state, device = memory.state, memory.device

    def slots(positions: Iterable[int]) -> list[int]:
        return [int(mirror.slot[mirror.index_of(position)]) for position in positions]

    if edit.cull:
        cull = torch.zeros(state.capacity, dtype=torch.bool)
        cull[slots(edit.cull)] = True
        plan = plan._replace(cull=cull.to(device))
    updates = dict(plan.updates)
    if edit.boost:
        most = memory.graphs.spec.eviction.brightness.maximum
        brightness: Tensor = state.brightness.to("cpu", copy=True)
        for slot, amount in zip(slots(edit.boost), edit.boost.values(), strict=True):
            boosted = float(brightness[slot]) + amount
            brightness[slot] = min(max(boosted, 0.0), most)
        updates["brightness"] = brightness.to(device)
    if edit.pin:
        pinned = state.pinned.to("cpu", copy=True)
        for slot, pin in zip(slots(edit.pin), edit.pin.values(), strict=True):
            pinned[slot] = pin
        updates["pinned"] = pinned.to(device)
    if edit.erase:
        erase = torch.full((plan.keys.shape[2],), NOWHERE, dtype=torch.int64)
        erase[: len(edit.erase)] = torch.tensor(slots(edit.erase), dtype=torch.int64)
        plan = plan._replace(erase=erase.to(device))
    return plan._replace(updates=updates)
