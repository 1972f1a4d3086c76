"""The patch against a model of plain Python: what it writes, and every byte that it does not."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from captured_graphs import Watched
from compiled.patch import make_empty, patch
from compiled.plan import EDITED_COLUMNS, EditPlan, Plan
from compiled.state import (
    NOWHERE,
    ROW_COLUMNS,
    Cursor,
    State,
    addresses,
    lowest_free_slots,
)
from toys import (
    UPDATED_BY_TICKS,
    digest,
    raw_bytes,
    toy_config,
    toy_cursor,
    toy_edit,
    toy_plan,
    toy_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 9
SLOT = st.integers(0, CAPACITY - 1)
COLUMNS = ROW_COLUMNS


def copied(state: State) -> dict[str, npt.NDArray[Any]]:
    """Every tensor as an array of bytes, the capacity axis first: [capacity, bytes of a slot]."""
    arrays = {}
    for name, tensor in state._asdict().items():
        rows = tensor.movedim(2, 0) if tensor.dim() == 4 else tensor
        rows = rows.contiguous().view(state.capacity, -1)
        arrays[name] = np.frombuffer(raw_bytes(rows), np.uint8).reshape(state.capacity, -1).copy()
    return arrays


def row_bytes(plan: Plan | EditPlan, name: str, row: int) -> npt.NDArray[np.uint8]:
    """What row ``row`` of the plan should leave in its slot."""
    if name == "valid":
        return np.array([1], np.uint8)
    tensor = getattr(plan, name)[:, :, row] if name in ("keys", "values") else plan.rows[name][row]
    return np.frombuffer(raw_bytes(tensor), np.uint8)


class PatchMachine(RuleBasedStateMachine):
    """Any plans whatever, one after another. The model is a list of bytes for every slot."""

    def __init__(self) -> None:
        super().__init__()
        self.state = toy_state(toy_config(layers=1), CAPACITY, {})
        self.cursor = toy_cursor()
        self.where = addresses(self.state)
        self.model = copied(self.state)
        self.occupied: set[int] = set()
        self.seed = 0

    @initialize(rows=st.integers(0, CAPACITY))
    def some_rows(self, rows: int) -> None:
        self.ticks(width=max(1, rows), length=rows, cull=set(), lights={})

    @rule(data=st.data(), room=st.none() | st.just(CAPACITY))
    def edit(self, data: st.DataObject, room: int | None) -> None:
        """Append, replace, cull, erase, pin, brighten: all in one plan, padded or not."""
        uses = st.sampled_from(["nothing", "write", "cull", "erase", "change"])
        use = {slot: data.draw(uses) for slot in range(CAPACITY)}
        named: dict[str, list[int]] = {
            what: data.draw(st.permutations([s for s, u in use.items() if u == what]))
            for what in ("write", "cull", "erase", "change")
        }
        changes = {
            name: {slot: data.draw(st.integers(0, 1)) for slot in named["change"]}
            for name in data.draw(st.sets(st.sampled_from(EDITED_COLUMNS)), "changes")
        }
        self.seed += 1
        plan = toy_edit(
            self.state, self.cursor, named["write"], cull=named["cull"], erase=named["erase"],
            changes=changes, room=room, seed=self.seed,
        )  # fmt: skip
        plan = plan._replace(cursor=self.next_cursor())
        asked = {
            name: (getattr(self.state, name).clone(), values) for name, values in changes.items()
        }

        patch(self.state, self.cursor, plan)

        for name, (column, values) in asked.items():  # the same, by hand
            for slot, value in values.items():
                column[slot] = value
            self.model[name] = np.frombuffer(raw_bytes(column), np.uint8).reshape(CAPACITY, -1)
            self.model[name] = self.model[name].copy()
        for slot in (*named["cull"], *named["erase"]):
            self.model["valid"][slot] = 0
            self.occupied.discard(slot)
        for slot in named["erase"]:
            for name, rows in self.model.items():
                rows[slot] = 0xFF if name in ("token_id", "position") else 0
        for row, slot in enumerate(named["write"]):
            for name in self.model:
                self.model[name][slot] = row_bytes(plan, name, row)
            self.occupied.add(slot)
        assert {int(tensor) for tensor in self.cursor} == {self.seed % 200}

    @rule(data=st.data())
    def tick(self, data: st.DataObject) -> None:
        cull = data.draw(st.sets(SLOT, max_size=2), "cull")
        free = CAPACITY - len(self.occupied - cull)
        length = data.draw(st.integers(0, min(1, free)), "length")
        lights = {slot: data.draw(st.integers(0, 99)) for slot in data.draw(st.sets(SLOT))}
        self.ticks(1, length, cull, lights)

    @rule(width=st.integers(1, CAPACITY))
    def nothing(self, width: int) -> None:
        before = digest(*self.state)
        self.ticks(width, 0, set(), {})
        assert digest(*self.state) == before

    def next_cursor(self) -> Cursor:
        return Cursor(*(torch.full_like(tensor, self.seed % 200) for tensor in self.cursor))

    def ticks(self, width: int, length: int, cull: set[int], lights: dict[int, int]) -> None:
        self.seed += 1
        plan = toy_plan(self.state, self.cursor, width, length, seed=self.seed)
        plan.cull[list(cull)] = True
        for number, name in enumerate(UPDATED_BY_TICKS):
            for slot, light in lights.items():
                plan.updates[name][slot] = light + number
        plan = plan._replace(cursor=self.next_cursor())
        asked = copied(self.state._replace(**plan.updates))
        given = plan._replace(
            cursor=Cursor(*(tensor.clone() for tensor in plan.cursor)),
            updates={name: updated.clone() for name, updated in plan.updates.items()},
        )
        kept = self.occupied - cull

        patch(self.state, self.cursor, plan)

        # The same, by hand.
        for slot in cull:
            self.model["valid"][slot] = 0
        self.occupied = kept
        for name in UPDATED_BY_TICKS:
            self.model[name] = asked[name]
        for row in range(length):
            slot = min(set(range(CAPACITY)) - self.occupied)  # the lowest free slot
            for name in self.model:
                self.model[name][slot] = row_bytes(given, name, row)
            self.occupied.add(slot)
        for tensor, same in zip(
            (*plan.updates.values(), *plan.cursor, *self.cursor),
            (*given.updates.values(), *given.cursor, *given.cursor),
            strict=True,
        ):
            assert torch.equal(tensor, same)  # the plan itself is only read

    @invariant()
    def every_byte_is_as_the_model_says(self) -> None:
        for name, rows in copied(self.state).items():
            assert np.array_equal(rows, self.model[name]), name

    @invariant()
    def addresses_never_change(self) -> None:
        assert addresses(self.state) == self.where


def test_I3_patch_agrees_with_a_plain_model() -> None:
    run_state_machine_as_test(
        PatchMachine, settings=settings(max_examples=60, stateful_step_count=12)
    )


def test_rows_go_to_the_lowest_free_slots() -> None:
    valid = torch.tensor([True, False, True, False, False, True])
    assert lowest_free_slots(valid, 1).tolist() == [1]
    assert lowest_free_slots(valid, 3).tolist() == [1, 3, 4]
    assert lowest_free_slots(valid, 5).tolist() == [1, 3, 4, 0, 2]
    full = torch.ones(4, dtype=torch.bool)
    assert len(set(lowest_free_slots(full, 4).tolist())) == 4
    assert lowest_free_slots(full, 1).tolist() == [0]


@pytest.mark.parametrize("width", [1, 4, CAPACITY])
def test_padding_writes_nowhere_even_in_a_full_memory(width: int) -> None:
    rows = {slot: slot for slot in range(CAPACITY)}
    state, cursor = toy_state(toy_config(), CAPACITY, rows), toy_cursor()
    before = digest(*state)
    patch(state, cursor, toy_plan(state, cursor, width, 0))
    patch(state, cursor, toy_edit(state, cursor, changes={"pinned": {}}, room=width))
    assert digest(*state) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_I13_erasing_leaves_no_byte_behind(dtype: torch.dtype) -> None:
    state, cursor = (
        toy_state(toy_config(), CAPACITY, {slot: slot for slot in range(6)}),
        toy_cursor(),
    )
    state = state._replace(keys=state.keys.to(dtype), values=state.values.to(dtype))
    untouched = [0, 1, 3, 4, 6, 7, 8]
    others = [
        tensor.index_select(2 if tensor.dim() == 4 else 0, torch.tensor(untouched)).clone()
        for tensor in state
    ]
    patch(state, cursor, toy_edit(state, cursor, erase=[5, 2], room=4))
    for slot in (2, 5):
        for name, tensor in state._asdict().items():
            row = tensor[:, :, slot] if tensor.dim() == 4 else tensor[slot]
            blank = NOWHERE if name in ("token_id", "position") else 0
            assert (row == blank).all(), name
            assert raw_bytes(row) == raw_bytes(torch.full_like(row, blank)), name  # not -0.0
    for tensor, other in zip(state, others, strict=True):
        dim = 2 if tensor.dim() == 4 else 0
        assert torch.equal(tensor.index_select(dim, torch.tensor(untouched)), other)


def test_a_new_row_takes_the_slot_that_the_same_plan_frees() -> None:
    rows = {slot: slot for slot in range(CAPACITY)}
    state, cursor = toy_state(toy_config(), CAPACITY, rows), toy_cursor()
    plan = toy_plan(state, cursor, 2, 1)
    plan.cull[4] = True
    patch(state, cursor, plan)
    assert int(state.valid.sum()) == CAPACITY
    assert int(state.position[4]) == int(plan.rows["position"][0])
    assert torch.equal(state.keys[:, :, 4], plan.keys[:, :, 0])


def test_culling_moves_no_memory() -> None:
    rows = {slot: slot for slot in range(CAPACITY)}
    state, cursor = toy_state(toy_config(), CAPACITY, rows), toy_cursor()
    others = [tensor for name, tensor in state._asdict().items() if name != "valid"]
    before = digest(*others)
    patch(state, cursor, toy_edit(state, cursor, cull=[1]))
    plan = toy_plan(state, cursor, 1, 0)
    plan.cull[5] = True
    patch(state, cursor, plan)
    assert digest(*others) == before
    assert torch.nonzero(~state.valid)[:, 0].tolist() == [1, 5]


def test_a_plan_that_was_made_empty_changes_nothing_in_its_own_tensors() -> None:
    state, cursor = toy_state(toy_config(), 12, {0: 3, 4: 1, 7: 2}), toy_cursor(4, token=9)
    plan = toy_plan(state, cursor, 1, 1)
    plan = plan._replace(
        cull=state.valid.clone(),
        updates={name: getattr(state, name) + 1 for name in plan.updates},
        cursor=toy_cursor(5, token=2),
    )
    held = (plan.length, plan.cull, *plan.updates.values(), *plan.cursor)
    where = [tensor.data_ptr() for tensor in held]
    before = digest(*state, *cursor)
    make_empty(state, cursor, plan)
    assert [tensor.data_ptr() for tensor in held] == where
    patch(state, cursor, plan)
    assert digest(*state, *cursor) == before


@pytest.mark.parametrize("room", [None, 4])
def test_the_patch_of_an_edit_makes_nothing_as_long_as_the_capacity(room: int | None) -> None:
    """It costs the rows that it names."""
    capacity = 4000
    state, cursor = toy_state(toy_config(), capacity, {7: 3, 9: 1, 11: 2}), toy_cursor()
    changes = {name: {11: 1.0} for name in EDITED_COLUMNS}
    plan = toy_edit(state, cursor, [2], cull=[7], erase=[9], changes=changes, room=room)
    with Watched() as edit:
        patch(state, cursor, plan)
    assert "index_copy_" in edit.names
    row = state.keys[:, :, 0].nbytes
    assert edit.largest <= 2 * (room or 1) * row < capacity
    with Watched() as tick:  # the check can fail
        patch(state, cursor, toy_plan(state, cursor, 1, 1))
    assert tick.largest >= capacity
