"""The guard: what a tick is made of. It fails on structure, never on time.

Slow ticks come from structure: a kernel or a parallel region more in every layer, a copy of the
cache or of a weight, a graph compiled again, a wait for the device. All of them can be counted, so
they are counted, on any machine. The bounds are what there is today and little more; whoever has to
raise one knows what a tick will cost.
"""

import ast
import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from torch._inductor.graph import GraphLowering

from brain import Brain
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.measure.golden.seeded import SeededModel
from brain.memory import Account
from brain.tick import Tick
from compiled.llama import LlamaConfig, weight_shapes
from compiled.matrix import dequantize, part


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """For one thread there are no parallel regions to count."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SMOLLM2 = LlamaConfig(49152, 576, 1536, 2, 9, 3, 64, 1e-5, 1e5, 8192, None, True)
"""SmolLM2-135M, but for its depth: layers are one region, so two show what thirty are made of."""
WIDE = replace(SMOLLM2, hidden_size=1152, intermediate_size=3072)

SYNCING = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
"""Operators that wait for the device and bring a number to the host."""


@dataclass(frozen=True)
class Structure:
    """What one call of a graph runs."""

    kernels: int  # compiled loop nests and library calls
    regions: int  # places where threads are woken and waited for

    def __add__(self, other: "Structure") -> "Structure":
        return Structure(self.kernels + other.kernels, self.regions + other.regions)


NOTHING = Structure(0, 0)
REGION = re.compile(r"#pragma omp parallel")
LOOPS = re.compile(r"^(\w+) = async_compile\.cpp_pybinding\(.*?r'''(.*?)'''\)", re.M | re.S)
LIBRARY = ("extern_kernels.", "torch.ops.", "aten.")


def structures(source: str) -> dict[str, Structure]:
    """What the generated program of a graph runs in its ``call``, and in every function that it
    calls once for each layer.
    """
    regions = {name: len(REGION.findall(code)) for name, code in LOOPS.findall(source)}
    bodies = {
        node.name: node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and (node.name == "call" or "subgraph" in node.name)
    }

    def run_by(name: str) -> Structure:
        total = NOTHING
        for node in ast.walk(bodies[name]):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in regions:
                total += Structure(1, regions[called])
            elif called.startswith(LIBRARY):
                total += Structure(1, 1)  # a library may wake threads too
            elif called in bodies:
                total += run_by(called)
        return total

    return {name: run_by(name) for name in bodies}


@dataclass(frozen=True)
class Watched:
    """A brain whose graphs were compiled under watch."""

    brain: Brain
    graphs: dict[str, dict[str, Structure]]  # by the name of the graph

    def of(self, prefix: str) -> dict[str, Structure]:
        """The structures of the one graph whose name begins like this."""
        (found,) = [told for name, told in self.graphs.items() if name.startswith(prefix)]
        return found


def watched(
    config: LlamaConfig, *, capacity: int = 1024, dtype: str = "float32", native: bool = True
) -> Watched:
    """A captured brain of random weights that has begun to tick in a full memory."""
    overrides = ["engine=compiled", "device=cpu", f"dtype={dtype}", f"capacity={capacity}"]
    overrides.append(f"engine.native={native}")
    b = filled(config, capacity, [*overrides, f"engine.smallest_bucket={capacity}"])
    emitted: list[str] = []
    with mock.patch.object(GraphLowering, "save_output_code", emitted.append):
        b.tick()
    graphs = dict(zip(b.graphs.captured, map(structures, emitted), strict=True))
    return Watched(b, graphs)


def filled(config: LlamaConfig, capacity: int, overrides: list[str]) -> Brain:
    """A brain of random weights whose memory is full."""
    settings = settings_of(compose_conf(overrides))
    model = SeededModel("guarded", config, seed=3)
    b = Brain(model.checkpoint(settings.dtype, settings.device), settings)
    # As a prime of so many tokens would leave it, without reading them.
    b.state.valid.fill_(True)
    b.state.token_id.fill_(7)
    b.state.position.copy_(torch.arange(capacity))
    b.cursor.token.fill_(7)
    b.cursor.position.fill_(capacity - 1)
    b.memory.account = Account(capacity, capacity, 0, capacity - 1)
    return b


def uncaptured(config: LlamaConfig = SMOLLM2, *, capacity: int = 1024) -> Brain:
    """A native brain that has begun to tick in a full memory."""
    overrides = ["engine=native", "device=cpu", "dtype=float32", f"capacity={capacity}"]
    b = filled(config, capacity, overrides)
    b.tick()
    return b


@pytest.fixture(scope="module")
def native(two_threads: None) -> Brain:
    return uncaptured()


@pytest.fixture(scope="module")
def smollm2(two_threads: None) -> Watched:
    return watched(SMOLLM2)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def guarded(request: pytest.FixtureRequest, two_threads: None) -> Watched:
    """With the operator, as a CPU ticks."""
    if request.param == "bfloat16":
        return watched(SMOLLM2, dtype="bfloat16")
    shared: Watched = request.getfixturevalue("smollm2")
    return shared


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def layered(request: pytest.FixtureRequest, two_threads: None) -> Watched:
    """With the layers as Inductor makes them."""
    return watched(SMOLLM2, dtype=request.param, native=False)


@pytest.fixture(params=["smollm2", "toy"])
def ticking(request: pytest.FixtureRequest) -> Iterator[Brain]:
    """A captured brain that has been ticking, and owes no token: all its text has been asked for.

    Graphs are compiled for a number of threads.
    """
    before = torch.get_num_threads()
    if request.param == "smollm2":
        shared: Watched = request.getfixturevalue("smollm2")
        b = shared.brain
        torch.set_num_threads(2)
    else:
        b = request.getfixturevalue("warm_brain")
        torch.set_num_threads(1)
        b.prime([7] * 30)
    _ = b.tick().text
    yield b
    torch.set_num_threads(before)


# Kernels and parallel regions ---------------------------------------------------------------------


def test_a_step_is_two_operators_and_four_kernels(guarded: Watched) -> None:
    """Before the layers one for embedding, angles and mask. After the draw one selection, which the
    policy needs, cuts the rest in two.
    """
    told = guarded.of("step")
    assert list(told) == ["call"]
    assert told["call"].kernels <= 6
    assert told["call"].regions <= 13  # the operators' own are two


def test_a_layer_is_one_kernel_and_one_parallel_region(layered: Watched) -> None:
    """At a hundred microseconds a layer, every further wake-up of the threads is felt: thirty
    layers make thirty of it.
    """
    told = layered.of("step")
    (layer,) = [s for name, s in told.items() if name != "call"]  # one function for all layers
    assert layer.kernels == 1
    assert layer.regions <= 1


def test_a_step_is_its_layers_and_a_handful_of_kernels(layered: Watched) -> None:
    """Before the layers one for embedding, angles and mask; between two of them one, of one thread,
    that puts the new row beside those of the layers before. After them two selections and a running
    sum cut the rest in pieces: those the sampler and the policy need, and what lies between.
    """
    told, layers = layered.of("step"), layered.brain.checkpoint.config.num_layers
    (layer,) = [s for name, s in told.items() if name != "call"]
    around = Structure(
        told["call"].kernels - layers * layer.kernels, told["call"].regions - layers * layer.regions
    )
    assert around.kernels <= layers - 1 + 7
    assert around.regions <= 17


def test_a_patch_is_one_kernel(guarded: Watched) -> None:
    """All columns, keys and values of a row: two blades of one knife."""
    (told,) = guarded.of("patch").values()
    assert told.kernels == 1
    assert told.regions <= 3


def test_the_count_finds_kernels_regions_and_layers() -> None:
    """The check can fail."""
    source = """
one = async_compile.cpp_pybinding(['float*'], r'''
    #pragma omp parallel num_threads(2)
    #pragma omp for
''')
two = async_compile.cpp_pybinding(['float*'], r'''  for (;;) ''')
def repeated_subgraph0(args):
    one(buf0)
    extern_kernels.mm(buf0, buf1, out=buf2)
class Runner:
    def call(self, args):
        two(buf0)
        buf1 = repeated_subgraph0([buf0])
        buf2 = repeated_subgraph0([buf1])
        torch.ops.aten.topk.default(buf2, 3)
"""
    assert structures(source) == {
        "repeated_subgraph0": Structure(2, 2),
        "call": Structure(6, 5),
    }


# Bytes --------------------------------------------------------------------------------------------


def allocated(b: Brain, run: Callable[[], object]) -> list[int]:
    """Sizes in bytes of everything that was allocated in a run."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def tick_bytes(b: Brain) -> int:
    """Bytes of all allocations of one tick."""
    return sum(allocated(b, b.tick))


def test_a_tick_allocates_nothing_in_proportion_to_the_cache(smollm2: Watched) -> None:
    """What may grow with the capacity are scores, one number per head, and columns, one per row:
    for each further slot, less than half of what one layer keeps there as keys.
    """
    larger = watched(SMOLLM2, capacity=2048)
    slots = larger.brain.capacity - smollm2.brain.capacity
    keys = smollm2.brain.state.keys[0].nbytes / smollm2.brain.capacity
    assert (tick_bytes(larger.brain) - tick_bytes(smollm2.brain)) / slots < keys / 2
    b = smollm2.brain
    assert sum(allocated(b, lambda: b.state.keys[0].clone())) / b.capacity >= keys  # it can fail


def test_a_tick_allocates_nothing_in_proportion_to_the_weights(smollm2: Watched) -> None:
    """A wider model has four times the weights; activations may double. A hundredth of the weights
    that were added is far more than those, and far less than any copy of one matrix.
    """
    wider = watched(WIDE)
    added = weight_bytes(WIDE) - weight_bytes(SMOLLM2)
    grown = tick_bytes(wider.brain) - tick_bytes(smollm2.brain)
    assert grown < added / 100
    smallest = dequantize(part(wider.brain.checkpoint.weights.attention_out, 0)).nbytes
    assert smallest > added / 100


def test_an_uncaptured_tick_allocates_nothing_in_proportion_to_cache_or_weights(
    native: Brain,
) -> None:
    """Several times the columns of a captured one, for want of a compiler that fuses: for each
    further slot, less than what one layer keeps there as keys and values.
    """
    larger, wider = uncaptured(capacity=2048), uncaptured(WIDE)
    rows = (native.state.keys[0].nbytes + native.state.values[0].nbytes) / native.capacity
    grown = tick_bytes(larger) - tick_bytes(native)
    assert grown / (larger.capacity - native.capacity) < rows
    added = weight_bytes(WIDE) - weight_bytes(SMOLLM2)
    assert tick_bytes(wider) - tick_bytes(native) < added / 100


def weight_bytes(config: LlamaConfig) -> int:
    """Of the matrices of all layers, in float32."""
    matrices = ("qkv", "attention_out", "gate_up", "down")
    shapes = weight_shapes(config)
    return sum(4 * torch.Size(shapes[name]).numel() for name in matrices)


# Compilations and waiting -------------------------------------------------------------------------


def compilations() -> Counter[str]:
    counters = torch._dynamo.utils.counters
    return Counter(
        graphs=counters["stats"]["unique_graphs"], breaks=sum(counters["graph_break"].values())
    )


def test_a_tick_is_two_graphs_compiled_once(ticking: Brain) -> None:
    before = compilations()
    launched: list[str] = []

    @contextmanager
    def noticed(name: str) -> Iterator[None]:
        launched.append(name)
        yield

    ticking.graphs.ranges = noticed
    try:
        for _ in range(12):
            ticking.tick()
    finally:
        ticking.graphs.ranges = contextlib.nullcontext
    assert compilations() == before
    graphs = [name for name in launched if name in ticking.graphs.captured]
    assert len(set(graphs)) == 2
    assert graphs == graphs[:2] * 12
    assert {ticking.graphs.captured[name].compilations for name in graphs} == {1}


def test_an_uncaptured_tick_is_few_calls(native: Brain) -> None:
    """Each of PyTorch's costs about as much as a hundredth of the fastest reads."""
    before = compilations()
    with torch.profiler.profile() as profile:
        native.tick()
    calls = [event for event in profile.events() if event.cpu_parent is None]
    assert 50 < len(calls) <= 130
    assert compilations() == before


def operators(run: Callable[[], object]) -> set[str]:
    with torch.profiler.profile() as profile:
        run()
    return {event.name() for event in profile.profiler.kineto_results.events()}


def test_a_tick_waits_for_nothing(ticking: Brain) -> None:
    ticks: list[Tick] = []
    used = operators(lambda: ticks.extend(ticking.tick() for _ in range(4)))
    assert "aten::topk" in used  # the profiler saw the ticks
    assert not used & SYNCING
    assert operators(lambda: ticks[0].token) & SYNCING  # the check can fail
