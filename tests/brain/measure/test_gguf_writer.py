"""The GGUF files that are written: the same model for whoever reads them."""

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor

import brain
from brain.checkpoints import open_folder
from brain.checkpoints.gguf_file import convert_gguf, gguf_name, token_bytes
from brain.checkpoints.hf_config import read_config
from brain.errors import Refused
from brain.measure.bench.gguf_writer import converted_gguf, write_gguf
from brain.measure.bench.job import Job
from brain.measure.bench.llama_cpp_peer import LlamaCpp
from small_families import NEW, save_family
from toys import assert_same_weights

SaveLlama = Callable[..., dict[str, Tensor]]

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
"""Rows that Q8_0's blocks of 32 fit."""

GGML_F32 = 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_what_is_written_reads_back_as_the_same_model(
    save_llama: SaveLlama, tmp_path: Path, kind: str, tied: bool
) -> None:
    dtype = torch.float32 if kind == "F32" else torch.bfloat16
    save_llama(tmp_path / "hf", dtype=dtype, tie_word_embeddings=tied, rms_norm_eps=1e-5)
    write_gguf(tmp_path / "hf", tmp_path / "x.gguf", kind)
    (tmp_path / "back").mkdir()
    convert_gguf(tmp_path / "x.gguf", tmp_path / "back")

    back, original = (open_folder(tmp_path / f, dtype=torch.float32) for f in ("back", "hf"))
    assert back.config == original.config
    assert_same_weights(back.weights, original.weights)
    text = "hello a 12 <|end|>"
    assert back.tokenizer.encode(text) == original.tokenizer.encode(text)
    assert back.tokenizer.eos_ids == original.tokenizer.eos_ids


@pytest.mark.parametrize(
    ("kind", "error"), [("BF16", 2**-8), ("F16", 2**-11), ("Q8_0", 2**-6), ("Q4_1", 2**-3)]
)
def test_tensors_are_as_near_as_their_format_allows(
    save_llama: SaveLlama, tmp_path: Path, kind: str, error: float
) -> None:
    state = save_llama(tmp_path / "hf", **WIDE)
    write_gguf(tmp_path / "hf", tmp_path / "x.gguf", kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert {gguf_name(name) for name in state} == set(tensors)
    size = sum(tensor.n_bytes for name, tensor in tensors.items() if name != "token_embd.weight")
    assert token_bytes(tmp_path / "x.gguf") == size
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        stored = tensors[gguf_name(name)]
        assert stored.tensor_type.name == kind
        values = dequantize(stored.data, stored.tensor_type)
        bound = error * np.abs(state[name].numpy()).max()
        assert 0 < np.abs(values - state[name].numpy()).max() <= bound
    norm = tensors["blk.0.attn_norm.weight"]
    assert norm.tensor_type.name == "F32"
    assert np.array_equal(norm.data, state["model.layers.0.input_layernorm.weight"].numpy())


def test_a_conversion_is_kept_and_made_anew_for_other_weights(
    save_llama: SaveLlama, tmp_path: Path
) -> None:
    save_llama(tmp_path / "hf")
    first = converted_gguf(tmp_path / "hf", "F32", cache_dir=tmp_path / "cache")
    written = first.stat().st_mtime_ns
    again = converted_gguf(tmp_path / "hf", "F32", cache_dir=tmp_path / "cache")
    assert (again, again.stat().st_mtime_ns) == (first, written)
    save_llama(tmp_path / "hf", std=0.3)
    assert converted_gguf(tmp_path / "hf", "F32", cache_dir=tmp_path / "cache") != first
    assert converted_gguf(tmp_path / "hf", "BF16", cache_dir=tmp_path / "cache").exists()


def test_rows_that_do_not_fit_are_refused_and_leave_nothing(
    save_llama: SaveLlama, tmp_path: Path
) -> None:
    save_llama(tmp_path / "hf", intermediate_size=48)
    with pytest.raises(Refused, match=r"rows of 48 numbers, which Q8_0 cannot store"):
        converted_gguf(tmp_path / "hf", "Q8_0", cache_dir=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("tokenizer", ["kept", "unknown"])
@pytest.mark.parametrize("scaling", ROPE)
def test_llama_cpp_computes_the_same_logits(
    save_llama: SaveLlama, tmp_path: Path, scaling: str, tokenizer: str
) -> None:
    """Weights, their order, RoPE and its scaling; with a vocabulary, and with ids alone."""
    pytest.importorskip("llama_cpp")
    rope = {"rope_type": scaling, "rope_theta": 10000.0, **ROPE[scaling]}
    settings: dict[str, Any] = {**WIDE, "tie_word_embeddings": scaling == "default"}
    save_llama(tmp_path / "hf", std=0.3, edit={"rope_parameters": rope}, **settings)
    stretched = read_config(tmp_path / "hf" / "config.json").rope_scaling
    assert (stretched is None) == (scaling == "default")
    if tokenizer == "unknown":
        library = tmp_path / "hf" / "tokenizer.json"
        text = library.read_text("utf-8")
        library.write_text(text.replace('"use_regex":true', '"use_regex":false'), "utf-8")
        assert library.read_text("utf-8") != text
    write_gguf(tmp_path / "hf", tmp_path / "x.gguf", "F32")
    ids = random.Random(1).choices(range(300), k=40)
    agree(tmp_path / "hf", tmp_path / "x.gguf", ids, largest=1e-3)


@pytest.mark.parametrize("name", NEW)
def test_a_written_family_is_read_back(name: str, tmp_path: Path, byte_level_json: str) -> None:
    """The same configuration and, in float32, the same bits; llama.cpp agrees where it is there."""
    folder = tmp_path / "hf"
    save_family(folder, name, byte_level_json, hidden_size=64, num_hidden_layers=4)
    write_gguf(folder, tmp_path / "x.gguf", "F32")
    (tmp_path / "back").mkdir()
    convert_gguf(tmp_path / "x.gguf", tmp_path / "back")
    back, original = (open_folder(at, dtype=torch.float32) for at in (tmp_path / "back", folder))
    assert back.config == original.config
    assert_same_weights(back.weights, original.weights)
    if importlib.util.find_spec("llama_cpp"):
        ids = random.Random(1).choices(range(260), k=40)
        agree(folder, tmp_path / "x.gguf", ids, largest=1e-3)


def test_layers_that_gguf_cannot_name_are_refused(tmp_path: Path, byte_level_json: str) -> None:
    save_family(tmp_path / "hf", "smollm3", byte_level_json, no_rope_layers=[1, 0, 1, 1])
    with pytest.raises(Refused, match="every fourth does not"):
        write_gguf(tmp_path / "hf", tmp_path / "x.gguf", "F32")


def test_llama_cpp_computes_smollm2s_logits(smollm2_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    write_gguf(smollm2_folder, tmp_path / "x.gguf", "F32")
    ids = random.Random(1).choices(range(49_152), k=24)
    agree(smollm2_folder, tmp_path / "x.gguf", ids, largest=2e-3)


def agree(folder: Path, path: Path, ids: list[int], *, largest: float) -> None:
    """That logits are those of our own float32 read, and more than rounding apart elsewhere."""
    job = Job(
        engine="llama-cpp",
        precision="float32",
        folder=str(folder),
        device="cpu",
        threads=1,
        capacity=256,
        gguf=str(path),
    )
    theirs = LlamaCpp(job, cache_type=GGML_F32)
    theirs.prime(ids[:-1])
    before = torch.from_numpy(theirs.logits().copy())
    theirs.prime(ids)
    found = torch.from_numpy(theirs.logits().copy())
    ours = brain.open("folder", **{"model.path": str(folder)}, capacity=256, dtype="float32")
    ours.prime(ids)
    expected = ours.read().logits[0].float()
    assert (found - expected).abs().max() <= largest
    assert (before - expected).abs().max() > 100 * largest
