"""Which graphs exist, and what a brain may be shaped like."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compiled.torch_private
from compiled.choose import Eviction
from compiled.graphs import Graphs, GraphSpec, buckets
from compiled.philox import key_of
from compiled.sample import Sampling, SamplingMethod
from compiled.score import Brightness, Culling, Novelty
from toys import toy_config, toy_cursor, toy_state, toy_weights


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_buckets_cover_the_capacity(capacity: int, smallest: int) -> None:
    sizes = buckets(capacity, smallest)
    assert sizes[-1] == capacity
    assert all(1 <= size <= capacity for size in sizes)
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(sizes))
    assert all(size & (size - 1) == 0 and size >= smallest for size in sizes[:-1])
    assert sizes[0] < 2 * smallest or sizes[0] == capacity


@given(st.lists(st.integers(2, 40), min_size=1, unique=True), st.integers(1, 60))
def test_smallest_at_least(sizes: list[int], needed: int) -> None:
    ascending = (1, *sorted(sizes))
    graphs = graphs_of(48, compiled=True, widths=ascending)
    found = graphs.read_width(needed)
    if needed > ascending[-1]:
        assert found == needed  # not captured
    else:
        assert found in ascending
        assert found >= needed
        assert not any(needed <= size < found for size in ascending)


def spec(*, compiled: bool = True, **options: Any) -> GraphSpec:
    return GraphSpec(
        compiled,
        SamplingMethod(),
        Eviction(Brightness(), Novelty(), Culling(), lambda state, look: state.brightness),
        **options,
    )


@pytest.mark.parametrize(
    "widths", [(), (1,), (2, 4), (1, 1), (1, 16, 4), (1, 4, 4), (0, 1), (4, 1)]
)
def test_widths_that_form_no_set_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths"):
        spec(widths=widths)


@pytest.mark.parametrize("bucket", [0, -4])
def test_buckets_below_1_are_refused(bucket: int) -> None:
    with pytest.raises(ValueError, match="smallest_bucket"):
        spec(smallest_bucket=bucket)


def graphs_of(capacity: int, *, compiled: bool, **options: Any) -> Graphs:
    config = toy_config()
    zero = toy_cursor().token.float()[0]
    return Graphs(
        spec(compiled=compiled, **options),
        config,
        toy_weights(config),
        toy_state(config, capacity, {}),
        toy_cursor(),
        Sampling(zero, zero, zero, zero, key_of(0)),
    )


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5, 16, 17, 48, 100])
@pytest.mark.parametrize("widths", [(1, 4), (1, 4, 16), (1, 128)])
def test_every_width_has_its_graphs(capacity: int, widths: tuple[int, ...]) -> None:
    graphs = graphs_of(capacity, compiled=True, widths=widths, smallest_bucket=8)
    names = graphs.expected()
    assert len(set(names)) == len(names)
    assert graphs.widths[0] == 1
    assert graphs.chunk <= capacity
    for num_tokens in range(1, graphs.chunk + 1):
        width = graphs.read_width(num_tokens)
        assert num_tokens <= width
        for size in graphs.buckets:
            assert f"read T={width} bucket={size}" in names
        edit = graphs.edit_width(num_tokens)
        assert num_tokens <= edit <= capacity
        assert f"patch edit W={edit}" in names
        assert f"surprise T={edit}" in names
        for size in graphs.buckets:
            assert f"read T={edit} bucket={size}" in names  # what an edit appends is read so
    reads = sum(name.startswith("read ") for name in names)
    assert reads == len(set(graphs.widths)) * len(graphs.buckets)


def test_a_chunk_wider_than_the_widths_is_not_captured() -> None:
    graphs = graphs_of(48, compiled=True, widths=(1, 4), chunk=20)
    assert graphs.chunk == 20
    assert graphs_of(16, compiled=True, widths=(1, 4), chunk=20).chunk == 16
    assert [graphs.is_captured(n) for n in (1, 2, 4, 5, 20)] == [True, True, True, False, False]
    assert [graphs.read_width(n) for n in (2, 5, 20, 40)] == [4, 5, 20, 40]
    assert [graphs.edit_width(n) for n in (1, 4, 5)] == [4, 4, 5]
    tokens, positions = torch.arange(5), torch.arange(5)
    scored = graphs.uncaptured.scored_prefill(
        tokens, positions, torch.tensor(5), tokens, high_water=1
    )
    assert scored.new_keys.shape[2] == 5
    plan = graphs.empty_edit(5, scored)
    graphs.uncaptured.patch(
        plan._replace(rows=plan.rows | {"position": positions}, slots=torch.arange(5))
    )
    assert graphs.state.valid.sum() == 5
    assert graphs.captured == {}  # nothing was compiled for any of it


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_below_1_are_refused(chunk: int) -> None:
    with pytest.raises(ValueError, match="chunk"):
        spec(chunk=chunk)


def test_an_eager_brain_has_no_graphs_and_pads_nothing() -> None:
    graphs = graphs_of(48, compiled=False, widths=(1, 16), smallest_bucket=8)
    assert list(graphs.warm_up()) == []
    assert graphs.captured == {}
    assert [graphs.read_width(n) for n in (1, 3, 16)] == [1, 3, 16]
    assert graphs.edit_width(1) == 1


def test_ticks_can_be_captured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # It is of no consequence here what machine code the captured modules become.
    monkeypatch.setattr(
        compiled.torch_private, "inductor", lambda *_, **__: lambda module, inputs: module.forward
    )
    graphs = graphs_of(16, compiled=True, widths=(1, 4))
    names = list(graphs.warm_up(edits=False))
    assert tuple(names) == graphs.expected(edits=False) == tuple(graphs.captured)
    assert not any("T=4" in name or "edit" in name for name in names)
    rest = list(graphs.warm_up())
    assert tuple(names + rest) == graphs.expected()
    assert all(capture.compilations == 1 for capture in graphs.captured.values())


@pytest.mark.parametrize("width", [0, 3])
def test_an_empty_edit_changes_nothing(width: int) -> None:
    graphs = graphs_of(48, compiled=False)
    plan = graphs.empty_edit(width)
    before = [tensor.clone() for tensor in (*graphs.state, *graphs.cursor)]
    graphs.patch(plan)
    for tensor, same in zip((*graphs.state, *graphs.cursor), before, strict=True):
        assert tensor.equal(same)
    shared = {tensor.data_ptr() for tensor in (*graphs.state, *graphs.cursor)}
    assert not shared & {tensor.data_ptr() for tensor in plan.cursor}
    assert set(plan.changes) == ({"brightness", "novelty", "pinned"} if width else set())


def test_an_edit_has_room_for_what_it_may_change() -> None:
    """That of a captured width has one shape, and it does not follow the capacity."""
    shapes = []
    for capacity in (1200, 2400):
        plan = graphs_of(capacity, compiled=True, widths=(1, 4)).empty_edit(4)
        held = (plan.keys, plan.values, *plan.rows.values(), plan.slots, plan.cull, plan.erase)
        changed = [tensor for change in plan.changes.values() for tensor in change]
        shapes.append([tensor.shape for tensor in (*held, *changed)])
    assert shapes[0] == shapes[1]
    assert max(max(shape) for shape in shapes[0]) < 1200
