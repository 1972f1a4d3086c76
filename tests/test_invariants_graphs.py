"""Invariants of the captured graphs, and of the source they come from: I2, I9 and what a tick may
allocate."""

import ast
import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import brain
import compiled
from brain import Append, Boost, Brain, Cull, Pin, Redact, Replace
from compiled.capture import Graph
from compiled.read import Reading
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

OpenTiny = Callable[..., Brain]
IDS = [(37 * index + 11) % 300 for index in range(200)]
SOURCES = sorted(Path(inspect.getfile(compiled)).parent.glob("*.py"))
WIDTHS, BUCKETS = (1, 4, 16), (32, 48)


@pytest.fixture(scope="module")
def layered_brain(open_tiny: OpenTiny) -> Brain:
    """The tiny brain with its reads captured layer by layer, as on a GPU, without the operator."""
    b = open_tiny(engine="compiled", **{"engine.native": False})
    for width in WIDTHS:
        zeros = torch.zeros(width, dtype=torch.int64)
        for bucket in BUCKETS:
            b.graphs.read(zeros, zeros + 0, torch.tensor(0), high_water=bucket)
    return b


@pytest.fixture(params=["operator", "layers"])
def reading_brain(request: pytest.FixtureRequest) -> Brain:
    """Captured reads of both kinds."""
    chosen: Brain = request.getfixturevalue(
        "warm_brain" if request.param == "operator" else "layered_brain"
    )
    return chosen


# I2: only the patch writes -----------------------------------------------------------------------


class Inlined(Interpreter):
    """Runs a captured graph with its layers in line, so that every operation is in sight."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.invoke_subgraph:
            region, _, *operands = args
            return region(*operands)
        return super().call_function(target, args, kwargs)


def inputs_of(module: GraphModule) -> list[Tensor]:
    """Real tensors like those the graph was captured with."""
    examples = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    return [
        torch.empty_strided(e.shape, e.stride(), dtype=e.dtype, device="cpu").zero_()
        for e in examples
    ]


def mutated_inputs(module: GraphModule) -> set[str]:
    """Names of the inputs that the graph writes: what is copied back once it is functional."""
    functional = torch.func.functionalize(lambda *inputs: Inlined(module).run(*inputs))
    traced = make_fx(functional)(*inputs_of(module))
    names = [node.target for node in module.graph.find_nodes(op="placeholder")]
    placeholders = dict(
        zip(traced.graph.find_nodes(op="placeholder"), map(str, names), strict=True)
    )
    written = set()
    for node in traced.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "_schema", None) is not None:
            for index, argument in enumerate(node.target._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.add(placeholders[node.args[index]])
    return written


def aliased_inputs(module: GraphModule) -> int:
    """How many outputs share memory with an input."""
    inputs = inputs_of(module)
    outputs = Inlined(module).run(*inputs)
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return sum(
        tensor.untyped_storage().data_ptr() in storages for tensor in outputs if tensor.numel() > 0
    )


def captured(b: Brain, prefix: str) -> Iterator[Graph]:
    found = [capture for name, capture in b.graphs.captures.items() if name.startswith(prefix)]
    assert found
    yield from found


def assert_writes_nothing(capture: Graph) -> None:
    for module in capture.modules:
        assert mutated_inputs(module) == set(), capture.name
        assert aliased_inputs(module) == 0, capture.name


def test_I2_no_captured_read_can_write(reading_brain: Brain) -> None:
    for capture in captured(reading_brain, "read"):
        assert_writes_nothing(capture)


@pytest.mark.parametrize("prefix", ["choose", "surprise"])
def test_I2_no_captured_graph_but_the_patch_can_write(prefix: str, warm_brain: Brain) -> None:
    for capture in captured(warm_brain, prefix):
        assert_writes_nothing(capture)


def test_I2_captured_reads_take_every_input_that_matters(reading_brain: Brain) -> None:
    """What the checks above look at is the read itself: weights, cache, mirror and tokens."""
    for capture in captured(reading_brain, "read"):
        names = [str(n.target) for n in capture.modules[0].graph.find_nodes(op="placeholder")]
        for field in ("keys", "values", "valid", "position", "embedding", "qkv", "down"):
            assert any(name.endswith(field) for name in names), (capture.name, field)


@pytest.mark.parametrize("kind", ["tick", "edit"])
def test_I2_the_patch_writes_what_it_should(kind: str, warm_brain: Brain) -> None:
    """The checks can fail: they find every write of the patch, and only those it is for."""
    everything = {f"L_arguments_0_{name}" for name in warm_brain.state._fields}
    everything |= {f"L_arguments_1_{name}" for name in warm_brain.cursor._fields}
    for capture in captured(warm_brain, f"patch {kind}"):
        assert mutated_inputs(capture.modules[0]) == everything, capture.name


def test_I2_captured_reads_write_no_byte_of_any_input(reading_brain: Brain) -> None:
    """The machine code, not the graph it was made of."""
    b = reading_brain
    b.prime(IDS[:30])
    held = (*b.state, *b.cursor, *b.checkpoint.weights.tensors(), *b.graphs.sampling)
    before = digest(*held)
    for width in WIDTHS:
        tokens, positions = torch.arange(width), torch.arange(30, 30 + width)
        length = torch.tensor(width)
        inputs = digest(tokens, positions, length)
        for bucket in BUCKETS:
            b.graphs.read(tokens, positions, length, high_water=bucket)
        assert digest(tokens, positions, length) == inputs
    assert digest(*held) == before


def in_place_writes(tree: ast.AST) -> list[str]:
    """Every call of a method that writes its tensor, ``out=``, and every item assignment to
    anything but a name annotated as a dictionary or list."""
    containers = {
        ast.unparse(node.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
        and ast.unparse(node.annotation).startswith(("dict[", "list["))
    }
    writes = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name.endswith("_") and not name.endswith("__"):
                writes.append(ast.unparse(node))
            writes += [ast.unparse(node) for word in node.keywords if word.arg == "out"]
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Subscript) and ast.unparse(part.value) not in containers:
                    writes.append(ast.unparse(node))
    return writes


def test_I2_one_module_writes_tensors_in_place() -> None:
    writers = {path.name for path in SOURCES if in_place_writes(ast.parse(path.read_text()))}
    assert writers == {"patch.py"}


@pytest.mark.parametrize(
    "source",
    ["x.copy_(y)", "x[0] = y", "x[0] += y", "torch.add(x, y, out=z)", "a, x[1] = y", "x.mul_(2)"],
)
def test_I2_the_search_for_writes_finds_them(source: str) -> None:
    assert in_place_writes(ast.parse(source))


@pytest.mark.parametrize("source", ["x = y", "x: dict[str, int] = {}\nx['a'] = 1", "x.__init__()"])
def test_I2_the_search_for_writes_finds_nothing_else(source: str) -> None:
    assert not in_place_writes(ast.parse(source))


def test_I2_brain_writes_no_state_tensor() -> None:
    """``brain/`` builds tensors of its own, but never writes into a state or a cursor."""
    for path in sorted(Path(inspect.getfile(brain)).parent.rglob("*.py")):
        for write in in_place_writes(ast.parse(path.read_text())):
            written = write.split("=")[0].split("_(")[0]
            assert "state." not in written, (path.name, write)
            assert "cursor." not in written, (path.name, write)


def test_compiled_imports_nothing_of_the_rest() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path.name
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] not in ("brain", "conf", "hydra", "tests"), path.name


# I9: exactly the expected compilations, no breaks, no syncs --------------------------------------


def anything(b: Brain) -> None:
    """A day in the life: every kind of call, at every width and bucket, in no special order."""
    b.prime(IDS[:3])
    b.read()
    b.prime(IDS[:30], source="system")
    b.feed(IDS[:4])
    b.patch([Cull(b.mirror.position[[5, 9]].tolist()), Append(IDS[60:63])])
    for count in (1, 2, 4, 5, 15, 16, 40):
        b.read(IDS[:count])
        b.read(IDS[:count], list(range(7, 7 + count)))
    where = b.mirror.position.tolist()
    b.patch([Replace(where[6:9], [4, 5]), Pin(where[9:10]), Redact(where[10:12])])
    b.patch([Boost(where[12:14], 3.0), Pin(where[9:10], pinned=False)])
    b.patch([Append(IDS[90:95])])
    for _ in range(12):
        b.tick()
    b.prime(IDS[:48])
    b.patch([])
    for _ in range(30):
        b.tick()
    b.patch([Cull(b.mirror.position[3:-1].tolist())])
    b.patch([Append(IDS[:20], source="tool")])
    b.feed(IDS[:10], source="user")


def compile_counts() -> dict[str, int]:
    counters: dict[str, Counter[str]] = torch._dynamo.utils.counters
    return {
        "breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"]["unique_graphs"],
        "recompiles": sum(counters["recompiles"].values()),
        "kernels": counters["inductor"]["fxgraph_cache_hit"]
        + counters["inductor"]["fxgraph_cache_miss"],
    }


def test_I9_exactly_the_expected_graphs_once_each_whatever_happens(warm_brain: Brain) -> None:
    b = warm_brain
    expected = {
        *(f"read T={width} bucket={size}" for width in WIDTHS for size in BUCKETS),
        "choose",
        "patch tick W=1",
        *(f"{what}={width}" for width in WIDTHS[1:] for what in ("surprise T", "patch edit W")),
    }
    assert len(expected) == len(b.graphs.expected()) == 12
    assert set(b.graphs.expected()) == expected
    before = compile_counts()
    anything(b)
    assert compile_counts() == before
    assert tuple(b.graphs.captures) == b.graphs.expected()  # in order of warm-up
    assert {name: capture.compilations for name, capture in b.graphs.captures.items()} == (
        dict.fromkeys(expected, 1)
    )
    assert all(capture.seconds > 0 for capture in b.graphs.captures.values())
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
    for capture in captured(layered_brain, "read"):
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
    for capture in captured(warm_brain, "read"):
        targets = [str(node.target) for node in capture.modules[0].graph.nodes]
        assert sum(target.startswith("positronic_brain.decode") for target in targets) == 1


SYNCING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "equal")


def operations(module: GraphModule) -> set[str]:
    traced = make_fx(lambda *inputs: Inlined(module).run(*inputs))(*inputs_of(module))
    return {
        str(node.target).removeprefix("aten.").split(".")[0]
        for node in traced.graph.nodes
        if node.op == "call_function"
    }


def test_I9_no_captured_graph_asks_the_host(warm_brain: Brain) -> None:
    for capture in warm_brain.graphs.captures.values():
        used = operations(capture.modules[0])
        assert len(used) > 3
        assert not used & set(SYNCING), capture.name


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation, and the bytes of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        # In-place operations and views make nothing.
        if not any(r.alias_info is not None for r in func._schema.returns):
            made = result if isinstance(result, tuple | list) else [result]
            sizes = [tensor.nbytes for tensor in made if isinstance(tensor, Tensor)]
            self.largest = max(self.largest, *sizes, 0)
        return result


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
        assert b.graphs.captures["surprise T=4"].is_direct
    with pytest.raises(AssertionError, match="expected size"):
        b.graphs.surprises(torch.zeros(4, 299), targets)
    capture = b.graphs.captures["surprise T=4"]
    assert capture.compilations == 1


# What a tick and a patch may allocate ------------------------------------------------------------


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
    plan.cull[7:40] = True
    plan.rows.length.fill_(4)
    with Watched() as patch:
        b.graphs.patch(plan)
    assert "index_copy_" in patch.names
    assert patch.largest < layer / 2
    with Watched() as clone:  # the check can fail
        b.state.keys.clone()
    assert clone.largest == 2 * layer


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes of everything that was allocated on the CPU."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


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


# Captured and eager agree ------------------------------------------------------------------------


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
