"""GGUF files of Llama models, dequantized and renamed into a Hugging Face folder.

Source of names and layouts: the GGUF specification and llama.cpp's ``convert_hf_to_gguf.py``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor
from tqdm import tqdm

from brain.checkpoints.hf_config import parse_config
from brain.checkpoints.llama_names import EMBEDDING, HEAD, packed_parts
from brain.checkpoints.safetensors_file import write_safetensors
from brain.errors import Refused, one_line
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


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes a GGUF model into an existing folder as a standard Hugging Face model.

    config.json, generation_config.json, tokenizer files and model.safetensors (float32), whose
    tensors lie in the order of ``packed_parts``: loading them needs no copy. A progress bar goes
    to standard error. Raises Refused where the file is not a Llama model that can be converted,
    OSError where the folder cannot be written.
    """
    try:
        reader = GGUFReader(path)
        fields: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise Refused(f"{path}: not a GGUF file ({one_line(error)}); fetch it again") from None
    settings = _hf_settings(fields, tensors, str(path))
    config = parse_config(settings, str(path))
    files = tokenizer_files(fields, str(path))
    files["config.json"] = _json(settings)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    files["generation_config.json"] = _json({key: settings[key] for key in ids if key in settings})
    for name, content in files.items():
        (folder / name).write_bytes(content)

    parts = [part for field in packed_parts(config).values() for part in field]
    unexpected = set(tensors) - {gguf_name(name) for name, _ in parts}
    if unexpected:
        raise Refused(f"{path}: unexpected tensor {min(unexpected)}: it cannot be converted")
    with tqdm(total=len(parts), desc=f"converting {path.stem}", unit="tensor") as bar:

        def maker(name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
            def make() -> Tensor:
                tensor = _read(tensors, name, shape, config, path)
                bar.update()
                return tensor

            return make

        write_safetensors(
            folder / "model.safetensors",
            [(name, shape, maker(name, shape)) for name, shape in parts],
            torch.float32,
        )


def _hf_settings(
    fields: dict[str, Any], tensors: dict[str, ReaderTensor], where: str
) -> dict[str, Any]:
    """The model's config.json."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise Refused(f"{where}: GGUF architecture {architecture!r} is not supported; use llama")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise Refused(f"{where}: GGUF with RoPE scaling is not supported; use a safetensors folder")
    if fields.get("llama.expert_count"):
        raise Refused(f"{where}: mixture of experts is not supported; use a dense llama model")

    def required(key: str) -> Any:
        value = fields.get(f"llama.{key}")
        if not isinstance(value, int | float):
            raise Refused(f"{where}: GGUF metadata llama.{key} is missing or is not one number")
        return value

    hidden, heads = required("embedding_length"), required("attention.head_count")
    head_dim = fields.get("llama.attention.key_length") or hidden // max(heads, 1)
    rotated = fields.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise Refused(f"{where}: {rotated} of {head_dim} head dimensions rotated; use all of them")
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", [])),
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": required("context_length"),
        "rms_norm_eps": _shortest(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0)),
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
    return float(str(np.float32(value)))


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    if name in RENAMED:
        return RENAMED[name]
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{RENAMED_IN_LAYER[inner]}.weight"


def _read(
    tensors: dict[str, ReaderTensor],
    name: str,
    shape: tuple[int, ...],
    config: LlamaConfig,
    path: Path,
) -> Tensor:
    """One tensor, float32, in Hugging Face's layout."""
    stored = tensors.get(gguf_name(name))
    if stored is None:
        raise Refused(f"{path}: tensor {gguf_name(name)} is missing; expected {list(shape)}")
    found = tuple(int(size) for size in reversed(stored.shape))
    if found != shape:
        raise Refused(
            f"{path}: tensor {stored.name} has shape {list(found)}, expected {list(shape)}"
        )
    try:
        values = dequantize(stored.data, stored.tensor_type)
    except NotImplementedError:
        kind = stored.tensor_type.name
        raise Refused(f"{path}: tensor {stored.name} has unsupported type {kind}") from None
    tensor = torch.from_numpy(np.array(values, dtype=np.float32)).view(shape)
    for projection, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        if f".{projection}." in name:
            tensor = _unpermute(tensor, heads)
    return tensor


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's reordering of query and key rows, [heads * head_dim, hidden].

    It pairs RoPE's dimensions as neighbours (2i, 2i+1); Hugging Face pairs i and i + head_dim/2.
    """
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _json(settings: dict[str, Any]) -> bytes:
    return json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"
