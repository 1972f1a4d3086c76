"""A small model for what a real one would take too long to reach: the end of its trained range."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TRAINED = 192
"""Positions that it was trained on."""


def write_toy(folder: Path, text: str) -> None:
    """A Llama with seeded random weights, a token for each byte and a short range, and a text to be
    measured on.
    """
    vocabulary, hidden, inner, layers, heads, kv_heads, size = 257, 64, 128, 3, 4, 2, 16
    draw = np.random.Generator(np.random.PCG64(7))

    def matrix(rows: int, columns: int, scale: float = 1.5) -> np.ndarray[Any, Any]:
        drawn = draw.standard_normal((rows, columns), np.float32)
        return drawn * np.float32(scale / columns**0.5)

    ones = np.ones(hidden, np.float32)
    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden, 8.0),
        "lm_head.weight": matrix(vocabulary, hidden, 2.0),
        "model.norm.weight": ones,
    }
    for layer in range(layers):
        where = f"model.layers.{layer}"
        tensors |= {
            f"{where}.self_attn.q_proj.weight": matrix(heads * size, hidden),
            f"{where}.self_attn.k_proj.weight": matrix(kv_heads * size, hidden),
            f"{where}.self_attn.v_proj.weight": matrix(kv_heads * size, hidden),
            f"{where}.self_attn.o_proj.weight": matrix(hidden, heads * size),
            f"{where}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{where}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{where}.mlp.down_proj.weight": matrix(hidden, inner),
            f"{where}.input_layernorm.weight": ones.copy(),
            f"{where}.post_attention_layernorm.weight": ones.copy(),
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": TRAINED,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(_byte_tokenizer()))
    (folder / "text.txt").write_text(text, "utf-8")


def _byte_tokenizer() -> dict[str, Any]:
    """256 bytes, spelt as GPT-2 spells them, and one token that ends a text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [*map(chr, plain), *(chr(256 + number) for number in range(len(others)))]
    end = "<|end|>"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {"id": 0, "content": end, "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text: index for index, text in enumerate([end, *sorted(letters)])},
            "merges": [],
        },
    }
