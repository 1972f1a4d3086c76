"""Invariants of the graphs that look up and read ahead: I2, I9, and that they say what eager and
plain ones say.
"""

import pytest
import torch
from torch.fx import GraphModule

from brain import Brain
from compiled.lookup import Proposal
from conftest import OpenTiny
from test_invariants_graphs import (
    SYNCING,
    Watched,
    aliased_inputs,
    anything,
    compile_counts,
    mutated_inputs,
    operations,
)
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = [12, 13, 14, 10, 11, 7, 170, 34, 12, 13, 14]
OPTIONS = {
    **{"engine.widths": [1, 16], "engine.smallest_bucket": 96, "capacity": 96, "cull.target": 80},
    **{"lookup": "ngram", "lookup.width": 3, "lookup.window": 8},
}
NEW = ("propose", "read ahead T=4 bucket=96", "choose T=4", "patch tick W=4")


@pytest.fixture(scope="module")
def b(open_parrot: OpenTiny) -> Brain:
    captured = open_parrot(engine="compiled", **OPTIONS)
    for _ in captured.warm_up():
        pass
    return captured


def test_I9_exactly_the_expected_graphs_once_each(b: Brain) -> None:
    expected = [
        *("read T=1 bucket=96", "choose", "patch tick W=1", *NEW),
        *("read T=16 bucket=96", "surprise T=16", "patch edit W=16"),
    ]
    assert list(b.graphs.expected()) == list(b.graphs.captures) == expected
    before = compile_counts()
    b.prime(TEXT)
    spoken = list(b.stream(60))
    anything(b)
    list(b.stream(30))
    assert {tick.width for tick in spoken} == {1, 4}
    assert compile_counts() == before
    assert before["breaks"] == 0
    assert {c.compilations for c in b.graphs.captures.values()} == {1}
    state = digest(*b.state, *b.cursor)
    assert list(b.warm_up()) == []
    assert digest(*b.state, *b.cursor) == state


@pytest.mark.parametrize("name", NEW)
def test_I2_only_the_patch_writes(name: str, b: Brain) -> None:
    module = b.graphs.captures[name].modules[0]
    written = mutated_inputs(module)
    if name.startswith("patch"):
        everything = {f"L_arguments_0_{field}" for field in b.state._fields}
        assert written == everything | {f"L_arguments_1_{field}" for field in b.cursor._fields}
    else:
        assert written == set()
        assert aliased_inputs(module) == 0


@pytest.mark.parametrize("name", NEW)
def test_I9_none_of_them_asks_the_host(name: str, b: Brain) -> None:
    used = operations(b.graphs.captures[name].modules[0])
    assert len(used) > 3
    assert not used & set(SYNCING)


def test_I9_layers_that_are_read_ahead_are_compiled_once(open_parrot: OpenTiny) -> None:
    """Without the operator, as on a GPU."""
    b = open_parrot(engine="compiled", **OPTIONS, **{"engine.native": False})
    b.prime(TEXT)
    proposal = Proposal(torch.tensor([13, 14, 10]), torch.tensor(2))
    reading = b.graphs.read_ahead(proposal, high_water=96)
    assert reading.logits.shape[0] == 4
    capture = b.graphs.captures["read ahead T=4 bucket=96"]
    module = capture.modules[0]
    nested = [m for m in module.modules() if isinstance(m, GraphModule) and m is not module]
    assert len(nested) == 1
    assert mutated_inputs(module) == set()
    assert aliased_inputs(module) == 0


def test_I1_looking_up_and_reading_ahead_write_no_byte(b: Brain) -> None:
    b.prime(TEXT)
    list(b.stream(30))
    held = (*b.state, *b.cursor, *b.checkpoint.weights.tensors(), *b.graphs.sampling)
    before, where = digest(*held), [tensor.data_ptr() for tensor in held]
    proposal = b.graphs.propose()
    assert int(proposal.length) > 0
    told = digest(*proposal)
    b.graphs.read_ahead(proposal, high_water=b.memory.high_water)
    b.graphs.propose()
    assert digest(*held) == before
    assert [tensor.data_ptr() for tensor in held] == where
    assert digest(*proposal) == told


@pytest.mark.parametrize("options", [{}, {"lookup": "none"}], ids=["eager", "plain"])
def test_captured_passes_say_what_others_say(
    options: dict[str, str], b: Brain, open_parrot: OpenTiny
) -> None:
    other = open_parrot(**{**OPTIONS, **options})
    said = []
    for each in (b, other):
        each.prime(TEXT)
        said.append([tick.token for tick in each.stream(90)])  # into a full memory
    assert said[0] == said[1]
    mine, theirs = b.mirror, other.mirror
    assert mine.slot.tolist() == theirs.slot.tolist()
    assert mine.token_id.tolist() == theirs.token_id.tolist()
    for name in ("brightness", "surprise", "novelty"):
        # Float32 sums in another order, a hundred ticks of them.
        torch.testing.assert_close(
            torch.from_numpy(getattr(mine, name)),
            torch.from_numpy(getattr(theirs, name)),
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_pass_asks_for_its_number_and_nothing_else(open_parrot: OpenTiny) -> None:
    """How many were proposed, how many came true: the tokens travel when they are asked for."""
    eager = open_parrot(**OPTIONS)
    eager.prime(TEXT)
    list(eager.stream(30))
    with Watched() as watched:
        ticks = eager.speak()
    assert len(ticks) > 1
    assert watched.names & set(SYNCING) == {"_local_scalar_dense"}
