"""I9: exactly the expected compilations, no graph breaks, no waiting for the device."""

import pytest
import torch
from torch.fx import GraphModule

from brain import Brain
from captured_graphs import (
    SYNCING,
    Watched,
    aliased_inputs,
    captured,
    compile_counts,
    mutated_inputs,
    operations,
)
from compiled.lookup import Proposal
from fixture_types import OpenTiny
from histories import IDS, anything
from toy_models import PARROT_OPTIONS, PARROT_TEXT
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")


WIDTHS, BUCKETS = (1, 4, 16), (32, 48)


def test_I9_exactly_the_expected_graphs_once_each_whatever_happens(warm_brain: Brain) -> None:
    b = warm_brain
    expected = {
        *(f"read T={width} bucket={size}" for width in WIDTHS for size in BUCKETS),
        *(f"step T=1 bucket={size}" for size in BUCKETS),
        "patch tick W=1",
        *(f"{what}={width}" for width in WIDTHS[1:] for what in ("surprise T", "patch edit W")),
    }
    assert len(expected) == len(b.graphs.expected()) == 13
    assert set(b.graphs.expected()) == expected
    before = compile_counts()
    anything(b)
    assert compile_counts() == before
    assert tuple(b.graphs.captured) == b.graphs.expected()  # in order of warm-up
    assert {name: capture.compilations for name, capture in b.graphs.captured.items()} == (
        dict.fromkeys(expected, 1)
    )
    assert all(capture.seconds > 0 for capture in b.graphs.captured.values())
    assert before["breaks"] == 0


def test_I9_warming_up_again_compiles_nothing_and_changes_nothing(warm_brain: Brain) -> None:
    b = warm_brain
    b.prime(IDS[:20])
    b.feed(IDS[:8])
    before, state = compile_counts(), digest(*b.state, *b.cursor)
    assert list(b.warm_up()) == []
    assert compile_counts() == before
    assert digest(*b.state, *b.cursor) == state


def test_I9_layers_are_compiled_once(layered_brain: Brain) -> None:
    """Two layers, one nested graph: the second is stamped out from the first."""
    for capture in (*captured(layered_brain, "read"), *captured(layered_brain, "step")):
        module = capture.modules[0]
        nested = [m for m in module.modules() if isinstance(m, GraphModule) and m is not module]
        calls = [
            node
            for node in module.graph.nodes
            if node.target is torch.ops.higher_order.invoke_subgraph
        ]
        assert len(nested) == 1, capture.name
        assert len(calls) == layered_brain.checkpoint.config.num_layers == 2, capture.name
        assert {call.args[1] for call in calls} == {calls[0].args[1]}, capture.name


def test_I9_a_captured_read_on_a_cpu_is_one_call_of_the_operator(warm_brain: Brain) -> None:
    for capture in (*captured(warm_brain, "read"), *captured(warm_brain, "step")):
        targets = [str(node.target) for node in capture.modules[0].graph.nodes]
        assert sum(target.startswith("positronic_brain.read_cpu") for target in targets) == 1


def test_I9_no_captured_graph_asks_the_host(warm_brain: Brain) -> None:
    for capture in warm_brain.graphs.captured.values():
        used = operations(capture.modules[0])
        assert len(used) > 3
        assert not used & set(SYNCING), capture.name


def test_I9_a_tick_never_waits_for_the_device(eager_brain: Brain) -> None:
    """Nothing is asked of any tensor until somebody asks for the token."""
    b = eager_brain
    b.prime(IDS[:30])
    with Watched() as loop:
        ticks = [b.tick() for _ in range(6)]
        made = repr([tick.number for tick in ticks])
    assert loop.names >= {"bmm", "topk", "index_copy_"}
    assert not loop.names & set(SYNCING)
    assert made == "[1, 2, 3, 4, 5, 6]"
    with Watched() as asking:  # the check can fail
        assert ticks[0].token == ticks[0].token
    assert asking.names & set(SYNCING)


def test_I9_nothing_a_graph_reads_ever_moves(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:20])
    held = (*b.state, *b.cursor, *b.checkpoint.weights.tensors(), *b.graphs.sampling)
    where = [tensor.data_ptr() for tensor in held]
    anything(b)
    again = (*b.state, *b.cursor, *b.checkpoint.weights.tensors(), *b.graphs.sampling)
    assert [tensor.data_ptr() for tensor in again] == where
    assert all(a is b for a, b in zip(held, again, strict=True))


def test_I9_a_second_compilation_is_an_error(open_tiny: OpenTiny) -> None:
    """Not a slow path: an input of another shape than was captured is refused by the graph."""
    b = open_tiny(engine="compiled", **{"engine.widths": [1, 4]})
    logits, targets = torch.zeros(4, 300), torch.zeros(4, dtype=torch.int64)
    b.graphs.surprises(logits, targets)
    b.graphs.surprises(logits + 1, targets)
    if b.device.type == "cpu":
        assert b.graphs.captured["surprise T=4"].is_direct
    with pytest.raises(AssertionError, match="expected size"):
        b.graphs.surprises(torch.zeros(4, 299), targets)
    capture = b.graphs.captured["surprise T=4"]
    assert capture.compilations == 1


NEW = ("propose", "step T=4 bucket=96", "patch tick W=4")


def test_I9_exactly_the_expected_graphs_once_each(warm_parrot: Brain) -> None:
    b = warm_parrot
    expected = [
        *("step T=1 bucket=96", "patch tick W=1", *NEW, "read T=1 bucket=96"),
        *("read T=16 bucket=96", "surprise T=16", "patch edit W=16"),
    ]
    assert list(b.graphs.expected()) == list(b.graphs.captured) == expected
    before = compile_counts()
    b.prime(PARROT_TEXT)
    spoken = list(b.stream(60))
    anything(b)
    list(b.stream(30))
    assert {tick.width for tick in spoken} == {1, 4}
    assert compile_counts() == before
    assert before["breaks"] == 0
    assert {c.compilations for c in b.graphs.captured.values()} == {1}
    state = digest(*b.state, *b.cursor)
    assert list(b.warm_up()) == []
    assert digest(*b.state, *b.cursor) == state


@pytest.mark.parametrize("name", NEW)
def test_I9_none_of_them_asks_the_host(name: str, warm_parrot: Brain) -> None:
    b = warm_parrot
    used = operations(b.graphs.captured[name].modules[0])
    assert len(used) > 3
    assert not used & set(SYNCING)


def test_I9_layers_that_are_read_ahead_are_compiled_once(open_parrot: OpenTiny) -> None:
    """Without the operator, as on a GPU."""
    b = open_parrot(engine="compiled", **PARROT_OPTIONS, **{"engine.native": False})
    b.prime(PARROT_TEXT)
    proposal = Proposal(torch.tensor([13, 14, 10]), torch.tensor(2))
    reading, _ = b.graphs.step_ahead(proposal, b._unforced_ahead, high_water=96)
    assert reading.logits.shape[0] == 4
    capture = b.graphs.captured["step T=4 bucket=96"]
    module = capture.modules[0]
    nested = [m for m in module.modules() if isinstance(m, GraphModule) and m is not module]
    assert len(nested) == 1
    assert mutated_inputs(module) == set()
    assert aliased_inputs(module) == 0
