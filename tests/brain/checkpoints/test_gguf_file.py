"""GGUF conversion: the folder it writes is the model it was given."""

import ctypes
import hashlib
import json
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import brain
from brain.checkpoints import Checkpoint, open_folder
from brain.checkpoints.gguf_file import (
    ROWS_AT_ONCE,
    Dequantized,
    convert_gguf,
    gguf_format,
    open_gguf,
)
from brain.checkpoints.gguf_header import GgufFile
from brain.checkpoints.llama_names import packed_parts
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.errors import BrainWarning, Refused
from brain.measure.bench.gguf_writer import write_gguf as write
from brain.measure.bench.job import Job
from brain.measure.bench.llama_cpp_peer import LlamaCpp
from compiled.int8 import Int8
from compiled.matrix import dequantize
from compiled.rope import RopeScaling, inverse_frequencies
from conf.schema import WeightFormat
from gguf_files import Change, Fields, Tensors, byte_level_fields, write_gguf
from texts import TEXTS
from toys import assert_same_weights

Twins = Callable[..., tuple[Path, Path]]
SaveLlama = Callable[..., dict[str, Tensor]]


@pytest.mark.parametrize("tied", [False, True])
def test_conversion_restores_the_original(
    save_llama: SaveLlama, tmp_path: Path, byte_level_json: str, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    vocab_size = len(json.loads(byte_level_json)["model"]["vocab"])
    state = save_llama(tmp_path / "hf", vocab_size=vocab_size, tie_word_embeddings=tied)
    if tied:
        state.pop("lm_head.weight", None)
    write_gguf(tmp_path / "x.gguf", state, byte_level_fields(byte_level_json, "smollm"))
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_gguf(tmp_path / "x.gguf", folder)

    ours, original = (open_folder(f, dtype=torch.float32) for f in (folder, tmp_path / "hf"))
    assert ours.config == original.config
    assert_same_weights(ours.weights, original.weights)
    assert ours.tokenizer.encode("hello 12") == original.tokenizer.encode("hello 12")
    a, b = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / "hf"))
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(a(ids).logits, b(ids).logits)


def drop(name: str) -> Change:
    return lambda fields, tensors: (fields.pop(name, None), tensors.pop(name, None), None)[-1]


def put(**changes: Any) -> Change:
    return lambda fields, _: fields.update({k.replace("__", "."): v for k, v in changes.items()})


def reshape(_: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    tensors["output_norm.weight"] = np.ones(33, np.float32)


def add(_: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    tensors["blk.0.attn_q.bias"] = np.ones(32, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(general__architecture="gemma3"), "architecture 'gemma3'"),
        (put(llama__rope__scaling__type="yarn"), "llama.rope.scaling.type is 'yarn'"),
        (put(llama__rope__scaling__attn_factor=1.5), "llama.rope.scaling.attn_factor is 1.5"),
        (put(llama__expert_count=8), "llama.expert_count is 8; use 0"),
        (put(llama__attention__sliding_window=64), "llama.attention.sliding_window is 64"),
        (
            put(llama__rope__dimension_count=4),
            "key_length is 8, llama.attention.value_length 8 and llama.rope.dimension_count 4",
        ),
        (put(llama__attention__key_length=16), "key_length is 16, llama.attention.value_length 8"),
        (put(llama__attention__value_length=4), "key_length is 8, llama.attention.value_length 4"),
        (put(llama__vocab_size=299), "llama.vocab_size is 299, tokenizer.ggml.tokens has 260"),
        (
            put(llama__block_count=2),
            "blk.2.attn_k.weight: it is not of a llama, or more than llama.bl",
        ),
        (put(llama__attention__head_count_kv=[2, 1, 2]), "llama.attention.head_count_kv"),
        (put(tokenizer__ggml__pre="qwen9"), "did you mean qwen2?"),
        (drop("llama.block_count"), "llama.block_count"),
        (drop("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight is missing"),
        (reshape, "output_norm.weight has shape [33], expected [32]"),
        (add, "unexpected tensor blk.0.attn_q.bias"),
    ],
)
def test_unusable_gguf_is_refused(
    save_llama: SaveLlama, tmp_path: Path, byte_level_json: str, change: Change, message: str
) -> None:
    vocab_size = len(json.loads(byte_level_json)["model"]["vocab"])
    state = save_llama(tmp_path / "hf", vocab_size=vocab_size)
    write_gguf(tmp_path / "x.gguf", state, byte_level_fields(byte_level_json, "smollm"), change)
    (tmp_path / "out").mkdir()
    with pytest.raises(Refused) as refusal:
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "factor", "said"),
    [
        (put(llama__rope__scaling__factor=4.0), 4.0, []),  # no type means linear
        (put(llama__rope__scale_linear=4.0), 4.0, []),  # its old name
        (
            put(llama__rope__scaling__factor=4.0, llama__rope__scale_linear=2.0),
            4.0,
            ["llama.rope.scaling.factor 4.0 counts", "llama.rope.scale_linear 2.0"],
        ),
        (
            put(llama__rope__scaling__factor=4.0, llama__rope__scaling__type="none"),
            1.0,
            ["llama.rope.scaling.type 'none' counts", "llama.rope.scaling.factor 4.0"],
        ),
        (put(llama__rope__scaling__factor=1.0, llama__rope__scaling__type="linear"), 1.0, []),
        (put(llama__rope__scaling__type="linear"), 1.0, []),
        (put(llama__attention__head_count_kv=[2, 2, 2]), 1.0, []),
    ],
)
def test_metadata_count_as_in_llama_cpp(
    save_llama: SaveLlama,
    tmp_path: Path,
    byte_level_json: str,
    change: Change,
    factor: float,
    said: list[str],
) -> None:
    vocab_size = len(json.loads(byte_level_json)["model"]["vocab"])
    scaling = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    state = save_llama(tmp_path / "hf", vocab_size=vocab_size, rope_parameters=scaling)
    write_gguf(tmp_path / "x.gguf", state, byte_level_fields(byte_level_json, "smollm"), change)
    (tmp_path / "out").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert all(part in str(caught[0].message) for part in said)
    assert len(caught) == bool(said)
    ours, original = (open_folder(tmp_path / f, dtype=torch.float32) for f in ("out", "hf"))
    assert_same_weights(ours.weights, original.weights)


@pytest.mark.parametrize("keep", [0, 4, 40, 2000, -100])
def test_truncated_gguf_is_refused(
    save_llama: SaveLlama, tmp_path: Path, byte_level_json: str, keep: int
) -> None:
    vocab_size = len(json.loads(byte_level_json)["model"]["vocab"])
    state = save_llama(tmp_path / "hf", vocab_size=vocab_size)
    write_gguf(tmp_path / "x.gguf", state, byte_level_fields(byte_level_json, "smollm"))
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content[:keep])
    (tmp_path / "out").mkdir()
    with pytest.raises(Refused, match="not a GGUF file"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_smollm2_is_as_published(smollm2_folder: Path) -> None:
    """Dimensions as published; packed tensors in file order, so that loading copies nothing."""
    checkpoint = open_folder(smollm2_folder, dtype=torch.float32)
    config = checkpoint.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.hidden_size, config.intermediate_size) == (64, 576, 1536)
    assert (config.vocab_size, config.rope_theta, config.rms_norm_eps) == (49152, 1e5, 1e-5)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (8192, True)
    starts = [getattr(checkpoint.weights, field).data_ptr() for field in packed_parts(config)]
    sizes = [getattr(checkpoint.weights, field).nbytes for field in packed_parts(config)]
    for start, size, following in zip(starts, sizes, starts[1:], strict=False):
        assert start + size == following


# Opened where it lies -----------------------------------------------------------------------------

IDS = random.Random(1).choices(range(260), k=40)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 288}
"""Rows of which every number format has whole blocks."""


def vocabulary(library: str, size: int) -> Fields:
    """The vocabulary of the toys, with as many tokens."""
    fields = byte_level_fields(library, "smollm")
    unused = [f"[PAD{index}]" for index in range(len(fields["tokenizer.ggml.tokens"]), size)]
    fields["tokenizer.ggml.tokens"] += unused
    fields["tokenizer.ggml.token_type"] += [5] * len(unused)
    return fields


@pytest.fixture
def twins(save_llama: SaveLlama, tmp_path: Path, byte_level_json: str) -> Twins:
    """``twins(change, **config)`` writes the same model as a folder and as a file."""

    def write(change: Change | None = None, **settings: Any) -> tuple[Path, Path]:
        settings = {"vocab_size": 260, "std": 0.3, **settings}
        state = save_llama(tmp_path / "hf", **settings)
        if settings.get("tie_word_embeddings"):
            state.pop("lm_head.weight", None)
        fields = vocabulary(byte_level_json, settings["vocab_size"])
        write_gguf(tmp_path / "x.gguf", state, fields, change)
        return tmp_path / "hf", tmp_path / "x.gguf"

    return write


def logits(checkpoint: Checkpoint) -> Tensor:
    """Of a short text, [T, vocab]."""
    conf = compose_conf(["engine=eager", "dtype=float32", "device=cpu", "capacity=64", "cull=none"])
    b = brain.Brain(checkpoint, settings_of(conf))
    return b.read(IDS, range(len(IDS))).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_the_same_model_as_its_folder(
    twins: Twins, tied: bool, dtype: torch.dtype
) -> None:
    folder, path = twins(tie_word_embeddings=tied)
    before = sorted(path.parent.rglob("*"))
    ours, original = open_gguf(path, dtype=dtype), open_folder(folder, dtype=dtype)
    assert ours.config == original.config
    assert_same_weights(ours.weights, original.weights)
    assert (ours.weights.head is ours.weights.embedding) == tied
    for text in TEXTS:
        assert ours.tokenizer.encode(text) == original.tokenizer.encode(text)
    assert ours.tokenizer.eos_ids == {0}
    assert ours.name == "x.gguf"
    assert ours.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(path.parent.rglob("*")) == before


def test_a_file_s_matrices_are_rounded_as_its_folder_s(twins: Twins) -> None:
    folder, path = twins()
    ours = open_gguf(path, dtype=torch.bfloat16, weights=WeightFormat.int8).weights
    original = open_folder(folder, dtype=torch.bfloat16, weights=WeightFormat.int8).weights
    for field in ("embedding", "qkv", "attention_out", "gate_up", "down", "head"):
        matrix, theirs = getattr(ours, field), getattr(original, field)
        assert isinstance(matrix, Int8)
        assert torch.equal(matrix.values, theirs.values)
        assert torch.equal(matrix.scale, theirs.scale)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def factors(scale: float = 1.0) -> Tensor:
    """Of LLAMA3, [head_dim / 2] float64."""
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
    return inverse_frequencies(8, 1e4) / inverse_frequencies(8, 1e4, scaling) * scale


def with_factors(values: Any) -> Change:
    def add_(_: Fields, tensors: Tensors) -> None:
        tensors["rope_freqs.weight"] = np.array(values)

    return add_


def test_frequencies_are_divided_by_what_the_file_says(twins: Twins) -> None:
    stretched = with_factors(factors().numpy().astype(np.float32))
    folder, path = twins(stretched, edit={"rope_parameters": LLAMA3})
    ours, original = (
        open_(at, dtype=torch.float32) for open_, at in ((open_gguf, path), (open_folder, folder))
    )
    assert original.config.rope_scaling is not None
    found = ours.weights.inverse_frequencies
    assert torch.allclose(found, original.weights.inverse_frequencies, rtol=1e-6, atol=0)
    assert not torch.allclose(found, inverse_frequencies(8, 1e4), rtol=0.1)
    assert (logits(ours) - logits(original)).abs().max() < 1e-4


def test_factors_and_linear_scaling_both_count(twins: Twins) -> None:
    def both(fields: Fields, tensors: Tensors) -> None:
        tensors["rope_freqs.weight"] = np.array([1, 2, 3, 4], np.float32)
        fields["llama.rope.scaling.factor"] = 4.0

    _, path = twins(both)
    found = open_gguf(path, dtype=torch.float32).weights.inverse_frequencies
    divisors = 4.0 * torch.arange(1, 5, dtype=torch.float64)
    assert torch.allclose(found, inverse_frequencies(8, 1e4) / divisors, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.ones(5, np.float32), "is F32 [5], expected F32 [4]"),
        (np.ones(4, np.float16), "is F16 [4], expected F32 [4]"),
        (np.array([1, 2, 0, 4], np.float32), "a number that is not above 0"),
        (np.array([1, 2, np.nan, 4], np.float32), "a number that is not above 0"),
        (np.array([1, 2, np.inf, 4], np.float32), "a number that is not above 0"),
    ],
    ids=["too many", "half", "zero", "nan", "infinite"],
)
def test_factors_that_lie_are_refused(
    twins: Twins, values: np.ndarray[Any, Any], told: str
) -> None:
    _, path = twins(with_factors(values))
    with pytest.raises(Refused, match=re.escape(told)):
        open_gguf(path, dtype=torch.float32)


def test_a_folder_cannot_hold_factors(twins: Twins, tmp_path: Path) -> None:
    _, path = twins(with_factors(np.ones(4, np.float32)))
    with pytest.raises(Refused, match=r"config\.json cannot hold what rope_freqs"):
        convert_gguf(path, tmp_path)


def as_integers(_: Fields, tensors: Tensors) -> None:
    tensors["output_norm.weight"] = tensors["output_norm.weight"].astype(np.int32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put(general__architecture="gemma3"), "GGUF architecture 'gemma3' is not supported"),
        (put(general__type="adapter"), "GGUF of type 'adapter' is no whole model"),
        (as_integers, "tensor output_norm.weight has unsupported type I32"),
        (put(split__count=3), "GGUF in 3 files is not supported; make one of them"),
        (put(tokenizer__ggml__model="bert"), "GGUF vocabulary 'bert'"),
        (add, "unexpected tensor blk.0.attn_q.bias"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_line(twins: Twins, change: Change, told: str) -> None:
    _, path = twins(change)
    with pytest.raises(Refused) as refusal:
        open_gguf(path, dtype=torch.float32)
    assert str(refusal.value).startswith(f"{path}: ")
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_a_file_takes_in_memory_is_told_where_it_is_more(twins: Twins, tmp_path: Path) -> None:
    folder, path = twins(**WIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_gguf(path, dtype=torch.float32)
    write(folder, tmp_path / "half.gguf", "BF16")
    with pytest.warns(BrainWarning, match="MB, mostly BF16, are 5 MB of float32 in memory") as told:
        open_gguf(tmp_path / "half.gguf", dtype=torch.float32)
    assert len(told) == 1
    assert gguf_format(tmp_path / "half.gguf") == "BF16"
    assert gguf_format(path) == "F32"


def test_weights_that_would_not_fit_are_refused_before_they_are_read(
    twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = twins()
    monkeypatch.setattr("brain.checkpoints.packing.free_bytes", lambda device: 1000)
    with pytest.raises(Refused, match=r"x\.gguf: its model needs 0\.0 GB of memory"):
        open_gguf(path, dtype=torch.float32)


MEASURE = """
import resource, sys, torch
from pathlib import Path
from brain.checkpoints.gguf_file import open_gguf
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = open_gguf(Path(sys.argv[1]), dtype=torch.bfloat16).weights
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_holds_the_weights_and_little_else(twins: Twins) -> None:
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    _, path = twins(**size)  # 128 MB in the file, 64 in bfloat16
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )
    assert float(done.stdout) < 64 + 40


def test_what_is_read_is_let_go_piece_by_piece(twins: Twins) -> None:
    _, path = twins(**WIDE, num_attention_heads=4, num_key_value_heads=2)
    stored = GgufFile(path).tensors["token_embd.weight"]
    pieces = [len(rows) for rows in Dequantized(GgufFile(path), stored).rows()]
    assert sum(pieces) == 288
    assert max(pieces) <= ROWS_AT_ONCE


# llama.cpp's own numbers --------------------------------------------------------------------------

QUANTIZED = {
    **{"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11},
    **{"Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25},
    **{"IQ4_XS": 30, "IQ3_S": 26, "BF16": 32, "F16": 1, "TQ1_0": 36, "TQ2_0": 37},
}
"""llama.cpp's numbers of what it makes files of."""


def quantized(source: Path, target: Path, kind: int) -> None:
    """Another file of the same model, made by llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = kind, 1, True
    names = (str(path).encode() for path in (source, target))
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(params)) == 0


@pytest.mark.parametrize("kind", QUANTIZED)
def test_numbers_are_those_that_llama_cpp_reads(twins: Twins, tmp_path: Path, kind: str) -> None:
    """It turns what it has quantized back into float32: the same bits."""
    _, path = twins(**WIDE, num_attention_heads=4, num_key_value_heads=2)
    small, back = tmp_path / "small.gguf", tmp_path / "back.gguf"
    quantized(path, small, QUANTIZED[kind])
    quantized(small, back, 0)
    assert gguf_format(back) == "F32"
    assert gguf_format(small)[:2] == kind[:2]
    ours, theirs, exact = (
        open_gguf(file, dtype=torch.float32).weights for file in (small, back, path)
    )
    assert_same_weights(ours, theirs)
    found, original = dequantize(ours.qkv), dequantize(exact.qkv)
    assert not torch.equal(found, original)
    error = (found - original).norm() / original.norm()
    assert error < (0.9 if kind.startswith("TQ") else 0.5)  # of noise, in two to 16 bits


@pytest.mark.parametrize("stretched", [False, True])
def test_llama_cpp_has_the_same_logits(twins: Twins, stretched: bool) -> None:
    pytest.importorskip("llama_cpp")
    change = with_factors(factors().numpy().astype(np.float32)) if stretched else None
    folder, path = twins(change)
    job = Job("llama-cpp", "float32", str(folder), "cpu", 1, 64, gguf=str(path))
    theirs = LlamaCpp(job, cache_type=0)
    theirs.prime(IDS)
    found = logits(open_gguf(path, dtype=torch.float32))[-1]
    assert (torch.from_numpy(theirs.logits().copy()) - found).abs().max() < 2e-3


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "TQ2_0"])
def test_rows_are_dequantized_as_whole_tensors_are(
    save_llama: SaveLlama, tmp_path: Path, byte_level_json: str, kind: str
) -> None:
    """Piece by piece, and put back in order: bit for bit the weights of a float32 file of tensors
    that the reference has dequantized whole.
    """
    number = gguf.GGMLQuantizationType[kind]
    vocabulary = byte_level_fields(byte_level_json, "smollm")
    size = len(vocabulary["tokenizer.ggml.tokens"])
    state = save_llama(
        tmp_path / "hf", vocab_size=size, hidden_size=256, intermediate_size=2 * ROWS_AT_ONCE + 256
    )

    def dequantize_all(_: Fields, tensors: Tensors) -> None:
        for name, data in tensors.items():
            if data.ndim > 1:
                tensors[name] = gguf.dequantize(gguf.quantize(data, number), number)

    write_gguf(tmp_path / "x.gguf", state, vocabulary, kind=number)
    write_gguf(tmp_path / "plain.gguf", state, vocabulary, dequantize_all)
    assert gguf_format(tmp_path / "x.gguf") == kind
    ours, plain = (
        open_gguf(tmp_path / name, dtype=torch.float32) for name in ("x.gguf", "plain.gguf")
    )
    assert_same_weights(ours.weights, plain.weights)
