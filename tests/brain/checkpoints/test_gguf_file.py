"""GGUF conversion: the folder it writes is the model it was given."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from brain.checkpoints import open_folder
from brain.checkpoints.gguf_file import convert_gguf
from brain.checkpoints.llama_names import packed_parts
from brain.errors import Refused
from gguf_files import Change, byte_level_fields, write_gguf

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
    for field in ours.weights._fields:
        assert torch.equal(getattr(ours.weights, field), getattr(original.weights, field)), field
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
        (put(general__architecture="qwen2"), "architecture 'qwen2'"),
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
            "blk.2.attn_k.weight: it is not Llama's, or more than llama.bl",
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
    for field in ours.weights._fields:
        assert torch.equal(getattr(ours.weights, field), getattr(original.weights, field)), field


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
