"""Models whose weights are a function of a seed: a golden of them needs no weight file.

Every tensor is a slice, wrapped around, of one block of normal noise, at an offset of its own.
The numbers are representable in bfloat16, so the model is the same in every dtype.
"""

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.llama_names import packed_parts
from brain.tokenizers.vocabulary import Vocabulary
from brain.tokens import Tokenizer
from compiled.llama import LlamaConfig, Weights, frequency_table, weight_shapes

BLOCK = (1 << 24) - 3  # elements; odd, so that rows of a matrix do not repeat when it wraps around
STRIDE = 7_368_787  # elements between the offsets of two tensors, a prime
DEVIATION = 0.02
NORM_DEVIATION = 0.1  # of the gains of a norm, around 1
EVERY_MODEL_HAS = 12  # so many fields of LlamaConfig


@dataclass(frozen=True)
class SeededModel:
    """A model's dimensions and the seed of its weights."""

    name: str
    config: LlamaConfig
    seed: int

    @cached_property
    def block(self) -> Tensor:
        """[BLOCK] bfloat16, normal with DEVIATION."""
        generator = np.random.Generator(np.random.Philox(self.seed))
        noise = generator.standard_normal(BLOCK, dtype=np.float32)
        return (torch.from_numpy(noise) * DEVIATION).bfloat16()

    @cached_property
    def _offsets(self) -> dict[str, int]:
        names = [name for parts in packed_parts(self.config).values() for name, _ in parts]
        return {name: index * STRIDE % BLOCK for index, name in enumerate(names)}

    def fill(self, tensor: Tensor, name: str) -> None:
        """Writes the weights of a Hugging Face tensor into a contiguous one of any dtype."""
        flat = tensor.view(-1)
        start, filled = self._offsets[name], 0
        while filled < len(flat):
            part = self.block[start : start + len(flat) - filled]
            flat[filled : filled + len(part)] = part
            start, filled = 0, filled + len(part)
        if name.endswith("norm.weight"):
            gains = 1.0 + flat.float() * (NORM_DEVIATION / DEVIATION)
            flat.copy_(gains.bfloat16())

    def sha256(self) -> str:
        """Identifies dimensions and weights; 64 hex digits."""
        digest = hashlib.sha256(f"{_told(self.config)} {STRIDE} {NORM_DEVIATION}".encode())
        digest.update(self.block.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def checkpoint(self, dtype: torch.dtype, device: torch.device) -> Checkpoint:
        """The model, ready for a brain. Its tokenizer knows no text."""
        shapes = weight_shapes(self.config)
        packed: dict[str, Tensor] = {}
        for field, parts in packed_parts(self.config).items():
            packed[field] = torch.empty(shapes[field], dtype=dtype)
            flat, start = packed[field].view(-1), 0
            for name, shape in parts:
                end = start + int(np.prod(shape))
                self.fill(flat[start:end], name)
                start = end
        packed.setdefault("head", packed["embedding"])
        tensors = {**packed, "inverse_frequencies": frequency_table(self.config)}
        return Checkpoint(
            name=self.name,
            config=self.config,
            weights=Weights(**{name: tensor.to(device) for name, tensor in tensors.items()}),
            tokenizer=_speechless(self.config.vocab_size),
            hash_weights=self.sha256,
        )


def _told(config: LlamaConfig) -> str:
    """A model's dimensions as they are hashed: of what only some models have, what it has."""
    told = [
        f"{field.name}={getattr(config, field.name)!r}"
        for index, field in enumerate(fields(config))
        if index < EVERY_MODEL_HAS or getattr(config, field.name) != field.default
    ]
    return f"LlamaConfig({', '.join(told)})"


def _speechless(vocab_size: int) -> Tokenizer:
    def split(text: str) -> list[int]:
        return []

    vocabulary = Vocabulary(
        split=split,
        split_plain=split,
        controls={},
        split_parts=lambda parts: [],
        spelling=(None,) * vocab_size,
        leading_space=False,
        lossless=True,  # so every text but the empty one is refused
        id_of=lambda token: None,
    )
    return Tokenizer(vocabulary, bos_id=1, eos_ids=frozenset(), wants_bos=False)


TINYLLAMA = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=2048,
)
"""The dimensions of TinyLlama 1.1B."""

TOY = LlamaConfig(
    vocab_size=32000,
    hidden_size=256,
    intermediate_size=704,
    num_layers=4,
    num_heads=32,
    num_kv_heads=4,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=2048,
)
"""TinyLlama's heads and vocabulary, an eighth as wide and four layers deep."""

SEEDED = {
    model.name: model
    for model in (
        SeededModel("seeded-tinyllama", TINYLLAMA, seed=1100),
        SeededModel("seeded-toy", TOY, seed=4),
    )
}
