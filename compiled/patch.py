"""The patch: step 0/4, the only code of this package that writes tensors in place, beside its twins
for the plan of a tick, in ``tick_cpu.cpp`` and in ``carry_out`` of ``tick_kernels.py``.

    patch(state, cursor, plan) → None
    rebase(kinds, state, cursor, inverse_frequencies, wanted) → None

The patch culls, erases, appends and replaces. Keys, values and mirror columns of a slot are written
by the same graph. Culling clears ``valid``, O(1) per row; appending takes the lowest free slots and
moves O(rows written) bytes. Nothing here is proportional to the size of the cache. The plan of a
tick changes columns of all rows, so its patch scans and writes single mirror columns; that of an
edit names slots, and its patch touches no others.

The plan is fixed in shape and validated before the graph runs. Then all of it happens or nothing:

* First everything that allocates, and so can fail, is computed: a list of writes, each a finished
  tensor and where it goes, and copies of the few bytes that they overwrite. Whatever goes wrong
  here has changed nothing.
* Then the tensors are copied into place, ``valid`` last. That allocates nothing and asks nothing.
  Should anything be raised in the midst of it all the same, what was there is put back first.

Keys and values of slots that held no row are not put back: nothing reads them. (A long text goes
straight into such slots; a second copy of it is never kept.)

A captured patch is one call, in which nothing is raised, and so is that of a tick in
``tick_cpu.cpp``, and the one kernel that writes in ``tick_kernels.py``: it can fail before it, or
its caller after it. Only a signal could come between two of a graph's kernels, or between the patch
and its caller's account of it: ``brain/machine/signals.py`` holds signals off.

Re-basing renumbers positions densely in text order and turns every key by the difference. It does
touch the whole cache, so it runs only when the positions would leave the range that the model was
trained on: once in thousands of ticks. Taking it back would need a second cache. So it goes
forward: the room it needs is taken before it writes, any of its steps may be done twice, and should
one be interrupted, it and the rest are done before that is passed on.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from compiled.plan import EditPlan, Plan
from compiled.rope import rotate_rows, rotation
from compiled.state import COLUMNS, ROW_COLUMNS, Cursor, State, lowest_free_slots


def make_empty(state: State, cursor: Cursor, plan: Plan) -> None:
    """Makes a tick's plan change nothing, in its own tensors: to rehearse a patch with.

    A CUDA graph remembers which of its inputs are another graph's memory and copies all others to
    where it wants them, so a rehearsal must give it the very tensors that a tick will.
    """
    for asked in (plan.length, plan.cull):
        asked.zero_()
    for name, updated in plan.updates.items():
        updated.copy_(getattr(state, name))
    for following, held in zip(plan.cursor, cursor, strict=True):
        following.copy_(held)


class _Write(NamedTuple):
    """One write, ready to be made: the whole of a tensor, or some slots of it."""

    held: Tensor  # of the state or the cursor
    new: Tensor
    slots: Tensor | None = None  # [W] int64; None: the whole
    old: Tensor | None = None  # what the slots hold; None: it need not be put back


def _row_axis(tensor: Tensor) -> int:
    return 2 if tensor.dim() == 4 else 0  # keys and values, or a column


def _over_rows(flags: Tensor, rows: Tensor) -> Tensor:
    """One flag for each row [W], in a shape that broadcasts against the rows."""
    return flags[:, None] if rows.dim() == 4 else flags


def _tick_writes(state: State, cursor: Cursor, plan: Plan) -> list[_Write]:
    """Cull, update columns, append to the lowest free slots, move the cursor; ``valid`` last."""
    plan = _unless(plan.not_finite != 0, state, cursor, plan)
    width = plan.keys.shape[2]
    valid = state.valid & ~plan.cull
    slots = lowest_free_slots(valid, width)  # [W]
    live = torch.arange(width, device=slots.device) < plan.length  # [W]

    def rows(held: Tensor, new: Tensor) -> _Write:
        """A padding row puts back what its slot holds."""
        old = held.index_select(_row_axis(held), slots)
        return _Write(held, torch.where(_over_rows(live, new), new, old), slots, old)

    def column(held: Tensor, updated: Tensor, new: Tensor) -> _Write:
        """A column that changes for the rows that are already there, too."""
        new = torch.where(live, new, updated.index_select(0, slots))
        return _Write(held, updated.index_copy(0, slots, new))

    writes = [rows(state.keys, plan.keys), rows(state.values, plan.values)]
    for name in ROW_COLUMNS:
        held, new = getattr(state, name), plan.rows[name]
        updated = plan.updates.get(name)
        writes.append(rows(held, new) if updated is None else column(held, updated, new))
    writes += [_Write(held, following) for held, following in zip(cursor, plan.cursor, strict=True)]
    return [*writes, column(state.valid, valid, torch.ones_like(slots, dtype=torch.bool))]


class _Slots(NamedTuple):
    """Slots to write. In place of padding stands the first of them that is none, with what goes
    there; where there is none, slot 0 with what it holds.
    """

    slots: Tensor  # [N] int64
    source: Tensor | None = None  # [N] int64: which entry's content goes there; None: its own
    wanted: Tensor | None = None  # [] bool: whether there is any

    @staticmethod
    def of(slots: Tensor, *, padded: bool) -> "_Slots":
        if not padded or slots.shape[0] == 0:
            return _Slots(slots)
        live = slots >= 0
        entries = torch.arange(slots.shape[0], device=slots.device)
        source = torch.where(live, entries, live.to(torch.int64).argmax())
        return _Slots(slots.index_select(0, source).clamp(min=0), source, live.any())

    def write(self, held: Tensor, new: Tensor) -> _Write:
        axis = _row_axis(held)
        old = held.index_select(axis, self.slots)
        if self.source is not None and self.wanted is not None:
            new = torch.where(self.wanted, new.index_select(axis, self.source), old)
        return _Write(held, new, self.slots, old)


def _joined(*parts: Tensor, axis: int = 0) -> Tensor:
    """The parts behind each other; one alone is not copied."""
    some = [part for part in parts if part.shape[axis]] or [parts[0]]
    return some[0] if len(some) == 1 else torch.cat(some, axis)


def _edit_writes(state: State, cursor: Cursor, plan: EditPlan) -> list[_Write]:
    """New rows, erased ones and changed columns, the cursor; ``valid`` last. One write for every
    tensor, so that none undoes another.
    """
    rows = _Slots.of(_joined(plan.slots, plan.erase), padded=plan.padded)
    writes = []
    for held, new in ((state.keys, plan.keys), (state.values, plan.values)):
        if plan.only_appends:  # what free slots hold need not be put back
            writes.append(_Write(held, new, plan.slots))
        elif rows.slots.shape[0]:
            shape = (*new.shape[:2], plan.erase.shape[0], new.shape[3])
            writes.append(rows.write(held, _joined(new, new.new_zeros(shape), axis=2)))
    for name in ROW_COLUMNS:
        held, at = getattr(state, name), rows
        blank = torch.full_like(plan.erase, COLUMNS[name].empty, dtype=held.dtype)
        content = [plan.rows[name], blank]
        if name in plan.changes:
            change = plan.changes[name]
            content.append(change.values)
            joined = _joined(plan.slots, plan.erase, change.slots)
            at = _Slots.of(joined, padded=plan.padded)
        if at.slots.shape[0]:
            writes.append(at.write(held, _joined(*content)))
    writes += [_Write(held, following) for held, following in zip(cursor, plan.cursor, strict=True)]
    changed = _Slots.of(_joined(plan.slots, plan.cull, plan.erase), padded=plan.padded)
    gone = torch.zeros_like(_joined(plan.cull, plan.erase), dtype=torch.bool)
    there = _joined(torch.ones_like(plan.slots, dtype=torch.bool), gone)
    return [*writes, changed.write(state.valid, there)]


def _unless(void: Tensor, state: State, cursor: Cursor, plan: Plan) -> Plan:
    """The plan, or where ``void`` [] bool is true one that changes nothing."""
    return plan._replace(
        length=plan.length.masked_fill(void, 0),
        cull=plan.cull & ~void,
        updates={
            name: torch.where(void, getattr(state, name), updated)
            for name, updated in plan.updates.items()
        },
        cursor=Cursor(*map(partial(torch.where, void), cursor, plan.cursor)),  # type: ignore[arg-type]
    )


def _put(held: Tensor, slots: Tensor | None, content: Tensor) -> None:
    """Copies a finished tensor into place. Allocates nothing."""
    if slots is None:
        held.copy_(content)
    else:
        held.index_copy_(_row_axis(held), slots, content)


def patch(state: State, cursor: Cursor, plan: Plan | EditPlan) -> None:
    """Applies a plan in place, wholly or, where anything is raised, not at all.

    Args:
        state: The memory.
        cursor: Its cursor.
        plan: What to change; it is only read. Nothing, if its ``not_finite`` says so.
    """
    if isinstance(plan, Plan):
        writes = _tick_writes(state, cursor, plan)
    else:
        writes = _edit_writes(state, cursor, plan)
    if torch.compiler.is_compiling():
        # The compiler writes in place only what is read nowhere after that.
        for write in writes:
            _put(write.held, write.slots, write.new)
        return
    before = [write.held.clone() if write.slots is None else write.old for write in writes]
    try:
        for write in writes:
            _put(write.held, write.slots, write.new)
    except BaseException:
        for write, old in zip(writes, before, strict=True):
            if old is not None:
                _put(write.held, write.slots, old)
        raise


def dense_positions(valid: Tensor, position: Tensor) -> Tensor:
    """Each valid row's place in text order, from 0; a row that is not valid keeps its position.

    ``valid`` [capacity] bool, ``position`` [capacity] int64 → [capacity] int64.
    """
    last = torch.iinfo(torch.int64).max
    order = torch.argsort(torch.where(valid, position, last))
    place = torch.arange(valid.shape[0], device=valid.device)
    return torch.where(valid, torch.empty_like(place).scatter(0, order, place), position)


def rebase(
    kinds: Sequence[int],
    state: State,
    cursor: Cursor,
    inverse_frequencies: Tensor,
    wanted: Tensor,
) -> None:
    """Renumbers all rows densely, in place; does nothing where ``wanted`` [] bool is false.

    Every key is turned once, by the whole difference, in float32 from float64 angles: one rounding
    to the cache's dtype, where turning step by step would round a thousand times. The cursor comes
    to stand on the newest row, or behind it if its token has no row yet.

    Args:
        kinds: Of each layer, which of the frequencies turn its keys.
        state: The memory.
        cursor: Its cursor.
        inverse_frequencies: [kinds, head_dim / 2] float64, radians per position.
        wanted: [] bool.
    """
    moving = state.valid & wanted  # [capacity]
    dense = torch.where(moving, dense_positions(state.valid, state.position), state.position)
    cos, sin = rotation(dense - state.position, inverse_frequencies)  # [kinds, capacity, …]
    behind = state.valid.sum() - 1 + cursor.uncommitted
    at = torch.where(wanted, behind, cursor.position)
    layers = list(state.keys)  # [kv_heads, capacity, head_dim] each, views: never a second cache
    if torch.compiler.is_compiling():
        for keys, kind in zip(layers, kinds, strict=True):
            turned = rotate_rows(keys, cos[kind], sin[kind])
            keys.copy_(torch.where(moving[:, None], turned, keys))
        state.position.copy_(dense)
        cursor.position.copy_(at)
        return
    room = _room_to_turn(layers[0])
    steps: list[Callable[[], object]] = []
    for keys, kind in zip(layers, kinds, strict=True):
        steps.append(partial(_turn, keys, cos[kind], sin[kind], moving, room))
        steps.append(partial(keys.copy_, room.turned))
    steps += [partial(state.position.copy_, dense), partial(cursor.position.copy_, at)]
    _to_the_end(steps)


class _Room(NamedTuple):
    """What turning one layer's keys takes, in float32."""

    plain: Tensor  # [kv_heads, capacity, head_dim]
    turned: Tensor  # [kv_heads, capacity, head_dim]
    product: Tensor  # [kv_heads, capacity, head_dim / 2]


def _room_to_turn(keys: Tensor) -> _Room:
    plain = torch.empty_like(keys, dtype=torch.float32, memory_format=torch.contiguous_format)
    return _Room(plain, torch.empty_like(plain), torch.empty_like(plain.chunk(2, dim=-1)[0]))


def _turn(keys: Tensor, cos: Tensor, sin: Tensor, moving: Tensor, room: _Room) -> None:
    """``rotate_rows`` of the rows that move, without allocating. Changes the room alone."""
    room.plain.copy_(keys)
    first, second = room.plain.chunk(2, dim=-1)
    turned_first, turned_second = room.turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first)
    turned_first.sub_(torch.mul(second, sin, out=room.product))
    torch.mul(second, cos, out=turned_second)
    turned_second.add_(torch.mul(first, sin, out=room.product))
    torch.where(moving[:, None], room.turned, room.plain, out=room.turned)


def _to_the_end(steps: list[Callable[[], object]]) -> None:
    """Takes every step. One that is interrupted is taken again, and whatever interrupted it is
    raised after the last; a second interruption is not forgiven.
    """
    done, interruption = 0, None
    while done < len(steps):
        try:
            steps[done]()
            done += 1
        except BaseException as raised:
            if interruption is not None:
                raise
            interruption = raised
    if interruption is not None:
        raise interruption
