"""What is captured says what is eager says, keeps its outputs apart and allocates little."""

import copy
from types import CodeType

import pytest
import torch

from brain import Brain
from captured_graphs import SYNCING, Watched, allocations
from compiled import torch_private
from compiled.capture import Graph
from compiled.read import Reading
from fixture_types import OpenTiny
from histories import IDS
from toy_models import PARROT_OPTIONS, PARROT_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_tick_allocates_nothing_like_the_cache(open_tiny: OpenTiny) -> None:
    """At a full memory of 2,000 slots, no tensor made by an eager tick or patch comes near one
    layer's keys: columns and scores are [capacity] per head, rows head_dim times as large."""
    b = open_tiny(capacity=2000, **{"cull.target": 2000})
    b.prime([token % 300 for token in range(2000)])
    layer = b.state.keys[0].nbytes
    with Watched() as loop:
        for _ in range(3):
            b.tick()
    assert loop.largest < layer / 2
    plan = b.graphs.empty_edit(4)
    plan.cull.copy_(torch.arange(7, 11))
    plan.slots.copy_(torch.arange(11, 15))
    with Watched() as patch:
        b.graphs.patch(plan)
    assert "index_copy_" in patch.names
    assert patch.largest < layer / 2
    with Watched() as clone:  # the check can fail
        b.state.keys.clone()
    assert clone.largest == 2 * layer


def test_captured_graphs_allocate_nothing_like_the_cache(warm_brain: Brain) -> None:
    """The machine code writes keys and values in place: no graph clones so much as one layer. In so
    small a memory the scratch of a read, a number for each head and slot, is near a layer's keys;
    ``test_guard.py`` has it grow.
    """
    b = warm_brain
    b.prime(IDS[:40])
    layer = b.state.keys[0].nbytes
    width = torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.tensor(4)
    edit = b.graphs.empty_edit(4)
    reading = b.graphs.read(*width, high_water=48)
    for run, bound in (
        (lambda: b.graphs.patch(edit), layer),
        (b.tick, 2 * layer),
        (
            lambda: b.graphs.patch(edit._replace(keys=reading.new_keys, values=reading.new_values)),
            layer,
        ),
    ):
        run()
        sizes = allocations(run)
        assert max(sizes, default=0) < bound, sorted(sizes)[-5:]
    assert max(allocations(lambda: b.state.keys.clone())) >= 2 * layer  # the check can fail


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def trio(request: pytest.FixtureRequest, open_tiny: OpenTiny) -> tuple[Brain, Brain, Brain]:
    """Captured, eager, and eager in float32."""
    options = {"dtype": request.param, "engine.smallest_bucket": 48}
    return open_tiny(engine="compiled", **options), open_tiny(**options), open_tiny()


def read_of_noise(b: Brain, num_tokens: int, seed: int) -> Reading:
    """A read against a full memory of random rows, the same for every brain."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, *b.state.keys.shape, generator=generator)
    b.state.valid.fill_(True)
    b.state.valid[[3, 30]] = False
    b.state.position.copy_(torch.arange(48).flip(0))
    b.state.keys.copy_(keys)
    b.state.values.copy_(values)
    return b.graphs.read(
        torch.randint(0, 300, (num_tokens,), generator=generator),
        torch.arange(48, 48 + num_tokens),
        torch.tensor(num_tokens),
        high_water=48,
    )


@pytest.mark.parametrize("num_tokens", [1, 4, 16])
def test_captured_and_eager_reads_agree(num_tokens: int, trio: tuple[Brain, Brain, Brain]) -> None:
    exact_dtype = trio[0].state.keys.dtype == torch.float32
    errors = {name: torch.zeros(3) for name in Reading._fields}  # captured, eager, and the size
    for seed in range(2 if exact_dtype else 30):
        ours, theirs, exact = (read_of_noise(b, num_tokens, seed) for b in trio)
        if exact_dtype:
            # The same float32 sums in another order, through two layers: some hundred roundings
            # of 2^-24 on values of order 5.
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, other, rtol=5e-5, atol=5e-5)
        for name, sums in errors.items():
            truth = getattr(exact, name)
            for index, reading in enumerate((ours, theirs)):
                sums[index] += (getattr(reading, name).float() - truth).pow(2).sum()
            sums[2] += truth.pow(2).sum()
    if exact_dtype:
        return
    for name, sums in errors.items():
        captured_error, eager_error, size = sums.sqrt().tolist()
        # Both round to 2^-8, each at places of its own: neither may be much further from float32
        # than the other (the factor of section 10), and neither far from it in a dozen roundings.
        assert captured_error < 1.5 * eager_error, name
        assert captured_error < 12 * 2**-8 * size, name


@pytest.mark.parametrize("count", [1, 31, 32, 33, 47, 48])
def test_captured_and_eager_agree_at_the_edges_of_a_bucket(
    count: int, warm_brain: Brain, eager_brain: Brain
) -> None:
    """One row short of a bucket, exactly full, one past it."""
    results = []
    for b in (warm_brain, eager_brain):
        b.prime(IDS[:count])
        results.append([b.read(), b.read(IDS[50:53]), b.read([7], [count // 2])])
    for captured_reading, eager_reading in zip(*results, strict=True):
        for mine, other in zip(captured_reading, eager_reading, strict=True):
            torch.testing.assert_close(mine, other, rtol=5e-5, atol=5e-5)
    for b in (warm_brain, eager_brain):
        b.feed(IDS[60:62])
        assert len(b) == int(b.state.valid.sum())


def test_outputs_of_a_read_survive_the_next_one(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:20])
    first = b.read(IDS[20:24])
    kept = copy.deepcopy(first)
    b.read(IDS[30:34])
    b.tick()
    b.read(IDS[40:44])
    for tensor, copied in zip(first, kept, strict=True):
        assert torch.equal(tensor, copied)


@pytest.mark.parametrize("options", [{}, {"lookup": "none"}], ids=["eager", "plain"])
def test_captured_passes_say_what_others_say(
    options: dict[str, str], warm_parrot: Brain, open_parrot: OpenTiny
) -> None:
    b = warm_parrot
    other = open_parrot(**{**PARROT_OPTIONS, **options})
    said = []
    for each in (b, other):
        each.prime(PARROT_TEXT)
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
    eager = open_parrot(**PARROT_OPTIONS)
    eager.prime(PARROT_TEXT)
    list(eager.stream(30))
    with Watched() as watched:
        ticks = eager.speak()
    assert len(ticks) > 1
    assert watched.names & set(SYNCING) == {"_local_scalar_dense"}


def test_a_graph_is_compiled_by_its_first_call_and_entered_by_the_rest() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    graph = Graph("double", double, torch.device("cpu"))
    assert (graph.name, graph.compilations, graph.modules) == ("double", 0, [])
    assert (graph.seconds, graph.is_direct) == (0.0, False)
    x = torch.arange(3.0)
    assert graph(x).tolist() == [0.0, 2.0, 4.0]
    assert (graph.compilations, len(graph.modules), graph.is_direct) == (1, 1, True)
    assert graph.seconds > 0
    assert graph(x + 1).tolist() == [2.0, 4.0, 6.0]
    with pytest.raises(AssertionError, match="expected size"):
        graph(torch.arange(4.0))
    assert graph.compilations == 1


def test_graphs_of_one_function_are_compiled_apart() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    graphs = [Graph(f"double {size}", double, torch.device("cpu")) for size in (2, 3)]
    for size, graph in zip((2, 3), graphs, strict=True):
        assert graph(torch.ones(size)).tolist() == [2.0] * size
    assert [graph.compilations for graph in graphs] == [1, 1]
    assert all(graph.is_direct for graph in graphs)


def test_a_first_call_that_is_interrupted_compiles_once_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = Graph("doubled", lambda x: x * 2, torch.device("cpu"))
    found = torch_private.compiled_codes

    def interrupted(code: CodeType) -> list[CodeType]:
        monkeypatch.setattr(torch_private, "compiled_codes", found)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_private, "compiled_codes", interrupted)
    x = torch.arange(3.0)
    with pytest.raises(KeyboardInterrupt):
        graph(x)
    assert graph(x).equal(x * 2)
    assert graph(x).equal(x * 2)
    assert graph.compilations == 1
