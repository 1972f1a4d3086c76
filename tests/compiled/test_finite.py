"""The flag for what is not finite, and the patch that then changes nothing."""

import pytest
import torch

from compiled.finite import PARTS, not_finite
from compiled.patch import patch
from toys import digest, toy_config, toy_cursor, toy_plan, toy_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_every_part_has_its_bit(dtype: torch.dtype, value: float) -> None:
    most = torch.finfo(dtype).max
    for bit in range(len(PARTS)):
        parts = [torch.full((2, 3), most, dtype=dtype) for _ in PARTS]
        assert int(not_finite(*parts)) == 0  # large is not infinite
        parts[bit][1, 2] = value
        parts[0][0, 0] = value
        assert int(not_finite(*parts)) == 1 | 1 << bit


@pytest.mark.parametrize("compiled", [False, True])
def test_a_patch_with_a_flag_changes_nothing(compiled: bool) -> None:
    run = torch.compile(patch, fullgraph=True) if compiled else patch
    state, cursor = toy_state(toy_config(layers=1), 9, {0: 3, 2: 5, 5: 8}), toy_cursor(9, token=4)
    plan = toy_plan(state, cursor, 1, 1)
    plan.cull[2] = True
    plan.updates["brightness"].add_(1)
    plan.cursor.tick.add_(1)
    plan.keys[0, 0, 0, 1] = plan.rows["surprise"][0] = float("nan")
    before = digest(*state, *cursor)
    run(state, cursor, plan._replace(not_finite=torch.tensor(2)))
    assert digest(*state, *cursor) == before
    twin, its_cursor = (type(both)(*(t.clone() for t in both)) for both in (state, cursor))
    run(state, cursor, plan._replace(not_finite=torch.tensor(0)))
    patch(twin, its_cursor, plan)  # type: ignore[arg-type]
    assert digest(*state, *cursor) == digest(*twin, *its_cursor) != before
