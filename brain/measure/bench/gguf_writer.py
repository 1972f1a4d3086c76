"""A Hugging Face folder as a GGUF file, for programs that read nothing else.

Source of names and layouts: the GGUF specification and llama.cpp's ``convert_hf_to_gguf.py``.
"""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor

from brain.checkpoints.families import FAMILIES
from brain.checkpoints.folder import CONFIG, stored_model
from brain.checkpoints.gguf_file import UNROTATED_EVERY, gguf_name
from brain.checkpoints.hf_config import read_settings
from brain.checkpoints.llama_names import Part, packed_parts
from brain.errors import Refused
from brain.files import cache_folder
from brain.machine.built_folder import ensure_built
from brain.machine.integrity import files_sha256
from brain.machine.progress import progress_bar
from brain.tokenizers.gguf_vocabulary import ByteLevelFields, vocabulary_fields
from brain.tokens import Tokenizer, load_tokenizer
from compiled.llama import UNROTATED, LlamaConfig
from compiled.rope import inverse_frequencies

FORMAT = 2  # of the written file; a new number makes every cache convert again
FILE = "model.gguf"
ROPE_FACTORS = "rope_freqs.weight"

FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
}
"""Number formats of the matrices. Norms are always float32, as llama.cpp demands."""


def converted_gguf(folder: Path, kind: str, *, cache_dir: Path | None = None) -> Path:
    """The model of a Hugging Face folder as a GGUF file, converted if it is not cached.

    Args:
        folder: the model's.
        kind: one of ``FILE_TYPES``.
        cache_dir: holds the files, which are complete or absent; None: the user's cache folder.
    Raises:
        Refused: the model cannot be converted.
    """
    weights = files_sha256(stored_model(folder).paths, progress=True)
    config = (folder / "config.json").read_text("utf-8")
    key = hashlib.sha256(f"{weights}{config}".encode()).hexdigest()[:12]

    def build(target: Path) -> None:
        write_gguf(folder, target / FILE, kind)

    return ensure_built(cache_folder(cache_dir) / f"gguf-v{FORMAT}-{key}-{kind}", build) / FILE


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Writes the model of a Hugging Face folder, one tensor in memory at a time.

    A byte-level vocabulary with a known way of cutting words goes along; with any other the file
    has none, and a reader takes ids alone. A progress bar goes to standard error. Raises Refused
    for a kind that is unknown or that the model's dimensions do not fit, OSError where the file
    cannot be written.
    """
    if kind not in FILE_TYPES:
        raise Refused(f"GGUF type {kind} is unknown; use {', '.join(FILE_TYPES)}")
    config, tensors, _ = stored_model(folder)
    family = FAMILIES[read_settings(folder / CONFIG)["model_type"]]
    if family.skips_rope and any(
        (kind == UNROTATED) != (layer % UNROTATED_EVERY == UNROTATED_EVERY - 1)
        for layer, kind in enumerate(config.layer_kinds)
    ):
        raise Refused(f"{folder}: GGUF cannot say which layers rotate: there every fourth does not")
    types = tensor_types(config, kind)
    writer = GGUFWriter(path, family.architecture)
    writer.add_file_type(FILE_TYPES[kind])
    add_dimensions(writer, config)
    if family.scaled:
        _add_scales(writer, config)
    _add_vocabulary(writer, folder, config)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    try:
        write_header(writer, types)
        if factors is not None:
            writer.write_tensor_data(factors)
        with progress_bar(f"writing GGUF {kind}", len(types), "tensor") as bar:
            for (name, _), stored_as in types.items():
                stored = tensors[name]
                tensor = stored.file.tensor(stored.name).to(torch.float32)
                if family.permuted:
                    tensor = _permuted(tensor, name, config)
                writer.write_tensor_data(quantize(tensor.contiguous().numpy(), stored_as))
                stored.file.release(stored.name)
                bar.update()
    finally:
        writer.close()


def tensor_types(config: LlamaConfig, kind: str) -> dict[Part, GGMLQuantizationType]:
    """Every tensor of the file, by its Hugging Face name and shape, and how it is stored.

    Raises Refused where rows cannot be cut into the blocks that the kind is made of.
    """
    types: dict[Part, GGMLQuantizationType] = {}
    for name, shape in (part for field in packed_parts(config).values() for part in field):
        stored_as = GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        try:
            quant_shape_to_byte_shape(shape, stored_as)
        except ValueError:
            raise Refused(
                f"{name} has rows of {shape[-1]} numbers, which {kind} cannot store: "
                "its blocks have 32"
            ) from None
        types[name, shape] = stored_as
    return types


def write_header(writer: GGUFWriter, types: Mapping[Part, GGMLQuantizationType]) -> None:
    """Announces these tensors, whose numbers are to be written next, in this order."""
    for (name, shape), stored_as in types.items():
        size = prod(quant_shape_to_byte_shape(shape, stored_as))
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), size, stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def add_dimensions(writer: GGUFWriter, config: LlamaConfig) -> None:
    """The metadata of a model's dimensions, but for RoPE's scaling."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_scales(writer: GGUFWriter, config: LlamaConfig) -> None:
    writer.add_embedding_scale(config.embedding_scale)
    writer.add_residual_scale(config.residual_scale)
    writer.add_attention_scale(1 / config.score_divisor)
    writer.add_logit_scale(config.logit_divisor)


def _add_vocabulary(writer: GGUFWriter, folder: Path, config: LlamaConfig) -> None:
    library = folder / "tokenizer.json"
    tokenizer: Tokenizer = load_tokenizer(folder)
    fields = None
    if library.exists():
        fields = vocabulary_fields(json.loads(library.read_text("utf-8")), config.vocab_size)
    if fields is None:
        writer.add_tokenizer_model("no_vocab")
        return
    add_byte_level(writer, fields)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_ids:
        writer.add_eos_token_id(min(tokenizer.eos_ids))
    writer.add_add_bos_token(tokenizer.wants_bos)


def add_byte_level(writer: GGUFWriter, fields: ByteLevelFields) -> None:
    """The metadata of a byte-level vocabulary."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pre)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.types)
    writer.add_token_merges(fields.merges)


def _rope_factors(config: LlamaConfig) -> np.ndarray[tuple[int], np.dtype[np.float32]] | None:
    """What each pair's angular frequency is divided by, [head_dim / 2]; None without scaling.

    One form for every kind of scaling: unscaled over scaled frequencies.
    """
    if config.rope_scaling is None:
        return None
    plain = inverse_frequencies(config.head_dim, config.rope_theta)
    scaled = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return np.asarray((plain / scaled).numpy(), dtype=np.float32)


def _permuted(tensor: Tensor, name: str, config: LlamaConfig) -> Tensor:
    """Reorders query and key rows, [heads * head_dim, hidden], for llama.cpp's RoPE.

    Hugging Face pairs dimensions i and i + head_dim/2 of a head; llama.cpp pairs neighbours.
    """
    for projection, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        if f".{projection}." in name:
            rows, columns = tensor.shape
            halves = tensor.view(heads, 2, rows // heads // 2, columns)
            return halves.transpose(1, 2).reshape(rows, columns)
    return tensor
