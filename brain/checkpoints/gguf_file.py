"""GGUF files of Llama models, dequantized and renamed into a Hugging Face folder.

Source of names and layouts: the GGUF specification and llama.cpp's ``convert_hf_to_gguf.py``.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from brain.checkpoints.gguf_header import GgufFile, StoredTensor
from brain.checkpoints.hf_config import parse_config
from brain.checkpoints.llama_names import EMBEDDING, HEAD, Part, packed_parts
from brain.checkpoints.safetensors_file import write_safetensors
from brain.errors import Refused, shown
from brain.machine.streams import progress_bar
from brain.tokenizers.gguf_vocabulary import tokenizer_files
from compiled.llama import LlamaConfig

RENAMED = {
    EMBEDDING: "token_embd.weight",
    HEAD: "output.weight",
    "model.norm.weight": "output_norm.weight",
}
RENAMED_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
READABLE = frozenset(
    GGMLQuantizationType[name]
    for name in (
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    )
)
"""Number formats that the gguf package can turn into float32."""


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes a GGUF model into an existing folder as a standard Hugging Face model, float32, whose
    tensors lie in the order of ``packed_parts``: loading them needs no copy. Raises Refused where
    the file is not a Llama model that can be converted, OSError where the folder cannot be written.
    """
    file = GgufFile(path)
    settings = _hf_settings(file.fields, file.tensors, str(path))
    config = parse_config(settings, str(path))
    files = tokenizer_files(file.fields, str(path))
    parts = [part for field in packed_parts(config).values() for part in field]
    _check_tensors(file, parts, path)
    files["config.json"] = _json(settings)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    files["generation_config.json"] = _json({key: settings[key] for key in ids if key in settings})
    for name, content in files.items():
        (folder / name).write_bytes(content)

    with progress_bar(total=len(parts), desc=f"converting {path.stem}", unit="tensor") as bar:

        def make(name: str, shape: tuple[int, ...]) -> Tensor:
            tensor = _read(file, name, shape, config)
            bar.update()
            return tensor

        tensors = [(name, shape, partial(make, name, shape)) for name, shape in parts]
        write_safetensors(folder / "model.safetensors", tensors, torch.float32)


def _check_tensors(file: GgufFile, parts: Sequence[Part], path: Path) -> None:
    """Refuses, before anything is written, tensors that are not exactly the model's."""
    unexpected = set(file.tensors) - {gguf_name(name) for name, _ in parts}
    if unexpected:
        raise Refused(f"{path}: unexpected tensor {min(unexpected)}: it cannot be converted")
    for name, shape in parts:
        stored, what = file.tensors.get(gguf_name(name)), f"{path}: tensor {gguf_name(name)}"
        if stored is None:
            raise Refused(f"{what} is missing; expected {list(shape)}")
        if stored.shape != shape:
            raise Refused(f"{what} has shape {list(stored.shape)}, expected {list(shape)}")
        if stored.kind not in READABLE:
            raise Refused(f"{what} has unsupported type {stored.kind.name}")


def _hf_settings(
    fields: dict[str, Any], tensors: dict[str, StoredTensor], where: str
) -> dict[str, Any]:
    """The model's config.json."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise Refused(
            f"{where}: GGUF architecture {shown(architecture)} is not supported; use llama"
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise Refused(f"{where}: GGUF with RoPE scaling is not supported; use a safetensors folder")
    if fields.get("llama.expert_count"):
        raise Refused(f"{where}: mixture of experts is not supported; use a dense llama model")

    def required(key: str) -> Any:
        value = fields.get(f"llama.{key}")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise Refused(f"{where}: GGUF metadata llama.{key} is missing or is not one number")
        return value

    def whole(key: str) -> int:
        value = required(key)
        if not isinstance(value, int) or value < 1:
            raise Refused(f"{where}: GGUF metadata llama.{key} is {value}; use a whole number")
        return value

    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    head_dim = fields.get("llama.attention.key_length") or hidden // heads
    rotated = fields.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        of = f"{shown(rotated)} of {shown(head_dim)}"
        raise Refused(f"{where}: {of} head dimensions rotated; use all of them")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise Refused(f"{where}: GGUF metadata tokenizer.ggml.tokens is missing or is not a list")
    theta = required("rope.freq_base") if "llama.rope.freq_base" in fields else 10000.0
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": required("context_length"),
        "rms_norm_eps": _shortest(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(theta),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": RENAMED[HEAD] not in tensors,
        "torch_dtype": "float32",
    }
    for role, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int):
            settings[f"{role}_token_id"] = index
    return settings


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 rather than 9.999999747e-06."""
    with np.errstate(over="ignore"):  # what becomes infinite is refused with the settings
        return float(str(np.float32(value)))


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    if name in RENAMED:
        return RENAMED[name]
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{RENAMED_IN_LAYER[inner]}.weight"


def _read(file: GgufFile, name: str, shape: tuple[int, ...], config: LlamaConfig) -> Tensor:
    """One tensor, float32, in Hugging Face's layout."""
    stored = file.tensors[gguf_name(name)]
    values = dequantize(file.stored(stored), stored.kind)
    tensor = torch.from_numpy(np.array(values, dtype=np.float32)).view(shape)
    for projection, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        if f".{projection}." in name:
            tensor = _unpermute(tensor, heads)
    return tensor


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's reordering of query and key rows, [heads * head_dim, hidden]: it pairs
    RoPE's dimensions as neighbours (2i, 2i+1), Hugging Face pairs i and i + head_dim/2.
    """
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _json(settings: dict[str, Any]) -> bytes:
    return json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"
