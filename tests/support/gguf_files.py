"""GGUF files of tiny models, and the metadata of their vocabularies."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from torch import Tensor

from brain.checkpoints.gguf_file import RENAMED, RENAMED_IN_LAYER

Fields = dict[str, Any]
Tensors = dict[str, Any]
"""Arrays; or the blocks of a matrix [rows, bytes] uint8, with their kind."""
Change = Callable[[Fields, Tensors], None]
"""What is done to the metadata and the tensors before they are written."""


def permute(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's reordering of query and key rows, as in its convert_hf_to_gguf.py."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    state: dict[str, Tensor],
    vocabulary: Fields,
    change: Change | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    architecture: str = "llama",
    permuted: bool = True,
    kind: gguf.GGMLQuantizationType | None = None,
) -> None:
    """A GGUF of a tiny model with this vocabulary, whose dimensions are those of its tensors: of
    ``heads``, queries and keys. ``permuted``: whether rows of these are in RoPE's pairs. ``kind``
    of its matrices; None: float32.
    """
    names = [name for name in state if name.endswith("mlp.gate_proj.weight")]
    wide, hidden = state[names[0]].shape
    head_dim = len(state["model.layers.0.self_attn.q_proj.weight"]) // heads[0]
    dimensions = {
        "block_count": len(names),
        "context_length": 128,
        "embedding_length": hidden,
        "feed_forward_length": wide,
        "attention.head_count": heads[0],
        "attention.head_count_kv": heads[1],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": head_dim,
    }
    if head_dim * heads[0] != hidden:
        dimensions |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    fields: Fields = {f"{architecture}.{key}": value for key, value in dimensions.items()}
    fields |= {"general.architecture": architecture, **vocabulary}
    tensors: Tensors = {}
    for name, tensor in state.items():
        if permuted and ("q_proj" in name or "k_proj" in name):
            tensor = permute(tensor, heads["k_proj" in name])
        if name in RENAMED:
            tensors[RENAMED[name]] = tensor.numpy()
        else:
            _, _, layer, whole = name.split(".", 3)
            inner, _, what = whole.rpartition(".")
            tensors[f"blk.{layer}.{RENAMED_IN_LAYER[inner]}.{what}"] = tensor.numpy()
    if change:
        change(fields, tensors)
    write_fields(path, fields, tensors, kind)


def write_fields(
    path: Path, fields: Fields, tensors: Tensors, kind: gguf.GGMLQuantizationType | None = None
) -> None:
    """A GGUF file of these."""
    fields = dict(fields)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, data in tensors.items():
        if isinstance(data, tuple):
            writer.add_tensor(name, data[0], raw_dtype=data[1])
        elif kind is None or data.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(data))
        else:
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_fields(library: str, pre: str, *, eos: int = 0) -> Fields:
    """The metadata of the byte-level vocabulary in a ``tokenizer.json``, cut as ``pre`` says."""
    spec = json.loads(library)
    kinds = {index: (token, 1) for token, index in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        kinds[token["id"]] = (token["content"], 3 if token["special"] else 4)
    assert sorted(kinds) == list(range(len(kinds)))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [kinds[index][0] for index in range(len(kinds))],
        "tokenizer.ggml.token_type": [kinds[index][1] for index in range(len(kinds))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": eos,
    }


def sentencepiece_fields(model: bytes, user_defined: Sequence[str] = ()) -> Fields:
    """The metadata of a SentencePiece model."""
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = original.get_piece_size()

    def kind(index: int) -> int:
        if original.is_unknown(index):
            return 2
        if original.is_control(index):
            return 3
        if original.id_to_piece(index) in user_defined:
            return 4
        return 6 if original.is_byte(index) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [original.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
