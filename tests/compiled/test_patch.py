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

from compiled.patch import make_empty, patch
from compiled.plan import Plan
from compiled.state import (
    NOWHERE,
    ROW_COLUMNS,
    Cursor,
    State,
    addresses,
    lowest_free_slots,
)
from toys import digest, of_a_tick, raw_bytes, toy_config, toy_cursor, toy_plan, toy_state

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


def row_bytes(plan: Plan, name: str, row: int) -> npt.NDArray[np.uint8]:
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
        self.most = 0
        self.high_water = 0
        self.seed = 0

    @initialize(rows=st.integers(0, CAPACITY))
    def some_rows(self, rows: int) -> None:
        self.apply(width=max(1, rows), length=rows)

    @rule(data=st.data(), width=st.integers(1, CAPACITY))
    def edit(self, data: st.DataObject, width: int) -> None:
        """Cull, erase, pin, brighten and append, all in one plan."""
        cull = data.draw(st.sets(SLOT), "cull")
        erase = data.draw(st.lists(SLOT, unique=True, max_size=width), "erase")
        free = CAPACITY - len(self.occupied - cull - set(erase))
        length = data.draw(st.integers(0, min(width, free)), "length")
        self.apply(
            width,
            length,
            cull,
            erase,
            {slot: data.draw(st.booleans()) for slot in data.draw(st.sets(SLOT), "pin")},
            {slot: data.draw(st.integers(0, 99)) for slot in data.draw(st.sets(SLOT), "light")},
        )

    @rule(data=st.data())
    def tick(self, data: st.DataObject) -> None:
        """A plan without pins and erasures, one row wide."""
        cull = data.draw(st.sets(SLOT, max_size=2), "cull")
        free = CAPACITY - len(self.occupied - cull)
        length = data.draw(st.integers(0, min(1, free)), "length")
        self.apply(1, length, cull, edits=False)

    @rule(width=st.integers(1, CAPACITY))
    def nothing(self, width: int) -> None:
        before = digest(*self.state)
        self.apply(width, 0)
        assert digest(*self.state) == before

    def apply(
        self,
        width: int,
        length: int,
        cull: set[int] | None = None,
        erase: list[int] | None = None,
        pins: dict[int, bool] | None = None,
        lights: dict[int, float] | None = None,
        *,
        edits: bool = True,
    ) -> None:
        self.seed += 1
        plan = toy_plan(self.state, self.cursor, width, length, seed=self.seed)
        assert plan.erase is not None
        plan.cull[list(cull or ())] = True
        plan.erase[: len(erase or ())] = torch.tensor(erase or [], dtype=torch.int64)
        for slot, pinned in (pins or {}).items():
            plan.updates["pinned"][slot] = pinned
        for slot, light in (lights or {}).items():
            plan.updates["brightness"][slot] = light
            plan.updates["lit"][slot] = self.seed
            plan.updates["novelty"][slot] = light + 1
        plan = plan._replace(
            cursor=Cursor(*(torch.full_like(tensor, self.seed) for tensor in self.cursor))
        )
        asked = copied(self.state._replace(**plan.updates))
        if not edits:
            plan = of_a_tick(plan)
        given = plan._replace(
            cursor=Cursor(*(tensor.clone() for tensor in plan.cursor)),
            updates={name: updated.clone() for name, updated in plan.updates.items()},
        )

        patch(self.state, self.cursor, plan)

        # The same, by hand.
        for slot in cull or ():
            self.model["valid"][slot] = 0
            self.occupied.discard(slot)
        self.model["brightness"] = asked["brightness"]
        self.model["lit"] = asked["lit"]
        self.model["novelty"] = asked["novelty"]
        if edits:
            self.model["pinned"] = asked["pinned"]
        for slot in erase or ():
            for name, rows in self.model.items():
                rows[slot] = 0xFF if name in ("token_id", "position") else 0
            self.occupied.discard(slot)
        for row in range(length):
            slot = min(set(range(CAPACITY)) - self.occupied)  # the lowest free slot
            for name in self.model:
                self.model[name][slot] = row_bytes(given, name, row)
            self.occupied.add(slot)
        self.most = max(self.most, len(self.occupied))
        self.high_water = max(self.high_water, *(slot + 1 for slot in self.occupied), 0)

        assert [tensor.tolist() for tensor in self.cursor] == [
            tensor.tolist() for tensor in given.cursor
        ]
        for tensor, same in zip(
            (*plan.updates.values(), *plan.cursor),
            (*given.updates.values(), *given.cursor),
            strict=True,
        ):
            assert torch.equal(tensor, same)  # the plan itself is only read

    @invariant()
    def every_byte_is_as_the_model_says(self) -> None:
        for name, rows in copied(self.state).items():
            assert np.array_equal(rows, self.model[name]), name

    @invariant()
    def the_high_water_mark_is_bounded_by_the_largest_count(self) -> None:
        assert self.high_water <= self.most

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
    plan = toy_plan(state, cursor, 4, 0)
    assert plan.erase is not None
    plan.erase[:2] = torch.tensor([5, 2])
    patch(state, cursor, plan)
    for slot in (2, 5):
        for name, tensor in state._asdict().items():
            row = tensor[:, :, slot] if tensor.dim() == 4 else tensor[slot]
            blank = NOWHERE if name in ("token_id", "position") else 0
            assert (row == blank).all(), name
            assert raw_bytes(row) == raw_bytes(torch.full_like(row, blank)), name  # not -0.0
    for tensor, other in zip(state, others, strict=True):
        dim = 2 if tensor.dim() == 4 else 0
        assert torch.equal(tensor.index_select(dim, torch.tensor(untouched)), other)


def test_replacing_takes_the_slot_that_the_same_plan_frees() -> None:
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
    plan = toy_plan(state, cursor, 1, 0)
    plan.cull[[1, 5]] = True
    patch(state, cursor, plan)
    assert digest(*others) == before
    assert torch.nonzero(~state.valid)[:, 0].tolist() == [1, 5]


def test_a_plan_that_was_made_empty_changes_nothing_in_its_own_tensors() -> None:
    state, cursor = toy_state(toy_config(), 12, {0: 3, 4: 1, 7: 2}), toy_cursor(4, token=9)
    plan = of_a_tick(toy_plan(state, cursor, 1, 1))
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
