"""The operator for the layers on a GPU, beside its twin in PyTorch.

Without a GPU the kernels run on Triton's interpreter, in a process of its own: Triton must know of
it before it is imported. What the interpreter lets pass the compiler may refuse, so every kernel is
compiled as well, for three generations of GPUs, which needs none of them.
"""

import dataclasses
import gc
import importlib.util
import re
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from brain import Brain
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.measure.golden.seeded import SeededModel
from captured_graphs import aliased_inputs, mutated_inputs
from compiled.int8 import Int8, quantize
from compiled.llama import LlamaConfig, Weights, weight_shapes
from compiled.read import Reading, read, read_ahead
from compiled.read_cpu import Decoded
from compiled.state import State, allocate_state
from fixture_types import OpenTiny
from toys import EVERYTHING, digest, toy_config, toy_cursor, toy_weights

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from compiled import read_cuda
from compiled.kernel_launch import INTERPRETED, Launch, power_of_two
from compiled.read_cuda import (
    Given,
    allocate_scratch,
    block_of,
    launches,
    operator,
    splits_of,
)
from compiled_kernels import SHARED, compiled_for
from interpreted_kernels import DEVICE, KernelTests

MATRICES = ("embedding", "qkv", "attention_out", "gate_up", "down", "head")
HEADS = ((3, 1), (4, 4), (8, 2), (8, 1), (6, 2))  # groups of 3, 1, 4, 8, 3

on_a_device = KernelTests()


def model(config: LlamaConfig, dtype: torch.dtype, *, int8: bool) -> Weights:
    # Products of some sixty terms: a spread that keeps activations of order 1.
    scaled: dict[str, Any] = {
        name: (1.0 + tensor.float() if name.endswith("norm") else 0.3 * tensor).to(DEVICE, dtype)
        for name, tensor in toy_weights(config)._asdict().items()
        if isinstance(tensor, Tensor) and name != "inverse_frequencies"
    }
    scaled["inverse_frequencies"] = toy_weights(config).inverse_frequencies.to(DEVICE)
    matrices = {name: quantize(scaled[name]) if int8 else scaled[name] for name in MATRICES}
    return Weights(**{**scaled, **matrices})


def memory(config: LlamaConfig, dtype: torch.dtype, valid: Tensor, seed: int) -> State:
    """Rows at positions in no order; hidden slots hold NaN, which must not be seen."""
    state = allocate_state(config, len(valid), dtype, DEVICE)
    generator = torch.Generator().manual_seed(seed)
    for cache in (state.keys, state.values):
        numbers = torch.randn(cache.shape, generator=generator)
        numbers[:, :, ~valid] = float("nan")
        cache.copy_(numbers)
    state.position.copy_(torch.randperm(len(valid), generator=generator))
    state.valid.copy_(valid)
    return state


def exact(weights: Weights, state: State) -> tuple[Weights, State]:
    """The same numbers in float32, and none that is hidden."""
    wide = {
        name: field.float()
        for name, field in weights._asdict().items()
        if isinstance(field, Tensor) and name != "inverse_frequencies"
    }
    cache = {name: getattr(state, name).float().nan_to_num() for name in ("keys", "values")}
    return weights._replace(**wide), state._replace(**cache)


def agrees(ours: Any, truth: Any, live: int, dtype: torch.dtype) -> None:
    """In float32, sums of up to some hundred terms of order 1 in another order, through two layers.
    In 16 bits queries, keys and values are rounded to 2^-9 or 2^-12 and attention's weights again;
    the residual stream and all else stays in float32.
    """
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype]
    most = max(float(truth.mass.abs().amax()), float(truth.own_mass.abs().amax()))
    masses = [mass[:live] if mass.dim() == 2 else mass for mass in (ours.mass, ours.own_mass)]
    assert float(sum(mass.sum() for mass in masses)) == pytest.approx(live, rel=1e-2)
    for name in truth._fields:
        a, b = getattr(ours, name), getattr(truth, name)
        assert a.shape == b.shape, name
        if name in ("new_keys", "new_values"):
            assert a.dtype == dtype
            a, b = a[:, :, :live], b[:, :, :live]
        elif a.dim() == 2:
            a, b = a[:live], b[:live]
        scale = most if name.endswith("mass") else max(1.0, float(b.abs().amax()))
        torch.testing.assert_close(a.float(), b, rtol=0, atol=tolerance * scale, msg=name)


@st.composite
def reads(draw: st.DrawFn) -> dict[str, Any]:
    tokens = draw(st.integers(1, 8))
    slots = draw(st.sampled_from([1, 17, 64, 65, 130]))
    heads, kv_heads = draw(st.sampled_from(HEADS))
    return {
        "config": dataclasses.replace(
            toy_config(heads, kv_heads),
            head_dim=draw(st.sampled_from([8, 20, 64, 128])),
            hidden_size=draw(st.sampled_from([24, 71])),
            intermediate_size=draw(st.sampled_from([20, 37])),
            vocab_size=draw(st.sampled_from([40, 101])),
            **draw(st.sampled_from([{}, EVERYTHING])),
        ),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "int8": draw(st.booleans()),
        "valid": torch.tensor(draw(st.lists(st.booleans(), min_size=slots, max_size=slots))),
        # Behind all rows, or among them: re-read, and as of an old position.
        "positions": [p + draw(st.sampled_from([0, slots + 3])) for p in range(tokens)],
        "length": draw(st.integers(1, tokens)),
        "ahead": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }


@on_a_device
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(reads())
def test_a_read_is_that_of_the_twin(case: dict[str, Any]) -> None:
    """Any heads and sizes, holes, NaN in hidden slots, padding, and nothing of the memory written
    (I1).
    """
    config, dtype, length = case["config"], case["dtype"], case["length"]
    weights = model(config, dtype, int8=case["int8"])
    state = memory(config, dtype, case["valid"], case["seed"])
    decode = operator(config, weights, state, len(case["positions"]))
    wide_weights, wide_state = exact(weights, state)
    generator = torch.Generator().manual_seed(case["seed"])
    count = len(case["positions"])
    ids = torch.randint(0, config.vocab_size, (count,), generator=generator).to(DEVICE)
    before = digest(*state)
    if case["ahead"] and count > 1:
        cursor = toy_cursor(position=case["positions"][0])
        cursor = type(cursor)(*(tensor.to(DEVICE) for tensor in cursor))
        asked = (ids[1:], torch.tensor(length - 1, device=DEVICE))
        ours: Any = read_ahead(
            config, weights, state, cursor, *asked, bucket=len(case["valid"]), decode=decode
        )
        truth: Any = read_ahead(
            config, wide_weights, wide_state, cursor, *asked, bucket=len(case["valid"])
        )
    else:
        given_ = (
            ids,
            torch.tensor(case["positions"], device=DEVICE),
            torch.tensor(length, device=DEVICE),
        )
        ours = read(config, weights, state, *given_, bucket=len(case["valid"]), decode=decode)
        truth = read(config, wide_weights, wide_state, *given_, bucket=len(case["valid"]))
    assert digest(*state) == before
    agrees(ours, truth, length, dtype)


def small(dtype: torch.dtype = torch.float32) -> tuple[LlamaConfig, Weights, State]:
    config = toy_config(4, 2)
    valid = torch.arange(70) % 3 != 0
    return config, model(config, dtype, int8=False), memory(config, dtype, valid, 1)


def one_read(
    config: LlamaConfig, weights: Weights, state: State, decode: Any, token: int, bucket: int
) -> Reading:
    asked = (torch.tensor([token]), torch.tensor([90]), torch.tensor(1))
    return read(
        config, weights, state, *(t.to(DEVICE) for t in asked), bucket=bucket, decode=decode
    )


@on_a_device
def test_results_are_fresh_and_scratch_is_kept() -> None:
    """What a read returned stays what it was when others read with the same scratch, of this memory
    or another; the same read gives the same bits.
    """
    config, weights, state = small()
    decode, other = (operator(config, weights, state, 2) for _ in range(2))
    first = one_read(config, weights, state, decode, 3, 70)
    kept = digest(*first)
    one_read(config, weights, state, decode, 7, 70)
    one_read(config, weights, state, other, 8, 70)
    assert digest(*first) == kept
    again = one_read(config, weights, state, decode, 3, 70)
    assert digest(*again) == kept


@on_a_device
@pytest.mark.parametrize("rows", [0, 1, 20, 32, 33, 64])
def test_the_last_visible_slot_alone_decides_how_sums_are_cut(rows: int) -> None:
    """A larger bucket, whose other slots are empty, changes no bit of any result (I11)."""
    config, weights, state = small()
    state.valid[rows:] = False
    decode = operator(config, weights, state, 1)
    whole = one_read(config, weights, state, decode, 3, 70)
    part = one_read(config, weights, state, decode, 3, max(1, rows))
    for name in whole._fields:
        assert digest(getattr(whole, name)) == digest(getattr(part, name)), name


@on_a_device
def test_a_long_memory_is_read_in_many_splits_of_several_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More splits than are put together at a time, for several tokens, over a bucket that does not
    reach the capacity.
    """
    monkeypatch.setattr(read_cuda, "MOST_SPLITS", 32)
    config, bucket = toy_config(4, 2), 3500
    valid = torch.arange(3600) % 5 != 0
    valid[bucket:] = False
    weights = model(config, torch.bfloat16, int8=False)
    state = memory(config, torch.bfloat16, valid, 2)
    valid[3400:] = False  # 54 blocks, two to a split: the last splits have none
    decode = operator(config, weights, state, 3)
    cursor = toy_cursor(position=4000)
    cursor = type(cursor)(*(tensor.to(DEVICE) for tensor in cursor))
    asked = (torch.tensor([5, 6], device=DEVICE), torch.tensor(2, device=DEVICE))
    ours = read_ahead(config, weights, state, cursor, *asked, bucket=bucket, decode=decode)
    truth = read_ahead(config, *exact(weights, state), cursor, *asked, bucket=bucket)
    agrees(ours, truth, 3, torch.bfloat16)


@on_a_device
def test_many_blocks_make_few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_cuda, "MOST_SPLITS", 2)
    config = toy_config(4, 2)
    valid = torch.arange(400) % 5 != 0
    weights, state = (
        model(config, torch.float32, int8=False),
        memory(config, torch.float32, valid, 2),
    )
    decode = operator(config, weights, state, 1)
    ours = one_read(config, weights, state, decode, 5, 400)
    truth = one_read(config, *exact(weights, state), None, 5, 400)
    agrees(ours, truth, 1, torch.float32)


@on_a_device
@pytest.mark.parametrize(
    ("more", "dtype", "int8"),
    [
        (["qk_norm"], torch.float32, False),
        (["qkv_bias", "rotary_kinds", "attention_scale"], torch.float32, True),
        ([*EVERYTHING], torch.bfloat16, False),
    ],
)
def test_what_a_llama_has_not_is_that_of_the_twin(
    more: list[str], dtype: torch.dtype, int8: bool
) -> None:
    config = dataclasses.replace(toy_config(4, 2), **{key: EVERYTHING[key] for key in more})
    valid = torch.arange(70) % 3 != 0
    weights, state = model(config, dtype, int8=int8), memory(config, dtype, valid, 1)
    decode = operator(config, weights, state, 3)
    ids, positions = torch.tensor([3, 4, 5]), torch.tensor([90, 91, 92])
    given_ = [tensor.to(DEVICE) for tensor in (ids, positions, torch.tensor(3))]
    ours = read(config, weights, state, *given_, bucket=70, decode=decode)
    truth = read(config, *exact(weights, state), *given_, bucket=70)
    agrees(ours, truth, 3, dtype)
    llama = weights._replace(qkv_bias=None, qk_gain=None)
    without = read(toy_config(4, 2), *exact(llama, state), *given_, bucket=70)
    with pytest.raises(AssertionError):
        agrees(ours, without, 3, dtype)


@on_a_device
def test_a_compiler_takes_it_for_one_call() -> None:
    """Captured, with the results of a direct call, and beside them nothing that is written."""
    config, weights, state = small()
    decode = operator(config, weights, state, 1)
    asked = [torch.tensor([3]), torch.tensor([90]), torch.tensor(1)]
    asked = [tensor.to(DEVICE) for tensor in asked]

    def reads(token: Tensor, position: Tensor, length: Tensor) -> Reading:
        return read(config, weights, state, token, position, length, bucket=70, decode=decode)

    captured = torch.compile(reads, fullgraph=True, dynamic=False)
    direct, before = reads(*asked), digest(*state)
    for a, b in zip(captured(*asked), direct, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert digest(*state) == before
    schema = torch.ops.positronic_brain.read_cuda.default._schema
    assert not any(argument.alias_info for argument in (*schema.arguments, *schema.returns))


SMALL = LlamaConfig(64, 8, 8, 1, 2, 1, 8, 1e-5, 1e4, 8192)


def small_brain(**overrides: Any) -> Brain:
    """One layer, with forgetting."""
    asked = {"device": DEVICE.type, "dtype": "float32", "engine.native": False, "capacity": 32}
    asked |= {"cull.target": 16, "cull.recent": 4, **overrides}
    settings_ = settings_of(compose_conf([f"{key}={value}" for key, value in asked.items()]))
    checkpoint = SeededModel("small", SMALL, seed=7).checkpoint(settings_.dtype, settings_.device)
    return Brain(checkpoint, settings_)


@on_a_device
def test_a_captured_brain_says_what_it_says_without_kernels() -> None:
    """A dozen ticks with forgetting: the same tokens and rows, and the same numbers within the
    rounding of float32. A step is four calls that write nothing (I1, I2), a patch is one.
    """
    plain = small_brain(engine="eager")
    ours = small_brain(engine="compiled", **{"engine.kernels": True})
    said = []
    for b in (plain, ours):
        b.prime([int(t) for t in torch.arange(12) * 7 % 60])
        said.append([tick.token for tick in b.stream(12)])
    assert said[0] == said[1]
    assert plain.mirror.position.tolist() == ours.mirror.position.tolist()
    for column in ("brightness", "surprise", "novelty"):
        a, b_ = getattr(plain.mirror, column), getattr(ours.mirror, column)
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b_), rtol=1e-4, atol=1e-4)
    step, patch = (ours.graphs.captured[name] for name in ("step T=1 bucket=32", "patch tick W=1"))
    assert [graph.compilations for graph in (step, patch)] == [1, 1]
    called = [
        re.findall(r"positronic_brain\.(\w+)", str(g.modules[0].graph)) for g in (step, patch)
    ]
    assert called == [["read_cuda", "draw_cuda", "cull_cuda", "not_finite_cuda"], ["patch_cuda"]]
    if INTERPRETED:  # they are looked at on a CPU
        assert mutated_inputs(step.modules[0]) == set()
        assert aliased_inputs(step.modules[0]) == 0
    before = digest(*ours.state, *ours.cursor)
    for _ in range(2):
        ours.graphs.begin_step()
        ours.graphs.step(ours._unforced, high_water=ours.memory.account.high_water)
    assert digest(*ours.state, *ours.cursor) == before


@on_a_device
def test_weights_and_memory_go_with_the_brain(open_tiny: OpenTiny) -> None:
    options = {"engine": "eager", "dtype": "float32", "device": DEVICE.type}
    b = open_tiny(**options, **{"engine.kernels": True})
    b.prime([1, 2, 3])
    assert b.tick().token >= 0
    watched: list[weakref.ref[Any]] = [weakref.ref(b.state.keys), weakref.ref(b.graphs.decode)]
    gc.collect()  # of other brains
    before = len(read_cuda._bound)
    del b
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    assert len(read_cuda._bound) == before - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_that_overlap_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of reads give the bits of reads whose kernels start one after another."""
    config, weights, state = small(torch.bfloat16)
    overlapping = operator(config, weights, state, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    ordinary = operator(config, weights, state, 1)
    expected = digest(*one_read(config, weights, state, ordinary, 3, 70))
    for _ in range(300):
        assert digest(*one_read(config, weights, state, overlapping, 3, 70)) == expected


# On any machine ----------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_every_kernel_on_the_interpreter() -> None:
    on_a_device.pass_interpreted(__file__)


SIZES = {
    "smollm2": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e4, 2048),
    "tinyllama": LlamaConfig(32000, 2048, 5632, 22, 32, 4, 64, 1e-5, 1e4, 2048),
    "llama-3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, 8192),
    "qwen3 with all": LlamaConfig(
        *(151936, 1024, 3072, 28, 16, 8, 128, 1e-6, 1e6, 40960),
        **{**EVERYTHING, "rotary_kinds": ()},
    ),
}


def described(
    config: LlamaConfig, slots: int, tokens: int, dtype: torch.dtype, *, int8: bool
) -> list[Launch]:
    """The launches of a read of a model of one layer, without a byte of it."""
    meta = torch.device("meta")
    one = dataclasses.replace(config, num_layers=1)
    made: dict[str, Any] = {}
    for name, shape in weight_shapes(one).items():
        tensor = torch.empty(shape, dtype=dtype, device=meta)
        made[name] = tensor
        if int8 and name in MATRICES:
            values = torch.empty(shape, dtype=torch.int8, device=meta)
            made[name] = Int8(values, torch.empty(shape[:-1], device=meta))
    weights = Weights(**made)
    state = allocate_state(one, slots, dtype, meta)
    given_ = Given(
        hidden=torch.empty(tokens, one.hidden_size, device=meta),
        cos=torch.empty(1, tokens, one.head_dim // 2, device=meta),
        sin=torch.empty(1, tokens, one.head_dim // 2, device=meta),
        seen=torch.empty(tokens, slots, dtype=torch.bool, device=meta),
        seen_new=torch.empty(tokens, tokens, dtype=torch.bool, device=meta),
        live=torch.empty(tokens, device=meta),
        end=torch.empty(1, dtype=torch.int64, device=meta),
    )
    scratch = allocate_scratch(one, slots, tokens, dtype, meta)
    like, sizes = [weights.final_norm], read_cuda._shape(one)
    results = Decoded(*read_cuda._allocated(given_, like, sizes, 0, tokens > 1))
    return launches(
        one, weights, (state.keys, state.values), scratch, given_, results, per_query=tokens > 1
    )


FORMS = [
    ("smollm2", 1024, 1, torch.bfloat16, False, 90),
    ("smollm2", 1024, 8, torch.bfloat16, True, 90),
    ("tinyllama", 1024, 1, torch.bfloat16, True, 90),
    ("smollm2", 1024, 1, torch.float32, False, 80),
    ("llama-3-8b", 65536, 1, torch.float16, False, 100),
    ("llama-3-8b", 65536, 1, torch.float32, False, 90),
    ("llama-3-8b", 8192, 8, torch.bfloat16, True, 90),
    ("tinyllama", 65536, 8, torch.float32, False, 89),
    ("smollm2", 200, 1, torch.bfloat16, False, 80),
    ("qwen3 with all", 1024, 1, torch.bfloat16, False, 90),
    ("qwen3 with all", 1024, 8, torch.float32, True, 80),
]


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize(
    ("size", "slots", "tokens", "dtype", "int8", "capability"),
    FORMS,
    ids=[f"{form[0]} {form[2]} {form[3]} sm_{form[5]}" for form in FORMS],
)
def test_every_kernel_compiles(
    size: str, slots: int, tokens: int, dtype: torch.dtype, int8: bool, capability: int
) -> None:
    """For GPUs that need not be there: without a spilled register (four at most in float32), and
    weights and cache are loaded 128 bits at a time.
    """
    made = described(SIZES[size], slots, tokens, dtype, int8=int8)
    assert len(made) == 6 + SIZES[size].qk_norm + 1
    for launch in made:
        kernel, name = compiled_for(launch, capability), launch.kernel.__name__
        assert kernel.stack <= (16 if dtype == torch.float32 else 0), name
        assert kernel.shared <= SHARED, name
        if name not in ("turn", "combine"):  # whose inputs are small
            assert re.search(r"ld\.global[^ ]*\.v4", kernel.ptx), name
        if capability >= 90:
            assert "griddepcontrol.wait" in kernel.ptx, name


@pytest.mark.skipif(INTERPRETED, reason="said once")
def test_a_read_is_few_kernels() -> None:
    """With those of the choice and the patch at most 200 for SmolLM2."""
    of_layer = described(SIZES["smollm2"], 1024, 1, torch.bfloat16, int8=False)[:-1]
    assert len(of_layer) * SIZES["smollm2"].num_layers + 1 == 181


@pytest.mark.parametrize("bucket", [1, 64, 65, 1024, 8192, 8193, 1_400_000])
def test_splits_hold_every_slot_and_scratch_has_room_for_them(bucket: int) -> None:
    """As the kernels cut them: for every last slot in the bucket."""
    config, dtype = toy_config(), torch.bfloat16
    room = allocate_scratch(config, bucket, 2, dtype, torch.device("meta"))
    rows, slots = 2 * config.num_heads, block_of(dtype)
    for smaller in {bucket, max(1, bucket // 2), max(1, bucket - 1)}:
        splits, blocks = splits_of(dtype, smaller), -(-smaller // slots)
        for end in {smaller, smaller // 2, smaller // 2 + 1, 1}:
            per_split = -(-end // (slots * read_cuda.MOST_SPLITS))
            assert splits * per_split * slots >= end
        assert rows * blocks <= room.crests.numel()
        assert rows * splits <= room.tops.numel()
        assert rows * smaller <= room.weights.numel()


def test_powers_of_two() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
