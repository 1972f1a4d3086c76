"""A tiny random model of each family that opens, as transformers writes it and as a GGUF file."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor

from brain.checkpoints.families import FAMILIES
from gguf_files import Fields, byte_level_fields, write_gguf

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 16, "rope_theta": 10000.0},
}
SCALES = {
    "embedding_multiplier": 5.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
    "logits_scaling": 3.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "sliding_window": 64},
    "qwen3": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "smollm3": {},
    "granite": {"tie_word_embeddings": True, **SCALES},
}
"""What each has beside SHAPE, by ``model_type``."""
NEW = ("qwen2", "qwen3", "smollm3", "granite")
"""Those that are more than a Llama."""


def save_family(
    folder: Path, name: str, tokenizer: str, *, dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, Tensor]:
    """Writes a model whose every parameter is random, biases and gains too, and returns its float32
    state dict. ``tokenizer``: its tokenizer.json.
    """
    torch.manual_seed(len(name))
    config = transformers.AutoConfig.for_model(name, **{**SHAPE, **MODELS[name], **more})
    library: Any = transformers.AutoModelForCausalLM
    model = library.from_config(config, dtype=dtype)
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in key), std=0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    return {key: tensor.float() for key, tensor in model.state_dict().items()}


def save_as_gguf(
    folder: Path,
    path: Path,
    state: dict[str, Tensor],
    tokenizer: str,
    kind: gguf.GGMLQuantizationType | None = None,
) -> None:
    """The same as llama.cpp's converter writes it, its matrices of this kind; None: float32."""
    config = json.loads((folder / "config.json").read_text())
    family = FAMILIES[config["model_type"]]
    kept = dict(state)
    if config.get("tie_word_embeddings", family.tied):
        kept.pop("lm_head.weight", None)

    def add(fields: Fields, tensors: dict[str, Any]) -> None:
        arch = family.architecture
        fields[f"{arch}.rope.freq_base"] = float(config["rope_parameters"]["rope_theta"])
        fields["tokenizer.ggml.padding_token_id"] = 0  # its default is no token of so few
        if family.scaled:
            fields[f"{arch}.embedding_scale"] = config["embedding_multiplier"]
            fields[f"{arch}.residual_scale"] = config["residual_multiplier"]
            fields[f"{arch}.attention.scale"] = config["attention_multiplier"]
            fields[f"{arch}.logit_scale"] = config["logits_scaling"]

    write_gguf(
        path,
        kept,
        byte_level_fields(tokenizer, "smollm"),
        add,
        architecture=family.architecture,
        permuted=family.permuted,
        kind=kind,
    )
