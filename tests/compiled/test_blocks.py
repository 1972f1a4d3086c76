"""Weights in the blocks of a GGUF file, beside the reference that reads one number after another.

What blocks mean is asked of the gguf package. What a read makes of them is held against the same
read of the numbers, in PyTorch.
"""

import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_blocks import SCALES, random_rows, reference
from torch import Tensor

from brain.machine.cpu_operator import built_library, cpp_compiler, native_libraries
from compiled import blocks
from compiled.blocks import KINDS, Blocks, Rows, looked_up, numbers, quantize, stacked
from compiled.llama import LlamaConfig, Weights, layer_weights
from compiled.matrix import dequantize, flat, num_rows, part
from compiled.read import read, read_chunk
from compiled.read_cpu import SOURCE, formats, operator
from compiled.state import State, allocate_state
from toys import CPU, digest, toy_config, toy_weights

WHOLE = [kind for kind, (_, weights, _) in KINDS.items() if weights > 1]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_those_of_ggml(kind: str) -> None:
    number, weights, size = KINDS[kind]
    theirs = gguf.GGMLQuantizationType[kind]
    assert number == theirs.value
    assert (weights, size) == gguf.GGML_QUANT_SIZES[theirs]


@settings(max_examples=60)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_numbers_are_the_reference_s(kind: str, rows: int, count: int, seed: int) -> None:
    """To the bit, and so within the bound |w - dequantized| ≤ 2⁻¹⁰ (|scale q| + |minimum|)."""
    blocks = random_rows(kind, rows, 256 * count, seed)
    assert torch.equal(numbers(*blocks), reference(blocks))


def test_scales_may_be_the_smallest_and_the_largest_numbers() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2)
    rows = Rows(torch.cat([every, every.new_full((len(every), 32), 3)], -1), "Q8_0")
    with np.errstate(all="ignore"):
        assert torch.equal(numbers(*rows).nan_to_num(7.0), reference(rows).nan_to_num(7.0))


def weights_in_blocks(
    config: LlamaConfig, kinds: list[str], seed: int, *, neighbours: bool
) -> Weights:
    """Toy weights whose matrices are random blocks, one kind after another."""
    c = config
    plain = toy_weights(config)
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, list[tuple[int, int]]] = {
        "qkv": [(queries, c.hidden_size), (keys, c.hidden_size), (keys, c.hidden_size)],
        "attention_out": [(c.hidden_size, queries)],
        "gate_up": 2 * [(c.intermediate_size, c.hidden_size)],
        "down": [(c.hidden_size, c.intermediate_size)],
    }
    count = 0

    def made(shape: tuple[int, int]) -> Rows:
        nonlocal count
        count += 1
        kind = kinds[count % len(kinds)]
        return random_rows(kind, *shape, seed + count)

    matrices: dict[str, Any] = {}
    for field, parts in shapes.items():
        heads = (c.num_heads, c.num_kv_heads) if neighbours and field == "qkv" else ()
        layers = tuple(tuple(made(shape) for shape in parts) for _ in range(c.num_layers))
        matrices[field] = stacked(layers, heads)
    for field in ("embedding", "head"):
        matrices[field] = stacked(((made((c.vocab_size, c.hidden_size)),),))
    norms = {
        name: 1.0 + getattr(plain, name) for name in ("attention_norm", "mlp_norm", "final_norm")
    }
    return plain._replace(**matrices, **norms)


def as_numbers(weights: Weights) -> Weights:
    """The same in float32."""
    fields: dict[str, Any] = {}
    for name, field in weights._asdict().items():
        if isinstance(field, Blocks):
            each = [dequantize(part(field, layer)) for layer in range(len(field.layers))]
            fields[name] = torch.stack(each) if name not in ("embedding", "head") else each[0]
    return weights._replace(**fields)


def memory(config: LlamaConfig, dtype: torch.dtype) -> State:
    state = allocate_state(config, 64, dtype, CPU)
    generator = torch.Generator().manual_seed(5)
    state.keys.copy_(torch.randn(state.keys.shape, generator=generator))
    state.values.copy_(torch.randn(state.values.shape, generator=generator))
    state.position.copy_(torch.randperm(64, generator=generator))
    state.valid.copy_(torch.arange(64) % 3 != 0)
    return state


CONFIG = replace(toy_config(), hidden_size=256, intermediate_size=512, head_dim=64)


@settings(max_examples=50)
@given(data=st.data())
def test_the_operator_reads_what_the_numbers_say(data: st.DataObject) -> None:
    """Its factors have sixteen bits for each 32, so that a product is off by some 2⁻¹⁶ of its
    terms' size; the twin makes float32 of every block.
    """
    kinds = data.draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4), "kinds")
    neighbours = data.draw(st.booleans(), "neighbours")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    torch.set_num_threads(data.draw(st.integers(1, 5), "threads"))
    vocab = data.draw(st.sampled_from([64, 101]), "vocab")
    config = replace(CONFIG, vocab_size=vocab)
    seed = data.draw(st.integers(0, 99), "seed")
    weights = weights_in_blocks(config, kinds, seed, neighbours=neighbours)
    weights = weights._replace(
        **{name: getattr(weights, name).to(dtype) for name in ("attention_norm", "mlp_norm")},
        final_norm=weights.final_norm.to(dtype),
    )
    exact = as_numbers(weights)
    exact = exact._replace(
        **{name: getattr(exact, name).float() for name in ("attention_norm", "mlp_norm")},
        final_norm=exact.final_norm.float(),
    )
    state = memory(config, dtype)
    wide = state._replace(keys=state.keys.float(), values=state.values.float())
    num_tokens = data.draw(st.sampled_from([1, 1, 1, 2, 4, 5, 9, 33]), "tokens")
    tokens = torch.arange(num_tokens) * 7 % vocab
    positions, length = 100 + torch.arange(num_tokens), torch.tensor(num_tokens)
    decode = operator(native_libraries(of(weights)).read)
    if data.draw(st.booleans(), "scored") and num_tokens > 1:
        rest: tuple[Any, ...] = (tokens, positions, tokens.roll(-1))
        found: Any = read_chunk(config, weights, state, *rest, bucket=64, decode=decode)
        twin: Any = read_chunk(config, weights, state, *rest, bucket=64)
        truth: Any = read_chunk(config, exact, wide, *rest, bucket=64)
    else:
        rest = (tokens, positions, length)
        found = read(config, weights, state, *rest, bucket=64, decode=decode)
        twin = read(config, weights, state, *rest, bucket=64)
        truth = read(config, exact, wide, *rest, bucket=64)
    for name in truth._fields:
        ours, reference, true = getattr(found, name), getattr(twin, name), getattr(truth, name)
        assert ours.shape == reference.shape == true.shape
        assert ours.dtype == reference.dtype
        size = float(true.abs().amax())
        noise = float((reference.float() - true).abs().amax())
        if dtype == torch.float32:
            assert noise <= 1e-4 * size, name
            assert float((ours - true).abs().amax()) <= 1e-3 * size, name
        else:  # it rounds every activation to eight bits, in both
            assert float((ours.float() - true).abs().amax()) <= 2 * noise + size / 32, name


def of(weights: Weights) -> Any:
    return formats(weights.dtype, weights.device, type(weights.head))


@pytest.mark.parametrize("kind", WHOLE)
def test_one_row_times_one_vector_is_as_good_as_floats(kind: str) -> None:
    """A read of one token multiplies whole numbers; one of two unpacks the rows first."""
    config = replace(CONFIG, num_layers=1)
    weights = weights_in_blocks(config, [kind], 3, neighbours=False)
    state = memory(config, torch.float32)
    decode = operator(native_libraries(of(weights)).read)

    def logits(tokens: list[int], length: int) -> Tensor:
        asked = (torch.tensor(tokens), 100 + torch.arange(len(tokens)), torch.tensor(length))
        return read(config, weights, state, *asked, bucket=64, decode=decode).logits[0]

    alone, beside = logits([3], 1), logits([3, 4], 2)
    assert (alone - beside).norm() < 2e-4 * beside.norm()  # ten bits: 1e-2
    assert not torch.equal(alone, beside)  # they are two ways


FLAGS = {"as it is": (), "AVX2": ("-mno-avx512f", "-mno-avxvnni"), "plain": ("-mno-avx2",)}
"""Processors that this one can play: what the compiler is told that it lacks."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names what an x86 may lack")
@pytest.mark.parametrize("lacks", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("sizes", [(1056, 333, WHOLE[:5]), (2304, 512, WHOLE)], ids=["odd", "wide"])
def test_every_way_to_multiply(lacks: tuple[str, ...], sizes: tuple[int, int, list[str]]) -> None:
    """Of processors of other kinds; rows that end amid a vector, or are longer than a piece; parts
    of an odd number of rows. Any number of threads gives the same bits.
    """
    hidden, wide, kinds = sizes
    config = replace(toy_config(), hidden_size=hidden, intermediate_size=wide, num_layers=1)
    mixed = [*kinds, "F16", *kinds]
    weights = weights_in_blocks(config, mixed, 1, neighbours=True)
    down = random_rows("F16", hidden, wide, 7)  # odd rows are no whole blocks of any other
    queries = random_rows("BF16", hidden, config.num_heads * config.head_dim, 8)
    weights = weights._replace(down=stacked(((down,),)), attention_out=stacked(((queries,),)))
    defined = ("-DREAL=float", "-DWEIGHT=InBlocks", *lacks)
    decode = operator(built_library(SOURCE, cpp_compiler(), defined))
    exact = as_numbers(weights)
    for count in (1, 2, 9, 33):
        tokens = torch.arange(count)
        asked = (tokens, 100 + tokens, torch.tensor(count))
        truth = read(config, exact, memory(config, torch.float32), *asked, bucket=64).logits
        told = set()
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            state = memory(config, torch.float32)
            found = read(config, weights, state, *asked, bucket=64, decode=decode)
            told.add(digest(*found))
        assert len(told) == 1, count
        assert (found.logits - truth).norm() < 3e-4 * truth.norm(), count


@pytest.mark.parametrize("scale", [0x7C00, 0x7E00, 0xFC00])  # infinity, NaN, minus infinity
@pytest.mark.parametrize("kind", WHOLE)
def test_a_scale_that_is_not_finite_shows_in_the_logits(kind: str, scale: int) -> None:
    config = replace(CONFIG, num_layers=1)
    weights = weights_in_blocks(config, [kind], 3, neighbours=False)
    ((rows,),) = weights.head.layers  # type: ignore[union-attr]
    at = SCALES[kind][-1]
    block = KINDS[kind].bytes
    rows.bytes[5, block * (rows.bytes.shape[1] // block - 1) + at :][:2] = torch.tensor(
        [scale & 255, scale >> 8], dtype=torch.uint8
    )
    decode = operator(native_libraries(of(weights)).read)
    for count in (1, 2):
        asked = (torch.arange(count), 100 + torch.arange(count), torch.tensor(count))
        found = read(
            config, weights, memory(config, torch.float32), *asked, bucket=64, decode=decode
        )
        assert not found.logits[:, 5].isfinite().any()
        assert found.logits[:, :5].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_activation_that_is_not_finite_shows_in_the_logits(bad: float) -> None:
    config = replace(CONFIG, num_layers=1)
    weights = weights_in_blocks(config, ["Q4_K"], 3, neighbours=False)
    weights.final_norm[70] = bad
    decode = operator(native_libraries(of(weights)).read)
    asked = (torch.tensor([1]), torch.tensor([100]), torch.tensor(1))
    found = read(config, weights, memory(config, torch.float32), *asked, bucket=64, decode=decode)
    assert not found.logits.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_I11_the_number_of_threads_changes_no_bit_of_blocks(dtype: torch.dtype) -> None:
    config = replace(CONFIG, vocab_size=777)
    weights = weights_in_blocks(config, ["Q4_K", "Q6_K", "F16", "Q5_0"], 1, neighbours=True)
    norms = ("attention_norm", "mlp_norm", "final_norm")
    weights = weights._replace(**{name: getattr(weights, name).to(dtype) for name in norms})
    decode = operator(native_libraries(of(weights)).read)
    for count in (1, 2, 5, 9):
        tokens = torch.arange(count)
        asked = (tokens, 1000 + tokens, torch.tensor(count))
        told = set()
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            state = memory(config, dtype)
            told.add(digest(*read(config, weights, state, *asked, bucket=64, decode=decode)))
        assert len(told) == 1, count


def test_parts_are_views_and_rows_are_looked_up() -> None:
    weights = weights_in_blocks(CONFIG, ["Q5_K", "Q8_0"], 1, neighbours=True)
    layer = layer_weights(weights, 1)
    assert isinstance(layer.qkv, Blocks)
    assert isinstance(weights.qkv, Blocks)
    assert isinstance(weights.embedding, Blocks)
    ours = [rows.bytes.data_ptr() for rows in layer.qkv.layers[0]]
    assert ours == [rows.bytes.data_ptr() for rows in weights.qkv.layers[1]]
    assert layer.qkv.table[0, :, 0].tolist() == ours
    rows = part(weights.embedding, slice(2, 5))
    assert num_rows(rows) == 3
    assert torch.equal(dequantize(rows), dequantize(weights.embedding)[2:5])
    tokens = torch.tensor([7, 0, 7])
    assert torch.equal(looked_up(tokens, weights.embedding), dequantize(weights.embedding)[tokens])
    assert [len(flat(field)) for field in (weights.qkv, weights.head)] == [1, 2]


@settings(max_examples=60)
@given(
    st.integers(1, 5),
    st.sampled_from([1e-4, 1.0, 30.0]),
    st.sampled_from([0.0, -3.0, 100.0]),
    st.integers(0, 99),
)
def test_four_bits_are_the_nearest(rows: int, spread: float, offset: float, seed: int) -> None:
    """No number is further off than half a step of the widest scale that its 32 could need, and
    what sixteen bits make of scale and minimum.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = spread * torch.randn(rows, 96, generator=generator) + spread * offset
    made = quantize(plain)
    assert made.kind == blocks.FOUR_BITS
    grouped = plain.view(rows, 3, 32)
    step = (grouped.amax(-1) - grouped.amin(-1)) / 15
    rounding = 2**-11 * (grouped.abs().amax(-1) + 16 * step) + 2**-24 * 16
    error = (numbers(*made).view(rows, 3, 32) - grouped).square().mean(-1).sqrt()
    assert bool((error <= step / 2 + rounding).all())


def test_four_bits_of_numbers_that_float16_lacks() -> None:
    large = torch.full((1, 32), 7e4)
    assert torch.equal(numbers(*quantize(large)), torch.full((1, 32), 65504.0))
    assert numbers(*quantize(torch.linspace(-3e5, 3e5, 32)[None])).isfinite().all()
    with pytest.raises(ValueError, match="not whole blocks"):
        quantize(torch.ones(4, 40))


def test_four_bits_lose_less_than_the_range_alone_would() -> None:
    plain = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    grouped = plain.view(-1, 32)
    least, most = grouped.aminmax(dim=-1, keepdim=True)
    step = (most - least) / 15
    simple = (((grouped - least) / step).round() * step + least - grouped).square().mean()
    assert (numbers(*quantize(plain)).view(-1, 32) - grouped).square().mean() < 0.9 * simple


def test_four_bits_of_the_same_numbers_are_exact() -> None:
    plain = torch.tensor([[0.0] * 32, [0.5] * 32, [-2.0] * 32])
    assert torch.equal(numbers(*quantize(plain)), plain)
