"""The operator for the layers on a CPU, beside its twin in PyTorch.

``test_read.py`` holds both against plain loops at toy sizes; here are the sizes of real models,
where whole vectors are read, in every number format.
"""

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brain.errors import Refused
from brain.machine.cpu_operator import native_libraries
from compiled import draw_cpu, read_cpu
from compiled.cpu_library import load
from compiled.int8 import quantize
from compiled.llama import LlamaConfig, Weights
from compiled.read import read, read_ahead, read_chunk
from compiled.read_cpu import Decode, Formats, formats, operator
from compiled.state import State, allocate_state
from toys import CPU, EVERYTHING, digest, toy_config, toy_cursor, toy_weights

CAPACITY = 200  # attention is summed by blocks of 64 slots: of two nobody sees the order
MATRICES = ("embedding", "qkv", "attention_out", "gate_up", "down", "head")

Precision = tuple[torch.dtype, bool]
PRECISIONS: list[Precision] = [
    (torch.float32, False),
    (torch.bfloat16, False),
    (torch.float32, True),
    (torch.bfloat16, True),
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model(config: LlamaConfig, precision: Precision) -> Weights:
    dtype, int8 = precision
    # Products of some sixty terms: a spread that keeps activations of order 1.
    scaled: dict[str, Any] = {
        name: (1.0 + tensor.float() if name.endswith("norm") else 0.3 * tensor).to(dtype)
        for name, tensor in toy_weights(config)._asdict().items()
        if isinstance(tensor, torch.Tensor) and name != "inverse_frequencies"
    }
    scaled["inverse_frequencies"] = toy_weights(config).inverse_frequencies
    matrices = {name: quantize(scaled[name]) if int8 else scaled[name] for name in MATRICES}
    return Weights(**{**scaled, **matrices})


def memory(config: LlamaConfig, dtype: torch.dtype, valid: torch.Tensor) -> State:
    capacity = len(valid)
    state = allocate_state(config, capacity, dtype, CPU)
    generator = torch.Generator().manual_seed(5)
    state.keys.copy_(torch.randn(state.keys.shape, generator=generator))
    state.values.copy_(torch.randn(state.values.shape, generator=generator))
    state.position.copy_(torch.randperm(capacity, generator=generator))
    state.valid.copy_(valid)
    return state


def agrees(ours: Any, expected: Any, truth: Any, dtype: torch.dtype) -> None:
    """Within rounding of the twin; ``truth`` is the twin's reading in float32 of the same numbers.

    Float32: sums of up to 100 terms of order 1 in another order, through two layers. Bfloat16
    rounds activations to 8 bits, each sum in another order perhaps to the other side: the operator
    must not be much further from the truth than the twin is.
    """
    for name in expected._fields:
        a, b, true = getattr(ours, name), getattr(expected, name), getattr(truth, name)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
        else:
            noise = float((b.float() - true).abs().amax())
            scale = float(true.abs().amax())
            assert float((a.float() - true).abs().amax()) <= 2 * noise + scale / 128, name


def widened(weights: Weights, state: State) -> tuple[Weights, State]:
    """The same numbers in float32."""
    wide = {
        name: field.float()
        for name, field in weights._asdict().items()
        if isinstance(field, torch.Tensor) and name != "inverse_frequencies"
    }
    cache = {"keys": state.keys.float(), "values": state.values.float()}
    return weights._replace(**wide), state._replace(**cache)


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2 heads": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 64},
    "tinyllama heads": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64},
    "wide heads": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128},
    "heads of one and a half": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 48},
    "odd heads": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 20},
    "tails everywhere": {"hidden_size": 71, "intermediate_size": 37, "vocab_size": 101},
    "one of each": {"hidden_size": 16, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 1},
}


@settings(max_examples=60)
@given(data=st.data())
def test_the_operator_is_its_twin(data: st.DataObject) -> None:
    precision = data.draw(st.sampled_from(PRECISIONS), "precision")
    shape = data.draw(st.sampled_from(sorted(SHAPES)), "shape")
    torch.set_num_threads(data.draw(st.integers(1, 5), "threads"))
    more = data.draw(st.sampled_from([{}, {}, EVERYTHING]), "more")
    config = replace(toy_config(), **{"hidden_size": 48, **SHAPES[shape], **more})
    kept = data.draw(st.sampled_from(["none", "one", "prefix", "holes", "all"]), "kept")
    slots = torch.arange(CAPACITY)
    valid = {
        "none": slots < 0,
        "one": slots == 133,
        "prefix": slots < 150,
        "holes": slots % 3 != 0,
        "all": slots >= 0,
    }[kept]
    weights, state = model(config, precision), memory(config, precision[0], valid)
    num_tokens = data.draw(st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 8, 16]), "tokens")
    length = data.draw(st.integers(1, num_tokens), "length")
    bucket = data.draw(st.sampled_from([CAPACITY, 160, 64]), "bucket")
    tokens = torch.arange(num_tokens) * 7 % config.vocab_size
    before = digest(*weights.tensors(), *state)
    rest: tuple[Any, ...]
    kind = data.draw(st.sampled_from(["plain", "ahead", "chunk"]), "kind")
    if kind == "chunk":
        num_tokens = data.draw(st.sampled_from([2, 3, 8, 33, 70]), "tokens of a chunk")
        tokens = torch.arange(num_tokens) * 7 % config.vocab_size
        rest = (tokens, 250 + torch.arange(num_tokens), tokens.roll(-1))
        reading = compared(read_chunk, config, weights, state, rest, bucket)
        assert float(reading.mass.sum() + reading.own_mass.sum()) == pytest.approx(num_tokens)
    elif kind == "ahead":
        position = data.draw(st.sampled_from([50, 250]), "position")
        cursor = toy_cursor(position=position, token=3)
        rest = (cursor, tokens, torch.tensor(length))
        compared(read_ahead, config, weights, state, rest, bucket)
    else:
        start = data.draw(st.sampled_from([0, 20, 100, 250]), "start")
        rest = (tokens, start + torch.arange(num_tokens), torch.tensor(length))
        reading = compared(read, config, weights, state, rest, bucket)
        total = float(reading.mass.sum() + reading.own_mass.sum())
        assert total == pytest.approx(length, rel=1e-4)
    assert digest(*weights.tensors(), *state) == before


def compared(
    reader: Callable[..., Any],
    config: LlamaConfig,
    weights: Weights,
    state: State,
    rest: tuple[Any, ...],
    bucket: int,
    twin: Weights | None = None,
) -> Any:
    """The operator's reading, checked against the layers' (of ``twin``, if other weights)."""
    ours = reader(config, weights, state, *rest, bucket=bucket, decode=built(weights))
    expected = reader(config, twin or weights, state, *rest, bucket=bucket)
    truth = reader(config, *widened(twin or weights, state), *rest, bucket=bucket)
    agrees(ours, expected, truth, weights.dtype)
    return ours


def formats_of(weights: Weights) -> Formats | None:
    return formats(weights.dtype, weights.device, type(weights.head))


def built(weights: Weights) -> Decode:
    wanted = formats_of(weights)
    assert wanted is not None
    return operator(native_libraries(wanted).read)


def test_the_comparison_can_fail() -> None:
    config = replace(toy_config(), hidden_size=48)
    weights = model(config, PRECISIONS[0])
    state = memory(config, torch.float32, torch.arange(CAPACITY) < 40)
    rest = (torch.tensor([3]), torch.tensor([100]), torch.tensor(1))
    compared(read, config, weights, state, rest, CAPACITY)
    wrong = weights._replace(mlp_norm=weights.mlp_norm * 1.01)
    with pytest.raises(AssertionError):
        compared(read, config, weights, state, rest, CAPACITY, twin=wrong)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_I11_the_number_of_threads_changes_no_bit(precision: Precision) -> None:
    """A run may go on with more threads, or fewer, than it began with."""
    config = replace(toy_config(), hidden_size=49, intermediate_size=33, vocab_size=777)
    weights = model(config, precision)
    state = memory(config, precision[0], torch.arange(CAPACITY) % 7 != 3)
    for num_tokens in (1, 2, 5, 7, 8, 11, 16):
        tokens = torch.arange(num_tokens)
        rest = (tokens, 1000 + tokens, torch.tensor(num_tokens))
        told = set()
        for threads in (1, 2, 3, 5, 40):
            torch.set_num_threads(threads)
            reading = read(config, weights, state, *rest, bucket=CAPACITY, decode=built(weights))
            chunk = (state, tokens, 1000 + tokens, tokens + 1)
            scored = read_chunk(config, weights, *chunk, bucket=CAPACITY, decode=built(weights))
            told.add(digest(*reading, *scored))
        assert len(told) == 1, num_tokens


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_read_gives_the_same_bits(precision: Precision) -> None:
    """Whoever is scheduled when: threads add up in a fixed order."""
    torch.set_num_threads(3)
    config = replace(toy_config(), hidden_size=48)
    weights = model(config, precision)
    state = memory(config, precision[0], torch.arange(CAPACITY) < 190)
    decode = built(weights)
    arguments = (state, torch.tensor([3, 4]), torch.tensor([1000, 1001]), torch.tensor(2))
    told = {
        digest(*read(config, weights, *arguments, bucket=CAPACITY, decode=decode))
        for _ in range(20)
    }
    assert len(told) == 1


def reader(precision: Precision) -> Callable[[int], str]:
    """Reads two tokens with so many threads, and returns what came out."""
    config = replace(toy_config(), hidden_size=49, intermediate_size=33, vocab_size=77)
    weights = model(config, precision)
    state = memory(config, precision[0], torch.arange(CAPACITY) % 7 != 3)
    decode = built(weights)
    arguments = (state, torch.tensor([3, 4]), torch.tensor([1000, 1001]), torch.tensor(2))

    def told(threads: int) -> str:
        torch.set_num_threads(threads)
        return digest(*read(config, weights, *arguments, bucket=CAPACITY, decode=decode))

    return told


def test_callers_read_at_once() -> None:
    """One of them has the other threads; the rest read alone, the same bits."""
    told = reader(PRECISIONS[1])
    with ThreadPoolExecutor(4) as callers:
        assert set(callers.map(told, [3] * 200)) == {told(1)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_reads_with_threads_of_its_own() -> None:
    told = reader(PRECISIONS[1])
    expected = told(3)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # kills a child that waits for threads it has not got
        os._exit(0 if told(3) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert told(3) == expected


def test_I11_a_busy_machine_changes_no_bit() -> None:
    told = reader(PRECISIONS[1])
    expected = told(1)
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        assert {told(3) for _ in range(50)} == {expected}
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_threads_that_cannot_be_started_are_done_without() -> None:
    told = reader(PRECISIONS[1])
    expected = told(3)
    child = os.fork()  # has no threads yet
    if child == 0:
        signal.alarm(60)
        used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), -1))  # for no further stack
        same = told(500) == expected
        os._exit(0 if same and len(os.listdir("/proc/self/task")) < 500 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_of_more_slots_blocks_are_longer(precision: Precision) -> None:
    """There are 32 at most."""
    torch.set_num_threads(3)
    config = replace(toy_config(), hidden_size=48)
    weights = model(config, precision)
    state = memory(config, precision[0], torch.arange(2300) % 11 != 5)
    rest = (torch.tensor([3, 4]), torch.tensor([2000, 2400]), torch.tensor(2))
    compared(read, config, weights, state, rest, 2300)


def test_an_operator_that_pytorch_may_compile() -> None:
    """Schema, fake results and aliasing are what they are declared to be."""
    config = replace(toy_config(), hidden_size=48)
    weights = model(config, PRECISIONS[2])
    state = memory(config, torch.float32, torch.arange(CAPACITY) < 40)
    library = native_libraries(Formats("float", "int8_t")).read
    decode = operator(library)
    hidden = torch.randn(2, 48)
    visible = (torch.rand(2, CAPACITY) < 0.5, torch.ones(2, 2).tril().bool(), torch.ones(2))
    decode(
        config,
        weights,
        state,
        hidden,
        torch.ones(1, 2, 4),
        torch.zeros(1, 2, 4),
        visible,
        per_query=False,
    )
    qualified = getattr(torch.ops.positronic_brain, library.stem.replace("-", "_")).default
    matrices = [getattr(weights, field) for field in MATRICES[1:]]
    called: tuple[Any, ...] = (
        [weights.attention_norm, weights.mlp_norm, weights.final_norm],
        [matrix.values for matrix in matrices],
        [matrix.scale for matrix in matrices],
        [state.keys, state.values],
        [hidden, torch.ones(1, 2, 4), torch.zeros(1, 2, 4)],
        list(visible),
        [config.intermediate_size, config.num_heads, config.vocab_size],
        1e-5,
        False,
        [],
        [],
        [0, 0],
        1e-5,
        0.0,
        1.0,
        False,
    )
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(qualified, called, test_utils=tests)


def test_only_where_it_can_run() -> None:
    weights = toy_weights(toy_config())
    assert formats_of(weights) == Formats("float", "float")
    assert formats_of(model(toy_config(), (torch.bfloat16, True))) == Formats("BFloat16", "int8_t")
    half = weights._replace(final_norm=weights.final_norm.half())
    assert formats_of(half) is None
    assert formats_of(weights._replace(final_norm=weights.final_norm.to("meta"))) is None


@pytest.mark.parametrize("module", [read_cpu, draw_cpu])
def test_arguments_of_another_size_are_refused(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*module.Arguments._fields_, ("one_more", ctypes.c_int64))

    formats = Formats("float", "float")
    library = getattr(native_libraries(formats), module.__name__.removesuffix("_cpu")[9:])
    assert load(library, module.Arguments).arguments_size() == ctypes.sizeof(module.Arguments)
    with pytest.raises(OSError, match=r"takes \d+ bytes of arguments, but \w+_cpu.py passes \d+"):
        load(library, Longer)
    monkeypatch.setattr(module, "Arguments", Longer)
    with pytest.raises(Refused, match=r"must be of one version; or use engine=eager"):
        native_libraries(formats)


@pytest.mark.parametrize(("module", "struct"), [(read_cpu, "Decode"), (draw_cpu, "Draw")])
def test_both_sides_name_the_fields_alike(module: ModuleType, struct: str) -> None:
    """What Python fills in is what C++ reads: the same names in the same order, of one width."""
    source = module.SOURCE.read_text("utf-8")
    (body,) = re.findall(rf"struct {struct} \{{(.*?)\n\}};", source, re.S)
    declared: list[str] = []
    for line in re.sub(r"//[^\n]*", "", body).split(";"):
        names = re.sub(r"^\s*(const )?(int64_t|double|float|void|uint8_t|Matrix)\b", "", line)
        declared += [name.strip(" *\n") for name in names.split(",") if name.strip(" *\n")]
    assert declared == [field[0] for field in module.Arguments._fields_]
