"""Which of the tensors in a folder's files are the model's.

Names are those of ``llama_names``, with or without ``model.`` before them. Where files say a thing
twice and differ, that counts which counts in transformers, and one line says what is overruled.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from brain.checkpoints.llama_names import EMBEDDING, HEAD, packed_parts
from brain.checkpoints.safetensors_file import DTYPES, Entry, TensorFile
from brain.errors import Refused, warn
from compiled.llama import LlamaConfig
from compiled.rope import inverse_frequencies

PREFIX = "model."
OURS = ("model", "layers", "embed_tokens", "norm", "lm_head")
"""What a tensor's name begins with if it would change what this model says."""
FREQUENCIES = "rotary_emb.inv_freq"  # a buffer of old checkpoints, computed here
SIZES = {
    **dict.fromkeys(("embed_tokens", "lm_head"), "vocab_size and hidden_size"),
    **dict.fromkeys(("q_proj", "o_proj"), "num_attention_heads, head_dim and hidden_size"),
    **dict.fromkeys(("k_proj", "v_proj"), "num_key_value_heads, head_dim and hidden_size"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "intermediate_size and hidden_size"),
    **dict.fromkeys(("q_norm", "k_norm"), "head_dim"),
}
"""Keys of config.json that say what shape a tensor has; of other norms it is hidden_size."""
ROWS_AT_ONCE = 1024
"""Rows that are rounded or compared at a time: in float32, several times over, they must not weigh
much.
"""


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    file: TensorFile
    name: str
    entry: Entry

    def __str__(self) -> str:
        return f"{self.name} in {self.file.path.name}"

    @property
    def path(self) -> Path:
        """The file's."""
        return self.file.path

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.entry.shape

    def rows(self) -> Iterator[Tensor]:
        """Some rows at a time, as stored."""
        tensor = self.file.tensor(self.name)
        tensor = tensor if tensor.dim() else tensor[None]
        for first in range(0, len(tensor), ROWS_AT_ONCE):
            yield tensor[first : first + ROWS_AT_ONCE]

    def blocks(self) -> None:
        """It is not in blocks."""

    def release(self) -> None:
        """Lets go of its resident pages."""
        self.file.release(self.name)


Tensors = dict[str, Stored]


def model_tensors(
    config: LlamaConfig, files: Sequence[TensorFile], weight_map: Mapping[str, str]
) -> tuple[LlamaConfig, Tensors]:
    """The model's tensors by their names in ``llama_names``, and its dimensions, in which the head
    is tied only if the files do not hold another one. Raises Refused for weights whose names,
    shapes or dtypes are not exactly the model's.

    Args:
        config: What config.json says.
        files: The weight files, in the order of their names.
        weight_map: What an index says about who holds which tensor; empty without one.
    """
    expected = {name: shape for parts in packed_parts(config).values() for name, shape in parts}
    expected[HEAD] = (config.vocab_size, config.hidden_size)
    found = _by_model_name(_by_name(files, weight_map), expected)
    tensors = {name: stored for name, stored in found.items() if name in expected}
    others = [stored for name, stored in found.items() if name not in expected]
    for name, stored in tensors.items():
        _check(stored, expected[name])
    _check_others(others, config)
    if config.tie_word_embeddings:
        config = _tied(config, tensors)
    for name, shape in expected.items():
        if name not in tensors:
            raise _missing(name, shape, files, weight_map)
    return config, tensors


def _by_name(files: Sequence[TensorFile], weight_map: Mapping[str, str]) -> Tensors:
    """Every tensor by the name it is stored under. Of several shards with the same tensor the last
    one counts, whatever the index says.
    """
    found: Tensors = {}
    lines = []
    for file in files:
        for name, entry in file.entries.items():
            stored = Stored(file, name, entry)
            if name in found and not same(found[name], stored):
                lines.append(
                    f"{file.path}: tensor {name} is another one in {found[name].file.path.name}; "
                    f"the last shard counts, as in transformers (the index names "
                    f"{weight_map.get(name, 'none')})"
                )
            found[name] = stored
    _say(lines)
    held = {(name, file.path.name) for file in files for name in file.entries}
    _say(
        [
            f"{found[name].file.path}: tensor {name} is here, and used, though the index says {at}"
            for name, at in weight_map.items()
            if name in found and (name, at) not in held
        ]
    )
    return found


def _say(lines: list[str]) -> None:
    """One line for all of a kind: the first, and how many more there are."""
    if lines:
        more = len(lines) - 1
        warn(lines[0] + (f" (and {more} more like this)" if more else ""))


def _by_model_name(found: Tensors, expected: Mapping[str, object]) -> Tensors:
    """The same by the model's names. Of two spellings of one name that counts which sorts first."""
    chosen: Tensors = {}
    lines = []
    for spelling in sorted(found):
        name, stored = spelling, found[spelling]
        if spelling.removeprefix(PREFIX) in expected:
            name = spelling.removeprefix(PREFIX)
        elif PREFIX + spelling in expected:
            name = PREFIX + spelling
        if name not in chosen:
            chosen[name] = stored
        elif not same(chosen[name], stored):
            lines.append(
                f"{chosen[name].file.path}: tensor {chosen[name].name} counts; {stored}, its other "
                "spelling, is another one and is overruled, as in transformers"
            )
    _say(lines)
    return chosen


def _check(stored: Stored, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of the model that is not as config.json says."""
    what = f"{stored.file.path}: tensor {stored.name}"
    if stored.entry.shape != shape:
        keys = SIZES.get(stored.name.split(".")[-2], "hidden_size")
        raise Refused(
            f"{what} has shape {list(stored.entry.shape)}, config.json implies {list(shape)} by "
            f"{keys}"
        )
    if stored.entry.dtype not in DTYPES:
        raise Refused(f"{what} has dtype {stored.entry.dtype}; use {', '.join(DTYPES)}")


def _check_others(others: Sequence[Stored], config: LlamaConfig) -> None:
    """Refuses tensors that would change what the model says, and names what is not used."""
    buffers = [stored for stored in others if stored.name.endswith(FREQUENCIES)]
    others = [stored for stored in others if not stored.name.endswith(FREQUENCIES)]
    for stored in others:
        if stored.name.split(".")[0] in OURS:
            raise _unexpected(stored, config)
    _say(
        [
            f"{stored.file.path}: tensor {stored.name} is no part of the model in config.json and "
            "is not used"
            for stored in others
        ]
    )
    _say(
        [
            f"{stored.file.path}: tensor {stored.name} says other frequencies than config.json's "
            "rope_theta and is overruled, as in transformers"
            for stored in buffers
            if not _frequencies_agree(stored, config)
        ]
    )


def _unexpected(stored: Stored, config: LlamaConfig) -> Refused:
    reason = "it is not this family's"
    if stored.name.endswith(".bias"):
        reason = "no such bias is supported, nor does config.json speak of it"
    elif ".layers." in f".{stored.name}":
        reason = f"it is not this family's, or more than config.json's {config.num_layers} layers"
    return Refused(f"{stored.file.path}: unexpected tensor {stored.name}: {reason}")


def _frequencies_agree(stored: Stored, config: LlamaConfig) -> bool:
    """Whether a stored buffer is what is computed, with scaling or without, but for rounding."""
    if stored.entry.dtype not in DTYPES or stored.entry.shape != (config.head_dim // 2,):
        return False
    told = stored.file.tensor(stored.name).double()
    return any(
        torch.allclose(
            told, inverse_frequencies(config.head_dim, config.rope_theta, how), rtol=1e-2, atol=1e-6
        )
        for how in (config.rope_scaling, None)
    )


def _tied(config: LlamaConfig, tensors: Tensors) -> LlamaConfig:
    """One matrix for embedding and head, stored under either name, unless both are stored and
    differ.
    """
    embedding, head = tensors.get(EMBEDDING), tensors.get(HEAD)
    if embedding is None and head is not None:
        tensors[EMBEDDING] = head
    elif embedding is not None and head is not None and not same(embedding, head):
        warn(
            f"{head.file.path}: {HEAD} is stored and is not {EMBEDDING}, so it is used; "
            "config.json's tie_word_embeddings true is overruled, as in transformers"
        )
        return replace(config, tie_word_embeddings=False)
    if EMBEDDING in tensors:
        tensors[HEAD] = tensors[EMBEDDING]
    return config


def _missing(
    name: str, shape: tuple[int, ...], files: Sequence[TensorFile], weight_map: Mapping[str, str]
) -> Refused:
    where = str(files[0].path) + (f" and {len(files) - 1} more shards" if len(files) > 1 else "")
    hint = f"; the index puts it in {weight_map[name]}" if name in weight_map else ""
    if name == HEAD:
        hint += " (or set tie_word_embeddings)"
    return Refused(f"{where}: tensor {name} is missing, config.json implies {list(shape)}{hint}")


def same(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors hold the same numbers."""
    if one.entry.shape != other.entry.shape:
        return False
    if not {one.entry.dtype, other.entry.dtype} <= set(DTYPES):
        return False
    if prod(one.entry.shape) == 0:
        return True
    pairs = zip(one.rows(), other.rows(), strict=True)
    alike = all(torch.equal(a.float(), b.float()) for a, b in pairs)
    for stored in (one, other):
        stored.release()
    return alike
