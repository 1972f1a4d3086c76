"""A folder of seeded random weights in the dimensions of a known model: to be timed, not read.

    python profiles/seeded_folder.py FOLDER tinyllama        # or llama-8b, smollm2

Writes config.json, the smallest byte-level tokenizer and bfloat16 weights, a shard for every few
layers, none of which is ever in memory with another.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from brain.checkpoints.folder import INDEX
from brain.checkpoints.llama_names import packed_parts
from brain.measure.golden.seeded import TINYLLAMA, SeededModel
from compiled.llama import LlamaConfig

SHARD_BYTES = 2 << 30
SHAPES = {
    "smollm2": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, 8192, None, True),
    "tinyllama": replace(TINYLLAMA, max_position_embeddings=8192),
    "llama-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, 8192),
}


def config_json(config: LlamaConfig) -> dict[str, object]:
    """In Hugging Face's terms."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def tokenizer_json() -> str:
    """256 bytes, one pair of them, since GGUF has no vocabulary without, and one token that ends a
    text.
    """
    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    library = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|end|>"])
    return str(library.to_str())


def shards(model: SeededModel) -> Iterator[dict[str, Tensor]]:
    """The model's tensors, as many at a time as make a shard."""
    shard: dict[str, Tensor] = {}
    for parts in packed_parts(model.config).values():
        for name, shape in parts:
            shard[name] = torch.empty(shape, dtype=torch.bfloat16)
            model.fill(shard[name], name)
            if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
                yield shard
                shard = {}
    if shard:
        yield shard


def write_folder(folder: Path, model: SeededModel) -> None:
    """Fills a folder with the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model.config), indent=1) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer_json())
    where: dict[str, str] = {}
    for number, shard in enumerate(shards(model)):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}) + "\n")


def main() -> None:
    """Writes the folder that is asked for."""
    parser = argparse.ArgumentParser(description="a model folder of seeded random weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", choices=sorted(SHAPES))
    asked = parser.parse_args()
    write_folder(asked.folder, SeededModel(asked.shape, SHAPES[asked.shape], seed=7))
    size = sum(file.stat().st_size for file in asked.folder.iterdir())
    print(f"{asked.folder}: {asked.shape}, {size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
