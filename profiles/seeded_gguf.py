"""A GGUF file of random blocks in the dimensions of a known model: to be timed, not read.

    python profiles/seeded_gguf.py FILE llama-8b Q4_K_M     # or tinyllama, smollm2; or Q8_0, Q4_0 …

The bits are seeded; scales are such that a weight's spread is one over the root of its columns, as
in a model. ``Q4_K_M`` is llama.cpp's mixture of that name; else all matrices are of one kind. One
tensor at a time is in memory.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from random_blocks import random_rows
from seeded_folder import SHAPES, tokenizer_json

from brain.checkpoints.llama_names import EMBEDDING, HEAD, Part, packed_parts
from brain.measure.bench.gguf_writer import add_byte_level, add_dimensions, write_header
from brain.tokenizers.gguf_vocabulary import vocabulary_fields
from compiled.blocks import KINDS
from compiled.llama import LlamaConfig

Q4_K_M = "Q4_K_M"
MIXES = (Q4_K_M, *KINDS)
NARROW = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What llama.cpp stores rows in that are no whole blocks of 256."""
ROWS_AT_ONCE = 2048
"""Rows that are made at a time."""


def tensor_types(config: LlamaConfig, mix: str) -> dict[Part, GGMLQuantizationType]:
    """Every tensor of the file and how it is stored.

    Args:
        config: The dimensions.
        mix: One of ``MIXES``.
    """
    types = {}
    for name, shape in (part for field in packed_parts(config).values() for part in field):
        kind = "F32"
        if len(shape) > 1:
            kind = _kind_in_q4_k_m(name, config) if mix == Q4_K_M else mix
            if shape[-1] % KINDS[kind].weights:
                kind = NARROW[kind]
        types[name, shape] = GGMLQuantizationType[kind]
    return types


def _kind_in_q4_k_m(name: str, config: LlamaConfig) -> str:
    """Source: ``llama_tensor_get_type`` and ``use_more_bits`` in llama.cpp's llama-quant.cpp."""
    if name == (EMBEDDING if config.tie_word_embeddings else HEAD):
        return "Q6_K"
    if not name.endswith(("v_proj.weight", "down_proj.weight")):
        return "Q4_K"
    layer, layers = int(name.split(".")[2]), config.num_layers
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return "Q6_K" if more else "Q4_K"


def write_seeded(path: Path, config: LlamaConfig, mix: str, *, seed: int = 7) -> None:
    """Writes the file.

    Args:
        path: Where to; what is there is overwritten.
        config: The dimensions.
        mix: One of ``MIXES``.
        seed: Of every number; each tensor has numbers of its own.
    """
    fields = vocabulary_fields(json.loads(tokenizer_json()), config.vocab_size)
    assert fields is not None
    types = tensor_types(config, mix)
    writer = GGUFWriter(path, "llama")
    add_dimensions(writer, config)
    add_byte_level(writer, fields)
    writer.add_eos_token_id(0)
    write_header(writer, types)
    for index, ((_, shape), kind) in enumerate(types.items()):
        is_norm = len(shape) == 1
        made = np.ones(shape, np.float32) if is_norm else _matrix(kind.name, shape, seed, index)
        writer.write_tensor_data(made)
    writer.close()


def _matrix(kind: str, shape: tuple[int, ...], seed: int, index: int) -> npt.NDArray[np.uint8]:
    """Its blocks, [rows, bytes of a row]."""
    rows, columns = shape
    _, weights, size = KINDS[kind]
    made = np.empty((rows, columns // weights * size), np.uint8)
    for number, first in enumerate(range(0, rows, ROWS_AT_ONCE)):
        part = made[first : first + ROWS_AT_ONCE]
        seeds = (seed, index, number)
        part[:] = random_rows(kind, len(part), columns, seeds, columns**-0.5).bytes
    return made


def main() -> None:
    """Writes the file that is asked for."""
    parser = argparse.ArgumentParser(description="a GGUF file of seeded random blocks")
    parser.add_argument("file", type=Path)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("mix", choices=MIXES)
    asked = parser.parse_args()
    write_seeded(asked.file, SHAPES[asked.shape], asked.mix)
    size = asked.file.stat().st_size
    print(f"{asked.file}: {asked.shape}, {asked.mix}, {size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
