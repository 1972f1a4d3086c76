"""The operators for a tick's choice and patch on a GPU, beside their twins in PyTorch.

As in ``test_read_cuda.py``: without a GPU the kernels run on Triton's interpreter, in a process of
its own, and are compiled as well, for three generations of GPUs.
"""

import contextlib
import gc
import importlib.util
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from captured_graphs import aliased_inputs, mutated_inputs
from compiled.capture import Graph
from compiled.choose import Choice, Eviction, Forced, choose
from compiled.draw_cpu import Drawn, allocate_drawn
from compiled.finite import not_finite
from compiled.llama import LlamaConfig
from compiled.patch import patch
from compiled.philox import uniform
from compiled.plan import Plan, new_rows
from compiled.read import Reading
from compiled.sample import (
    Sampling,
    SamplingMethod,
    candidates,
    penalize,
    sample,
    seen_tokens,
    surprises,
)
from compiled.score import IN_TENSORS, Brightness, Culling, Novelty
from compiled.state import NOWHERE, Cursor, State, allocate_cursor, allocate_state
from toys import (
    UPDATED_BY_TICKS,
    digest,
    sampling_of,
    toy_config,
    toy_cursor,
    toy_plan,
    toy_state,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from compiled import kernel_launch, tick_cuda
from compiled.kernel_launch import INTERPRETED, Launch, start
from compiled.tick_cuda import Method, Steps, steps
from compiled_kernels import SHARED, compiled_for
from interpreted_kernels import DEVICE, KernelTests

ODD = [0.0, -0.0, 1.0, 1.0, -3.5, 1e30, math.nan, math.inf, -math.inf]

on_a_device = KernelTests()


def there(held: Any) -> Any:
    """Tensors, or tuples and dictionaries of them, on the device of the kernels."""
    if isinstance(held, Tensor):
        return held.to(DEVICE)
    if isinstance(held, dict):
        return {name: there(one) for name, one in held.items()}
    if hasattr(held, "_fields"):
        return type(held)(*map(there, held))
    return tuple(map(there, held))


def copied(state: State, cursor: Cursor) -> tuple[State, Cursor]:
    return State(*map(Tensor.clone, state)), Cursor(*map(Tensor.clone, cursor))


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that are started within, by name."""
    started: list[str] = []

    def counting(launch: Launch, *, overlaps: bool) -> None:
        started.append(launch.kernel.__name__)
        start(launch, overlaps=overlaps)

    with monkeypatch.context() as patched:
        patched.setattr(kernel_launch, "start", counting)
        yield started


def memory(capacity: int, seed: int, *, full: float = 0.6, dtype: Any = torch.float32) -> State:
    """Rows at positions in no order, some of them pinned; garbage where there is no row, NaN and
    a position that protects nothing among it.
    """
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(capacity, generator=generator) < full
    places = torch.randperm(3 * capacity, generator=generator)[:capacity]
    state = toy_state(toy_config(), capacity, {}, seed=seed)
    columns = {
        "valid": valid,
        "position": torch.where(valid, places, 1),
        "pinned": torch.rand(capacity, generator=generator) < 0.1,
        "brightness": torch.where(valid, state.brightness, math.nan),
    }
    cache = {name: getattr(state, name).to(dtype) for name in ("keys", "values")}
    cache["keys"][:, :, ~valid] = math.nan
    moved: State = there(state._replace(**columns, **cache))
    return moved


def plain_patch(state: State, cursor: Cursor, plan: Plan) -> None:
    raise AssertionError("the twin was called")


def bound(state: State, vocab: int = 40) -> Steps:
    return steps(vocab, state, plain_patch)


# The draw ----------------------------------------------------------------------------------------


def is_close_call(
    logits: Tensor, seen: Tensor, tick: Tensor, method: SamplingMethod, sampling: Sampling
) -> bool:
    """Whether rounding decides: two candidates within a few units in the last place, or one at the
    edge of a filter.
    """
    penalised = penalize(logits, seen, sampling.repetition_penalty)
    if method.greedy:
        best = penalised.topk(min(2, len(logits))).values
        return bool(best[0] - best[-1] < 1e-5)
    scores, ids = candidates(penalised, method, sampling)
    noise = -torch.log(-torch.log(uniform(sampling.key, tick, ids)))
    best = (scores.double() + noise).topk(min(2, len(ids))).values
    whole = (penalised / sampling.temperature).sort(descending=True).values
    probabilities = whole[: method.top_k or None].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    edges = (before - sampling.top_p, probabilities / probabilities[0] - sampling.min_p)
    at_an_edge = any(bool((edge.abs() < 1e-5).any()) for edge in edges)
    cut = whole[method.top_k - 1 : method.top_k + 1] if method.top_k else whole[:1]
    tied = len(cut) > 1 and bool(cut[0] - cut[1] < 1e-5)
    return at_an_edge or tied or (len(best) > 1 and bool(best[0] - best[1] < 1e-5))


def assert_measured(told: Drawn, logits: Tensor) -> None:
    """The surprise of what was drawn, and the extremes. Of vocabularies of thousands float32 sums
    differ in their last bits.
    """
    token = told.token.cpu()
    expected = surprises(logits, token)
    torch.testing.assert_close(told.surprise.cpu(), expected, rtol=1e-5, atol=2e-6, equal_nan=True)
    extremes = torch.stack([logits.amin(-1), logits.amax(-1)], -1)
    torch.testing.assert_close(told.extremes.cpu(), extremes, rtol=0, atol=0, equal_nan=True)


GREEDY, FIVE = SamplingMethod(greedy=True), SamplingMethod(top_k=5, nucleus=False)
CASES = {
    "greedy": (GREEDY, sampling_of(repetition_penalty=3.0)),
    "one of one": (SamplingMethod(top_k=1), sampling_of(0.5, repetition_penalty=0.3)),
    "top-k": (FIVE, sampling_of(2.5, seed=1 << 63)),
    "top-p": (SamplingMethod(top_k=5), sampling_of(1.3, 0.5, seed=5)),
    "min-p": (FIVE, sampling_of(1.3, 1.0, 0.97, seed=(7 << 32) + 1)),
    "both": (SamplingMethod(top_k=6), sampling_of(0.7, 0.8, 0.1, 1.5, seed=3)),
    "the most": (SamplingMethod(top_k=64), sampling_of(1.0, 0.9, 0.1, 1.2, seed=3)),
}


@on_a_device
@pytest.mark.parametrize("case", CASES)
def test_it_draws_what_its_twin_draws(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From pieces of the vocabulary, the last of them cut short; every time of other logits. A
    token that is forced is told as such.
    """
    method, sampling = CASES[case]
    monkeypatch.setattr(tick_cuda, "_VOCABULARY_PIECE", 64)
    generator, vocab = torch.Generator().manual_seed(3), 150
    state = memory(1030 if method.greedy else 100, 4)
    ids = torch.randint(0, 70, state.valid.shape, generator=generator)
    ids[~state.valid.cpu()] = NOWHERE
    state = state._replace(token_id=there(ids))
    draw, compared = bound(state, vocab).draw, 0
    number = 3 if method.top_k == 64 else 6
    for count in range(number):
        logits = 1.5 * torch.randn(1, vocab, generator=generator)
        token = torch.randint(0, vocab, (1,), generator=generator)
        logits[0, token] = logits.max() + 0.1  # it will be missed if it is not penalised
        tick = torch.tensor(count << 31)
        seen = seen_tokens(vocab, torch.where(ids < 0, token, ids), state.valid.cpu(), token)
        forced = 77 if count == 1 else -1
        asked = there((logits, state, token, tick, torch.tensor([forced])))
        told = draw(*asked, method, there(sampling))
        assert_measured(told, logits)
        if forced >= 0:
            assert told.token.tolist() == [forced]
        elif not is_close_call(logits[0], seen, tick, method, sampling):
            assert told.token.tolist() == sample(logits[0], seen, tick, method, sampling).tolist()
            compared += 1
    assert compared > number // 2


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the vocabulary, for speed."""
    monkeypatch.setattr(tick_cuda, "_VOCABULARY_PIECE", 64)


@on_a_device
@pytest.mark.usefixtures("small_pieces")
def test_of_equal_logits_the_lower_token_is_likeliest() -> None:
    """As for argmax; also between pieces of the vocabulary, and of both zeros."""
    state = there(toy_state(toy_config(), 4, {}))
    draw = bound(state, 500).draw
    for low, high in ((3, 499), (17, 18)):
        for numbers in ((9.0, 9.0), (-0.0, 0.0)):
            logits = torch.full((1, 500), -1.0)
            logits[0, low], logits[0, high] = numbers
            told = drawn(draw, state, logits, SamplingMethod(greedy=True))
            assert told.token.tolist() == [low]


def drawn(draw: Any, state: State, logits: Tensor, method: SamplingMethod) -> Drawn:
    told: Drawn = draw(
        there(logits),
        state,
        there(torch.zeros(1, dtype=torch.int64)),
        there(torch.tensor(5)),
        there(torch.tensor([-1])),
        method,
        there(sampling_of(top_p=0.9)),
    )
    return told


@on_a_device
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.usefixtures("small_pieces")
def test_what_is_not_finite_is_told(wrong: float, greedy: bool) -> None:
    state = there(toy_state(toy_config(), 4, {0: 1}))
    logits = torch.randn(1, 250)
    logits[0, 217] = wrong
    told = drawn(bound(state, 250).draw, state, logits, SamplingMethod(greedy, 5, nucleus=True))
    assert 0 <= int(told.token) < 250
    if greedy and not wrong < 0:  # the greatest of all is NaN
        assert int(told.token) == 217
    assert_measured(told, logits)
    assert not told.extremes.isfinite().all()


@on_a_device
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.usefixtures("small_pieces")
def test_of_nothing_but_that_some_token_is_drawn(wrong: float, greedy: bool) -> None:
    state = there(toy_state(toy_config(), 4, {0: 1}))
    logits = torch.full((1, 250), wrong)
    told = drawn(bound(state, 250).draw, state, logits, SamplingMethod(greedy, 5, nucleus=True))
    assert told.token.tolist() == [0]
    assert told.surprise.isnan().all()
    assert_measured(told, logits)


# What to forget, and what is not finite ----------------------------------------------------------


def scores_of(capacity: int, seed: int) -> Tensor:
    """Many of them equal, and some of them nothing one could order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(ODD), (capacity,), generator=generator)
    numbers = torch.randint(0, 4, (capacity,), generator=generator) / 2
    few = torch.rand(capacity, generator=generator) < seed % 4 / 3
    return torch.where(few, torch.tensor(ODD)[chosen], numbers)


@on_a_device
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    capacity=st.sampled_from([1, 14, 14, 1024, 2500]),
    full=st.sampled_from([0.0, 0.3, 1.0]),
    short=st.integers(-2, 2),
    recent=st.integers(0, 20),
    at_once=st.sampled_from([False, False, False, True]),
    seed=st.integers(0, 999),
)
def test_what_is_forgotten(
    capacity: int, full: float, short: int, recent: int, at_once: bool, seed: int
) -> None:
    """At, above and below the target, and where nothing is wanted."""
    state = memory(capacity, seed, full=full)
    target = max(0, int(state.valid.sum()) + short)
    culling = Culling(target, sinks=3, recent=recent, at_once=at_once)
    arguments = (state, there(toy_cursor(3 * capacity)), there(scores_of(capacity, seed)), culling)
    ours = bound(state).scoring.decide_cull(*arguments)
    for mine, twin in zip(ours, IN_TENSORS.decide_cull(*arguments), strict=True):
        assert mine.dtype == twin.dtype
        assert torch.equal(mine, twin)


@on_a_device
@pytest.mark.parametrize("worst", [math.inf, math.nan, -0.0])
def test_equal_scores_far_apart(worst: float) -> None:
    """The earliest positions go, in whatever piece; a row may go though its score is infinite."""
    state = there(toy_state(toy_config(), 3000, {s: 5000 - s for s in range(3000)}))
    scores = torch.full((3000,), worst)
    if worst == 0:
        scores[2899] = 0.0  # which is no more than the other zero
    arguments = (state, there(toy_cursor(9000)), there(scores), Culling(2000, sinks=2100))
    cull, culled = bound(state).scoring.decide_cull(*arguments)
    assert culled.tolist() == [2100, 2101]
    assert cull.nonzero()[:, 0].tolist() == [2899, 2900]
    assert torch.equal(cull, IN_TENSORS.decide_cull(*arguments)[0])


@on_a_device
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    sizes=st.lists(st.sampled_from([1, 2, 14, 1024, 1025, 2500]), min_size=1, max_size=5),
    broken=st.dictionaries(
        st.integers(0, 4), st.tuples(st.integers(0, 2499), st.sampled_from(ODD)), max_size=3
    ),
)
def test_what_is_not_finite(
    dtype: torch.dtype, sizes: list[int], broken: dict[int, tuple[int, float]]
) -> None:
    parts = [
        torch.ones(size, dtype=dtype if i % 2 else torch.float32) for i, size in enumerate(sizes)
    ]
    for number, (at, value) in broken.items():
        if number < len(parts):
            parts[number][at % len(parts[number])] = value
    held = [part.to(DEVICE) for part in parts]
    state = there(toy_state(toy_config(), 4, {}))
    assert bound(state).scoring.not_finite(*held).equal(not_finite(*held))


@on_a_device
def test_parts_in_pieces_and_too_many_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than there are flags for the twin tells."""
    state = there(toy_state(toy_config(), 4, {}))
    parts = [torch.ones(3, 4, device=DEVICE).t() for _ in range(3)]
    parts[2][1, 1] = math.nan
    scoring = bound(state).scoring
    assert int(scoring.not_finite(*parts)) == 4
    monkeypatch.setattr(tick_cuda, "_MOST_FLAGS", 2)
    monkeypatch.setattr(tick_cuda, "finite_launches", None)
    assert int(scoring.not_finite(*parts)) == 4


# The patch ---------------------------------------------------------------------------------------


def plan_of(state: State, cursor: Cursor, length: int, cull: list[int], *, broken: int = 0) -> Plan:
    at_hand = State(*map(Tensor.cpu, state)), Cursor(*map(Tensor.cpu, cursor))
    plan = toy_plan(*at_hand, 1, 0)
    going = torch.zeros(state.capacity, dtype=torch.bool)
    going[cull] = True
    wanted = plan._replace(
        length=torch.tensor(length),
        cull=going,
        updates={name: getattr(state, name).flip(0) for name in UPDATED_BY_TICKS},
        cursor=toy_cursor(10, 7)._replace(tick=torch.tensor(1 << 40)),
        not_finite=torch.tensor(broken),
    )
    moved: Plan = there(wanted)
    return moved


@on_a_device
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    capacity=st.sampled_from([1, 14, 14, 1024, 2500]),
    full=st.sampled_from([0.0, 0.5, 1.0]),
    length=st.integers(0, 1),
    cull=st.lists(st.integers(0, 2499), max_size=2),
    broken=st.sampled_from([0, 0, 0, 5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_the_patch(
    capacity: int,
    full: float,
    length: int,
    cull: list[int],
    broken: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Byte by byte what its twin writes, wherever it writes; nothing where it must not."""
    state = memory(capacity, seed, full=full, dtype=dtype)
    cursor = there(toy_cursor(9))
    going = [slot % capacity for slot in cull]
    plan = plan_of(state, cursor, length, going, broken=broken)
    before = digest(*state, *cursor)
    twin, twin_cursor = copied(state, cursor)
    bound(state).patch(state, cursor, plan)
    patch(twin, twin_cursor, plan)
    for ours, theirs in zip((*state, *cursor), (*twin, *twin_cursor), strict=True):
        assert digest(ours) == digest(theirs)
    assert (digest(*state, *cursor) == before) == (broken != 0)


@on_a_device
def test_a_full_memory_keeps_its_rows() -> None:
    """Nothing is free and no row is new: of the row in slot 0 only what a tick updates changes."""
    state = there(toy_state(toy_config(), 14, {s: s for s in range(14)}))
    cursor = there(toy_cursor(20))
    kept = [name for name in State._fields if name not in UPDATED_BY_TICKS]
    before = digest(*(getattr(state, name) for name in kept))
    plan = plan_of(state, cursor, 0, [])
    bound(state).patch(state, cursor, plan)
    assert digest(*(getattr(state, name) for name in kept)) == before
    for name in UPDATED_BY_TICKS:
        assert torch.equal(getattr(state, name), plan.updates[name])
    assert int(cursor.position) == 10


@on_a_device
def test_plans_of_several_ticks_are_for_the_twin() -> None:
    state = there(toy_state(toy_config(), 14, {}))
    cursor = there(toy_cursor(9))
    called = []
    ours = steps(40, state, lambda *asked: called.append(asked))
    one = plan_of(state, cursor, 1, [])
    plan = one._replace(keys=one.keys.expand(-1, -1, 3, -1))
    before = digest(*state, *cursor)
    ours.patch(state, cursor, plan)
    assert [asked[2] is plan for asked in called] == [True]
    assert digest(*state, *cursor) == before


def called_in(source: str) -> list[str]:
    """What the code that Inductor made does beside looking at its arguments and giving them up."""
    body = source.split("def call(")[1].split("return (")[0].splitlines()[1:]
    quiet = (
        "#",
        "args.clear()",
        "arg",
        "assert_",
        "del ",
        "stream",
        "raw_stream",
        "with torch.cuda.",
        "torch.cuda.set_device(",
    )
    lines = [line.strip() for line in body]
    return [line for line in lines if line and not line.startswith(quiet)]


@on_a_device
def test_a_captured_patch_writes_in_place() -> None:
    """One call of the operator and nothing beside it: no clone and no copy of anything, and every
    address as it was.
    """
    from torch._inductor.utils import run_and_get_code

    state, cursor = memory(70, 3), there(toy_cursor(9))
    twin, twin_cursor = copied(state, cursor)
    ours = bound(state)
    plans = [plan_of(state, cursor, 1, [4]), plan_of(state, cursor, 1, [5, 6])]
    for tensor in (*state, *cursor):
        torch._dynamo.mark_static_address(tensor)
    graph = Graph("patch tick W=1", ours.patch, DEVICE)
    where = [tensor.data_ptr() for tensor in (*state, *cursor)]
    _, sources = run_and_get_code(graph, state, cursor, plans[0])
    graph(state, cursor, plans[1])
    assert len(sources) == 1
    does = called_in(sources[0])
    assert len(does) == 1, does
    assert does[0].startswith("torch.ops.positronic_brain.patch_cuda.default([arg"), does
    for plan in plans:
        patch(twin, twin_cursor, plan)
    assert digest(*state, *cursor) == digest(*twin, *twin_cursor)
    assert [tensor.data_ptr() for tensor in (*state, *cursor)] == where
    everything = {f"L_arguments_0_{name}" for name in state._fields}
    everything |= {f"L_arguments_1_{name}" for name in cursor._fields}
    assert mutated_inputs(graph.modules[0]) == everything


@on_a_device
def test_a_clone_in_a_captured_patch_would_be_seen() -> None:
    from torch._inductor.utils import run_and_get_code

    state, cursor = memory(14, 3), there(toy_cursor(9))
    ours = bound(state)

    def cloning(held: State, at: Cursor, plan: Plan) -> None:
        ours.patch(held._replace(keys=held.keys.clone()), at, plan)

    graph = Graph("cloning", cloning, DEVICE)
    _, sources = run_and_get_code(graph, state, cursor, plan_of(state, cursor, 1, []))
    assert len(called_in(sources[0])) > 1
    assert "L_arguments_0_keys" not in mutated_inputs(graph.modules[0])


# Whole ticks -------------------------------------------------------------------------------------

METHOD = SamplingMethod(top_k=5)
EVICTION = Eviction(
    Brightness(), Novelty(), Culling(9, sinks=2, recent=3), lambda state, look: state.brightness
)


def reading(state: State, seed: int) -> Reading:
    """Noise in place of what a model reads."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    layers, kv_heads, capacity, head_dim = state.keys.shape
    row = (layers, kv_heads, 1, head_dim)
    dtype = state.keys.dtype
    return Reading(
        logits=noise(1, 40),
        new_keys=noise(*row, dtype=dtype),
        new_values=noise(*row, dtype=dtype),
        mass=noise(capacity).abs() * state.valid,
        own_mass=noise(1).abs(),
    )


def chosen(ours: Steps | None, state: State, cursor: Cursor, seed: int, forced: int = -1) -> Choice:
    asked = Forced(there(torch.tensor([forced])), there(torch.tensor([2], dtype=torch.uint8)))
    sampling = there(sampling_of(0.9, 0.9, 0.02, 1.2, seed=7))
    given_ = (state, cursor, reading(state, seed), sampling, asked)
    own: dict[str, Any] = {} if ours is None else {"native": ours.draw, "scoring": ours.scoring}
    return choose(*given_, method=METHOD, eviction=EVICTION, **own)


def growing(dtype: torch.dtype = torch.float32) -> tuple[State, Cursor]:
    state = toy_state(toy_config(), 12, {s: 20 - s for s in range(6)})
    state = state._replace(keys=state.keys.to(dtype), values=state.values.to(dtype))
    cursor = toy_cursor(30)._replace(uncommitted=torch.tensor(1))
    moved: tuple[State, Cursor] = there(state), there(cursor)
    return moved


def assert_near(ours: Any, twin: Any) -> None:
    """Float columns differ where surprises do, in the last bits; all else is equal."""
    for mine, theirs in zip(ours, twin, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@on_a_device
def test_ticks_are_those_of_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a memory with room into one that forgets; one of them broken, and one of them forced.
    Every tick is the same nine kernels.
    """
    state, cursor = growing(torch.bfloat16)
    twin, twin_cursor = copied(state, cursor)
    ours, forgotten = bound(state), 0
    for number in range(12):
        forced = 3 if number == 4 else -1
        with counted(monkeypatch) as started:
            choice = chosen(ours, state, cursor, number, forced)
            plan = choice.plan(reading(state, number))
            if number == 6:
                plan = plan._replace(not_finite=plan.not_finite + 2)
            ours.patch(state, cursor, plan)
        assert started == [
            *("mark", "score", "pick"),
            *("rank_rows", "choose_rows"),
            *("find_broken", "join_flags"),
            *("find_free", "carry_out"),
        ]
        theirs = chosen(None, twin, twin_cursor, number, forced)
        planned = theirs.plan(reading(twin, number))
        if number == 6:
            planned = planned._replace(not_finite=planned.not_finite + 2)
        patch(twin, twin_cursor, planned)
        assert choice.token.tolist() == theirs.token.tolist()
        assert torch.equal(choice.cull, theirs.cull)
        assert torch.equal(choice.culled, theirs.culled)
        forgotten += int(choice.cull.sum())
        assert_near((*state, *cursor), (*twin, *twin_cursor))
    assert forgotten > 3
    assert int(state.valid.sum()) == 9


@on_a_device
def test_results_are_fresh_and_scratch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a choice returned stays what it was when others choose with the same scratch, of this
    memory or another; the same choice gives the same bits; nothing of the memory is written (I2).
    """
    state, cursor = growing()
    ours, other = bound(state), bound(state)
    before = digest(*state, *cursor)
    scratch = [room.scratch for room in tick_cuda._rooms.values()]
    where = [tensor.data_ptr() for room in scratch for tensor in room]

    def bits(choice: Choice) -> str:
        return digest(choice.token, choice.surprise, choice.cull, choice.culled, choice.not_finite)

    first = chosen(ours, state, cursor, 1)
    kept = bits(first)
    assert bits(chosen(ours, state, cursor, 2)) != kept
    chosen(other, state, cursor, 3)
    assert bits(first) == kept
    assert bits(chosen(ours, state, cursor, 1)) == kept
    assert digest(*state, *cursor) == before
    assert [tensor.data_ptr() for room in scratch for tensor in room] == where
    assert not any(bool(room.marks.any()) for room in scratch)


@on_a_device
def test_a_captured_choice_writes_nothing() -> None:
    """The operators of a choice alias nothing, and a captured one is what an eager one is."""
    state, cursor = growing()
    ours = bound(state)
    sampling = there(sampling_of(0.9, 0.9, 0.02, 1.2, seed=7))
    asked = Forced(there(torch.tensor([-1])), there(torch.tensor([2], dtype=torch.uint8)))

    def choice(*given_: Any) -> Choice:
        return choose(
            *given_, method=METHOD, eviction=EVICTION, native=ours.draw, scoring=ours.scoring
        )

    graph = Graph("choose", choice, DEVICE)
    before = digest(*state, *cursor)
    for number in range(2):
        captured: Choice = graph(state, cursor, reading(state, number), sampling, asked)
        direct = chosen(ours, state, cursor, number)
        assert captured.token.equal(direct.token)
        assert captured.culled.equal(direct.culled)
        torch.testing.assert_close(captured.surprise, direct.surprise)
    assert digest(*state, *cursor) == before
    if INTERPRETED:  # they are looked at on a CPU
        assert mutated_inputs(graph.modules[0]) == set()
        assert aliased_inputs(graph.modules[0]) == 0
    for name in ("draw_cuda", "cull_cuda", "not_finite_cuda"):
        schema = getattr(torch.ops.positronic_brain, name).default._schema
        assert not any(argument.alias_info for argument in (*schema.arguments, *schema.returns))
    assert graph.compilations == 1


@on_a_device
def test_operators_that_pytorch_may_compile() -> None:
    """Schemas, fake results and aliasing are what they are declared to be."""
    state, cursor = growing()
    ours = bound(state)
    number = ours.draw.args[1].number  # type: ignore[attr-defined]  # a partial
    operators = tick_cuda._registered()
    plan = tick_cuda._listed(chosen(ours, state, cursor, 1).plan(reading(state, 1)))
    one, tests = there(torch.tensor([3])), ("test_schema", "test_faketensor")
    read = [state.token_id, state.valid, one, cursor.tick]
    logits, settings_ = there(torch.randn(1, 40)), [*there(sampling_of())]
    columns = [state.valid, state.pinned, state.position]
    for operator, given_ in (
        (operators.draw, (logits, read, settings_, one, False, 5, True, number)),
        (operators.cull, (columns, cursor.position, state.brightness, 5, 1, 1, number)),
        (operators.not_finite, ([logits, state.keys], number)),
        (operators.patch, ([*state], [*cursor], plan, number)),
    ):
        torch.library.opcheck(operator, given_, test_utils=tests)


@on_a_device
def test_scratch_goes_with_the_last_that_could_use_it() -> None:
    state, _ = growing()
    gc.collect()  # of other memories
    before = len(tick_cuda._rooms)
    ours = bound(state)
    number = ours.draw.args[1].number  # type: ignore[attr-defined]  # a partial
    watched = weakref.ref(tick_cuda._rooms[number])
    draw = ours.draw
    del ours
    gc.collect()
    assert len(tick_cuda._rooms) == before + 1
    graph = Graph("draw", draw, DEVICE)
    drawn(graph, state, torch.randn(1, 40), SamplingMethod(greedy=True))
    del draw, graph
    gc.collect()
    assert (watched(), len(tick_cuda._rooms)) == (None, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_ticks_are_those_of_the_twin() -> None:
    """As CUDA graphs, choice and patch, with kernels that overlap where the device has that."""
    state, cursor = growing(torch.bfloat16)
    twin, twin_cursor = copied(state, cursor)
    ours = bound(state)
    sampling = there(sampling_of(0.9, 0.9, 0.02, 1.2, seed=7))
    asked = Forced(there(torch.tensor([-1])), there(torch.tensor([2], dtype=torch.uint8)))
    for tensor in (*state, *cursor, *sampling, *asked):
        torch._dynamo.mark_static_address(tensor)

    def choice(*given_: Any) -> Choice:
        return choose(
            *given_, method=METHOD, eviction=EVICTION, native=ours.draw, scoring=ours.scoring
        )

    choosing, patching = Graph("choose", choice, DEVICE), Graph("patch", ours.patch, DEVICE)
    for number in range(12):
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        noise = reading(state, number)
        made: Choice = choosing(state, cursor, noise, sampling, asked)
        token = made.token.tolist()
        patching(state, cursor, made.plan(noise))
        theirs = chosen(None, twin, twin_cursor, number)
        patch(twin, twin_cursor, theirs.plan(reading(twin, number)))
        assert token == theirs.token.tolist()
        assert_near((*state, *cursor), (*twin, *twin_cursor))


# On any machine ----------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_every_kernel_on_the_interpreter() -> None:
    on_a_device.pass_interpreted(__file__)


SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e4, 2048)
LLAMA_3_8B = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, 8192)


def described(
    config: LlamaConfig, capacity: int, dtype: torch.dtype, method: Method
) -> dict[str, list[Launch]]:
    """The launches of a tick after its read, by operator, without a byte of the memory."""
    meta = torch.device("meta")
    state, cursor = allocate_state(config, capacity, dtype, meta), allocate_cursor(meta)
    scratch = tick_cuda.allocate_scratch(config.vocab_size, capacity, meta)
    logits = torch.empty(1, config.vocab_size, device=meta)
    one = torch.empty(1, dtype=torch.int64, device=meta)
    number = torch.empty((), device=meta)
    sampling = Sampling(number, number, number, number, torch.empty(2, dtype=torch.int64))
    told = Drawn(*allocate_drawn(logits))
    columns = [state.valid, state.pinned, state.position]
    shape = (config.num_layers, config.num_kv_heads, 1, config.head_dim)
    row = torch.empty(shape, dtype=dtype, device=meta)
    updates = {name: getattr(state, name) for name in tick_cuda.UPDATED}
    plan = Plan(row, row, new_rows(1, meta), one, state.valid, updates, cursor, one)
    made = tick_cuda._allocated_cull(columns)
    draw = (logits, [state.token_id, state.valid, one, one], sampling, one, told, method)
    parts = [told.surprise, row, row, told.extremes, state.brightness]
    return {
        "draw": tick_cuda.draw_launches(scratch, *draw),
        "cull": tick_cuda.cull_launches(
            scratch, columns, one, state.brightness, made, Culling(1000)
        ),
        "not finite": tick_cuda.finite_launches(scratch, parts, one),
        "patch": tick_cuda.patch_launches(scratch, state, cursor, tick_cuda._listed(plan)),
    }


FORMS = [
    ("smollm2", SMOLLM2, 1024, torch.bfloat16, Method(False, 50, nucleus=True), 90),
    ("llama-3-8b", LLAMA_3_8B, 1_400_000, torch.float32, Method(False, 64, nucleus=False), 80),
    ("greedy", SMOLLM2, 200, torch.float16, Method(True, 1, nucleus=False), 80),
    ("smollm2", SMOLLM2, 300_000, torch.bfloat16, Method(False, 8, nucleus=True), 100),
]


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize(
    ("config", "capacity", "dtype", "method", "capability"),
    [form[1:] for form in FORMS],
    ids=[f"{form[0]} sm_{form[5]}" for form in FORMS],
)
def test_every_kernel_compiles(
    config: LlamaConfig, capacity: int, dtype: torch.dtype, method: Method, capability: int
) -> None:
    """For GPUs that need not be there, without a spilled register."""
    made = described(config, capacity, dtype, method)
    assert {name: len(launches) for name, launches in made.items()} == {
        "draw": 3,
        "cull": 2,
        "not finite": 2,
        "patch": 2,
    }
    for launch in (launch for launches in made.values() for launch in launches):
        kernel, name = compiled_for(launch, capability), launch.kernel.__name__
        assert kernel.stack == 0, name
        assert kernel.shared <= SHARED, name
        if capability >= 90:
            assert "griddepcontrol.wait" in kernel.ptx, name


@pytest.mark.parametrize("size", [1, 1024, 1025, 1 << 18, (1 << 18) + 1, 1_400_000, 16_000_000])
def test_pieces_hold_everything_once(size: int) -> None:
    piece = tick_cuda._piece(size)
    pieces = tick_cuda._pieces(size, piece)
    assert size <= pieces * piece < size + piece
    scratch = tick_cuda.allocate_scratch(40, size, torch.device("meta"))
    assert pieces == len(scratch.free) == len(scratch.counts) == len(scratch.ranks) / 2
    assert pieces <= len(scratch.flags)


def test_methods_that_kernels_know() -> None:
    known = tick_cuda._method_of
    assert known(SamplingMethod(greedy=True, top_k=0), 40) == Method(True, 1, False)
    assert known(SamplingMethod(top_k=1), 40) == Method(True, 1, False)
    assert known(SamplingMethod(top_k=5, nucleus=False), 40) == Method(False, 5, False)
    assert known(SamplingMethod(top_k=64), 65) == Method(False, 64, True)
    assert Method(False, 50, True).width == 64
    for top_k, vocab in ((0, 40), (40, 40), (65, 100)):
        assert known(SamplingMethod(top_k=top_k), vocab) is None
