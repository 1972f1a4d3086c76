"""Edits: rows that are put into a memory, or changed there, between two ticks.

Four cases, each a function:

* ``replace_all``: a prompt takes the place of everything, in one patch.
* ``edit``: a batch of actions changes a running memory, in one patch.
* ``append_in_chunks``: a text longer than one read, chunk by chunk, each read against those before
  it; taken back as a whole if anything interrupts it.
* ``restore``: saved rows go back into their slots.

All of them read first and then patch. They know rows, not text; they never write a tensor
themselves. What they are given has been checked (``actions.py``, ``saves.py``). Where rows stand
and go, the index tells (``row_index.py``): beside its reads, an edit costs the rows that it names,
not the capacity.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from brain.actions import Edit
from brain.diagnosis import not_finite_error
from brain.machine.signals import Uninterrupted
from brain.memory import EMPTY, Account, Memory
from brain.row_index import RowIndex
from compiled.choose import Eviction
from compiled.finite import not_finite
from compiled.graphs import Graphs, Uncaptured
from compiled.plan import Change, EditPlan, new_rows
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


def replace_all(memory: Memory, index: RowIndex, rows: Sequence[Row]) -> None:
    """Replaces everything that is remembered by a prompt, in one patch that is not captured.

    Args:
        memory: The memory.
        index: Its index.
        rows: At least one and at most ``chunk`` rows, at positions 0, 1, …
    """
    known = [FIRST, *[None] * (len(rows) - 1)]
    index.clear()
    draft = _draft(memory, index, memory.graphs.uncaptured, EMPTY, rows, known, None, [], Edit())
    held = torch.nonzero(memory.state.valid)[:, 0]
    plan = draft.plan._replace(cull=held[held >= len(rows)], only_appends=memory.account.count == 0)
    _commit(memory, index, draft._replace(plan=plan))


def edit(memory: Memory, index: RowIndex, edit: Edit) -> None:
    """Changes a running memory, in one patch; in several where a long text is appended. An append
    also commits the pending token, if there is one.

    Args:
        memory: The memory.
        index: Its index. Every tick has been waited for.
        edit: What is asked for.
    """
    index.update()
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
        append_in_chunks(memory, index, run, rows, edit, pending)
        return
    known = _known_arrivals(memory, index, rows, pending)
    _commit(memory, index, _draft(memory, index, run, account, rows, known, None, [], edit))


def append_in_chunks(
    memory: Memory,
    index: RowIndex,
    run: Graphs | Uncaptured,
    rows: Sequence[Row],
    edit: Edit,
    pending: Arrival | None,
) -> None:
    """Appends a text of any length, chunk by chunk; the edit comes with the last one.

    Args:
        memory: The memory.
        index: Its index, as of now.
        run: Its graphs, or ``uncaptured`` for a text that it begins with.
        rows: Any number of rows, sorted by position, after all that is remembered.
        edit: What else is asked for: nothing that removes a row.
        pending: How the pending token came, if its row is among them.
    """
    known = _known_arrivals(memory, index, rows, pending)
    undo = _forgetting(memory, index, rows)
    before, carry = memory.account, None
    for start in range(0, len(rows), memory.graphs.chunk):
        end = start + memory.graphs.chunk
        last, settled = end >= len(rows), memory.account
        try:
            draft = _draft(
                memory,
                index,
                run,
                memory.account,
                rows[start:end],
                known[start:end],
                carry,
                rows[end : end + 1],
                edit if last else Edit(),
            )
            carry = draft.carry
            _commit(memory, index, draft)
            del draft  # its keys and values: the next chunk is read without them
        except BaseException:
            done = last and memory.account is not settled  # interrupted after the last patch
            if memory.account is not before and not done:
                with Uninterrupted():
                    memory.graphs.begin_step()
                    memory.graphs.uncaptured.patch(undo)
                    memory.account = before
            raise


def _forgetting(memory: Memory, index: RowIndex, rows: Sequence[Row]) -> EditPlan:
    """The plan that takes rows back which are about to be appended, and what they echo."""
    held = _echoing(memory, index, rows[0].position)
    return memory.graphs.empty_edit()._replace(
        cull=memory.int64(index.lowest_free(len(rows))),
        changes={"novelty": Change(held, memory.state.novelty.index_select(0, held))},
    )


def restore(memory: Memory, rows: Mapping[str, Tensor], cursor: Cursor, high_water: int) -> None:
    """Puts saved rows back into their slots, and the cursor where it stood.

    Nothing is captured. Whatever interrupts it leaves an empty memory.

    Args:
        memory: The memory; what it holds is forgotten.
        rows: Keys, values and columns of n rows, and their ``slot`` [n] int64, ascending.
        cursor: The saved cursor.
        high_water: Over how many slots a read sums, and so how it rounds.
    """
    memory.forget_everything()
    account = Account(
        count=len(rows["slot"]),
        high_water=high_water,
        tick=int(cursor.tick),
        position=int(cursor.position[0]),
        uncommitted=bool(int(cursor.uncommitted)),
    )
    try:
        for start in range(0, account.count, memory.graphs.chunk):
            memory.graphs.uncaptured.patch(_saved(memory, rows, start))
        at = Cursor(*(tensor.to(memory.device) for tensor in cursor))
        with Uninterrupted():
            memory.graphs.uncaptured.patch(memory.graphs.empty_edit()._replace(cursor=at))
            memory.account = account
    except BaseException:
        memory.forget_everything()
        raise


def _saved(memory: Memory, rows: Mapping[str, Tensor], start: int) -> EditPlan:
    """The plan that puts a chunk of the saved rows, from ``start`` on, into their slots."""
    length = min(memory.graphs.chunk, len(rows["slot"]) - start)

    def some(name: str) -> Tensor:
        axis = 2 if name in ("keys", "values") else 0
        return rows[name].narrow(axis, start, length).to(memory.device)

    return memory.graphs.empty_edit()._replace(
        keys=some("keys"),
        values=some("values"),
        rows={name: some(name) for name in ROW_COLUMNS},
        slots=some("slot"),
        only_appends=True,
    )


# Reading, and planning what to write


class _Draft(NamedTuple):
    """A patch that is ready to be made. The index has it already, and holds for no account yet."""

    run: Graphs | Uncaptured  # who makes it
    plan: EditPlan
    account: Account  # after it
    carry: Carry | None = None  # what its last row carries over
    scored: ScoredPrefill | None = None  # held until the patch is done, as in the rehearsal


def _commit(memory: Memory, index: RowIndex, draft: _Draft) -> None:
    """The patch and the account of it: both or neither."""
    with Uninterrupted():
        draft.run.patch(draft.plan)
        memory.account = draft.account
        index.hold(draft.account)


def _known_arrivals(
    memory: Memory, index: RowIndex, rows: Sequence[Row], pending: Arrival | None
) -> list[Arrival | None]:
    """How each row comes, as far as the memory tells: None where the new row before it does."""
    known: list[Arrival | None] = []
    for number, row in enumerate(rows):
        previous = rows[number - 1] if number else None
        before = index.before(row.position)
        if row.position == memory.account.position and pending is not None:
            known.append(pending)
        elif before is not None and (previous is None or previous.position < before):
            known.append(_arrival_after(memory, index, before, row.token))
        else:
            known.append(None if number else FIRST)
    return known


def _arrival_after(memory: Memory, index: RowIndex, position: int, token: int) -> Arrival:
    """How a token comes behind the row that is remembered at a position: reads that row."""
    slot = index.slot_of(position)
    logits = memory.logits_after(int(memory.state.token_id[slot]), position)
    surprise = surprises(logits, memory.int64([token]))
    _require_finite(memory, surprise)
    nats = float(surprise[0])
    constants = memory.graphs.spec.eviction.novelty
    return Arrival(nats, running_novelty(float(memory.state.novelty[slot]), nats, constants))


def _require_finite(memory: Memory, *parts: Tensor) -> None:
    """Raises NotFinite, before anything is written, unless all of these numbers are finite; they
    are named by ``compiled.finite.PARTS``.
    """
    flag = int(not_finite(*parts))
    if flag:
        raise not_finite_error(flag, "reading what is to be remembered", memory.checkpoint)


def _draft(
    memory: Memory,
    index: RowIndex,
    run: Graphs | Uncaptured,
    account: Account,
    rows: Sequence[Row],
    known: Sequence[Arrival | None],
    carry: Carry | None,
    following: Sequence[Row],
    edit: Edit,
) -> _Draft:
    """Reads some rows and plans the one patch that adds them and makes the edit.

    Args:
        memory: The memory.
        index: Its index; afterwards it is that of the memory to be.
        run: How the work is called, if it has graphs of this width; otherwise it is not captured.
        account: What the rows are read against.
        rows: Rows to add, at most ``chunk``.
        known: How each comes; None where the row before it tells.
        carry: What the row before the first one carries over to it, if it was new.
        following: The row after the last one, or none.
        edit: What else is asked for.
    """
    graphs, count = memory.graphs, len(rows)
    named = max(len(edit.cull), len(edit.boost), len(edit.pin))
    needed = max(1, count, len(edit.erase) if rows else named)
    if not run.is_captured(needed):
        run = graphs.uncaptured
    width = run.edit_width(needed)
    scored, arrivals = None, []
    graphs.begin_step()
    if rows:
        padding = [0] * (width - count)
        targets = [row.token for row in (*rows[1:], *following)]
        scored = run.scored_prefill(
            memory.int64([*(row.token for row in rows), *padding]),
            memory.int64([*(row.position for row in rows), *padding]),
            memory.int64(count),
            memory.int64(targets + [0] * (width - len(targets))),
            high_water=account.high_water,
        )
        _require_finite(
            memory,
            scored.surprises[:count],
            scored.new_keys[:, :, :count],
            scored.new_values[:, :, :count],
        )
        novelty = graphs.spec.eviction.novelty
        for arrival, next_surprise in zip(known, scored.surprises.tolist(), strict=False):
            if arrival is None:
                assert carry is not None
                mean = running_novelty(carry.novelty, carry.next_surprise, novelty)
                arrival = Arrival(carry.next_surprise, mean)
            arrivals.append(arrival)
            carry = Carry(arrival.novelty, next_surprise)
    if run.is_captured(needed) and named <= width:
        plan = graphs.empty_edit(width, scored)  # after the read, which needs the most memory
    else:
        run, plan = graphs.uncaptured, graphs.empty_edit()
        if scored is not None:
            plan = plan._replace(
                keys=scored.new_keys[:, :, :count], values=scored.new_values[:, :, :count]
            )
    plan, after = _planned(memory, index, plan, account, rows, arrivals, edit)
    return _Draft(run, plan, after, carry, scored)


def _planned(
    memory: Memory,
    index: RowIndex,
    plan: EditPlan,
    account: Account,
    rows: Sequence[Row],
    arrivals: Sequence[Arrival],
    edit: Edit,
) -> tuple[EditPlan, Account]:
    """An empty plan, filled with new rows and the edit, and the account after it. Finds slots for
    the rows: the index becomes that of the memory to be.
    """
    eviction, newest = memory.graphs.spec.eviction, index.last()
    new = [newest is None or row.position > newest for row in rows]
    slots = {position: index.slot_of(position) for position in (*edit.boost, *edit.pin)}
    slots |= index.forget(edit.cull)
    changes = {"brightness": _boosted(memory, edit, slots), "pinned": _pinned(memory, edit, slots)}
    echoes, strength = _echoes(rows, arrivals, new, eviction)
    if any(new):
        at = rows[new.index(True)].position
        changes["novelty"] = _echoed(memory, index, at, strength, eviction)
    comes_later = rows and rows[-1].position > account.position
    if account.uncommitted and not (comes_later or edit.rewinds):
        cursor, position, uncommitted = plan.cursor, account.position, True
    else:
        cursor, position = _cursor_after(memory, index, account, rows, arrivals)
        uncommitted = False
    index.pin(edit.pin)
    filled = index.put([row.position for row in rows])
    reused = set(filled)
    gone = [position for position in edit.cull if slots[position] not in reused]
    erase = [slots[position] for position in gone if position in edit.erase]
    cull = [slots[position] for position in gone if position not in edit.erase]
    for name, change in changes.items():
        room = plan.changes.get(name, Change(change.slots[:0], change.values[:0]))
        if len(change.slots):
            plan.changes[name] = Change(*map(_filled_up, change, room))
    plan = plan._replace(
        rows=_columns(rows, arrivals, echoes, plan.keys.shape[2], account.tick, memory, eviction),
        slots=_filled_up(memory.int64(filled), plan.slots),
        cull=_filled_up(memory.int64(cull), plan.cull),
        erase=_filled_up(memory.int64(erase), plan.erase),
        cursor=cursor,
        only_appends=not (plan.padded or edit.cull),
    )
    count = account.count - len(edit.cull) + len(rows)
    return plan, account.after_edit(count, position, uncommitted=uncommitted)


def _filled_up(some: Tensor, empty: Tensor) -> Tensor:
    """A list that is at least as long as an empty one, whose padding follows."""
    rest = empty[len(some) :]
    return torch.cat([some, rest]) if len(rest) else some


def _cursor_after(
    memory: Memory,
    index: RowIndex,
    account: Account,
    rows: Sequence[Row],
    arrivals: Sequence[Arrival],
) -> tuple[Cursor, int]:
    """A cursor at the newest row there will be, to be read again, and its position. The index has
    no row any more that is to be forgotten, and none yet of the new ones.
    """
    kept = index.last()
    if rows and (kept is None or rows[-1].position > kept):
        row, arrival = rows[-1], arrivals[-1]
    elif kept is not None:
        state, slot = memory.state, index.slot_of(kept)
        row = Row(int(state.token_id[slot]), kept, int(state.source[slot]))
        arrival = Arrival(float(state.surprise[slot]), float(state.novelty[slot]))
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


def _boosted(memory: Memory, edit: Edit, slots: Mapping[int, int]) -> Change:
    """Brightness of the rows that are boosted."""
    at = memory.int64([slots[position] for position in edit.boost])
    most = memory.graphs.spec.eviction.brightness.maximum
    held = memory.state.brightness.index_select(0, at).tolist()
    boosted = [
        min(max(brightness + amount, 0.0), most)
        for brightness, amount in zip(held, edit.boost.values(), strict=True)
    ]
    return Change(at, torch.tensor(boosted, dtype=torch.float32, device=memory.device))


def _pinned(memory: Memory, edit: Edit, slots: Mapping[int, int]) -> Change:
    """Which of the rows that are pinned or released are pinned now."""
    at = memory.int64([slots[position] for position in edit.pin])
    pinned = list(edit.pin.values())
    return Change(at, torch.tensor(pinned, dtype=torch.bool, device=memory.device))


def _echoing(memory: Memory, index: RowIndex, at: int) -> Tensor:
    """Slots of the rows before a position that an echo from there reaches: [M] int64."""
    reach = memory.graphs.spec.eviction.novelty.reach
    return torch.from_numpy(index.slots_since(at - reach)).to(memory.device)


def _echoed(
    memory: Memory, index: RowIndex, at: int, strength: float, eviction: Eviction
) -> Change:
    """Novelty of the rows before a position, with the echo of what is new from there on."""
    slots = _echoing(memory, index, at)
    columns = ("position", "novelty", "valid")
    some = {name: getattr(memory.state, name).index_select(0, slots) for name in columns}
    novelty = echo(
        memory.state._replace(**some), memory.int64(at), memory.float32(strength), eviction.novelty
    )
    return Change(slots, novelty)
