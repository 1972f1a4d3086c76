"""GGUF files of the families that open, dequantized: opened as they are, or written as a Hugging
Face folder.

Source of names and layouts: the GGUF specification and llama.cpp's ``convert_hf_to_gguf.py``.
"""

import functools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.families import ARCHITECTURES, Family, remedy
from brain.checkpoints.gguf_header import GgufFile, StoredTensor
from brain.checkpoints.hf_config import CONVERTED_FROM, parse_config
from brain.checkpoints.llama_names import EMBEDDING, HEAD, Part, packed_parts
from brain.checkpoints.packing import bytes_of, load_weights
from brain.checkpoints.safetensors_file import write_safetensors
from brain.errors import Refused, shown, warn
from brain.machine.integrity import files_sha256
from brain.machine.memory import give_back_freed
from brain.machine.progress import progress_bar
from brain.tokenizers.gguf_vocabulary import tokenizer_files
from brain.tokens import gguf_tokenizer
from compiled.blocks import KINDS, Rows
from compiled.llama import LlamaConfig, frequency_table
from conf.schema import WeightFormat

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
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
ROPE_FACTORS = "rope_freqs.weight"
SCALING_TYPE = "rope.scaling.type"
SCALING_FACTORS = ("rope.scaling.factor", "rope.scale_linear")
PLAIN = {
    **{"expert_count": 0, "expert_used_count": 0},
    **{"attention.causal": True, "attention.sliding_window": 0},
    "rope.scaling.attn_factor": 1.0,
}
"""Metadata that would change the arithmetic, and the value at which it does not."""
UNROTATED_EVERY = 4  # layers, of a family that skips RoPE: no metadata say it
READABLE = frozenset(
    GGMLQuantizationType[name]
    for name in (
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    )
)
"""Number formats that the gguf package can turn into float32."""
ROWS_AT_ONCE = 256
"""Rows that are dequantized at a time: in between, they weigh several times as much."""


def open_gguf(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    weights: WeightFormat = WeightFormat.model,
    blocks: bool = False,
) -> Checkpoint:
    """Loads a GGUF file with the tokenizer in it, and writes nothing. Raises Refused, before memory
    is allocated for weights, where something is missing, malformed or not supported. One warning
    tells what its numbers take in memory, where that is more than in the file. ``dtype``,
    ``weights`` and ``blocks`` are those of :func:`brain.checkpoints.folder.open_folder`; with
    ``blocks`` matrices stay where they lie in the file, mapped.
    """
    model = _model(path)
    file, config = model.file, model.config
    frequencies = frequency_table(config)
    if (factors := _rope_factors(file, config)) is not None:
        frequencies /= factors
    tokenizer = gguf_tokenizer(file.fields, str(path))
    _warn_of_size(model, dtype, weights, blocks=blocks)
    give_back_freed()  # before weights are allocated above it
    with progress_bar(f"reading {path.name}", len(model.parts), "tensor", leave=False) as bar:
        keeps = blocks and weights is WeightFormat.model  # matrices in the file's order of rows
        tensors = {}
        for name, shape in model.parts:
            heads = 0 if keeps and len(shape) == 2 else model.heads(name)
            stored = file.tensors[gguf_name(name)]
            tensors[name] = Dequantized(file, stored, heads, bar.update)
        neighbours = keeps and model.family.permuted
        loaded = load_weights(
            config,
            tensors,
            dtype=dtype,
            device=torch.device(device),
            weights=weights,
            blocks=blocks,
            frequencies=frequencies,
            neighbour_heads=(config.num_heads, config.num_kv_heads) if neighbours else (),
        )
    return Checkpoint(
        name=path.name,
        config=config,
        weights=loaded,
        tokenizer=tokenizer,
        hash_weights=lambda: files_sha256([path], progress=True),
    )


def gguf_format(path: Path) -> str:
    """The number format of the most numbers in a GGUF file. Raises Refused."""
    try:
        status = path.stat()
    except OSError:
        return _format(GgufFile(path))  # which says what is wrong
    return _format_at(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(4)
def _format_at(path: Path, changed: int, size: int) -> str:
    """The same; it is asked for several times, and a header takes a while to read."""
    return _format(GgufFile(path))


def gguf_config(path: Path) -> LlamaConfig:
    """The dimensions of a GGUF file's model. Raises Refused."""
    return _model(path).config


def token_bytes(path: Path) -> int:
    """Bytes of a GGUF file's weights that a token needs: everything but an embedding that is not
    the head. Raises Refused.
    """
    tensors = GgufFile(path).tensors
    unread = {ROPE_FACTORS, *([RENAMED[EMBEDDING]] if RENAMED[HEAD] in tensors else [])}
    return sum(stored.end - stored.start for name, stored in tensors.items() if name not in unread)


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes a GGUF model into an existing folder as a standard Hugging Face model, float32, whose
    tensors lie in the order of ``packed_parts``: loading them needs no copy. Raises Refused where
    the file is not a model that can be converted, OSError where the folder cannot be written.
    """
    model = _model(path)
    file, settings, _, parts, _ = model
    if ROPE_FACTORS in file.tensors:
        raise Refused(f"{path}: config.json cannot hold what {ROPE_FACTORS} says; open the file")
    files = tokenizer_files(file.fields, str(path))
    settings[CONVERTED_FROM] = _format(file)
    files["config.json"] = _json(settings)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    files["generation_config.json"] = _json({key: settings[key] for key in ids if key in settings})
    for name, content in files.items():
        (folder / name).write_bytes(content)

    with progress_bar(f"converting {path.stem}", len(parts), "tensor") as bar:

        def make(name: str, shape: tuple[int, ...]) -> Tensor:
            stored = Dequantized(file, file.tensors[gguf_name(name)], model.heads(name))
            tensor = torch.cat(list(stored.rows())).view(shape)
            bar.update()
            return tensor

        tensors = [(name, shape, partial(make, name, shape)) for name, shape in parts]
        write_safetensors(folder / "model.safetensors", tensors, torch.float32)


class Dequantized(NamedTuple):
    """A tensor of a GGUF file as float32, in Hugging Face's layout."""

    file: GgufFile
    stored: StoredTensor
    heads: int = 0  # of queries or keys, whose rows llama.cpp has in another order
    on_release: Callable[[], object] | None = None

    @property
    def path(self) -> Path:
        """The file's."""
        return self.file.path

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.stored.shape

    def rows(self) -> Iterator[Tensor]:
        """Some rows at a time; of a vector its only one."""
        blocks = self.file.stored(self.stored)
        blocks = blocks.reshape(-1, blocks.shape[-1])
        order = _unpermuted(len(blocks), self.heads) if self.heads else np.arange(len(blocks))
        for first in range(0, len(blocks), ROWS_AT_ONCE):
            part = blocks[order[first : first + ROWS_AT_ONCE]]
            with np.errstate(all="ignore"):  # what is not finite is told of when it is read
                values = dequantize(part, self.stored.kind)
            yield torch.from_numpy(np.array(values, dtype=np.float32)).view(len(part), -1)

    def blocks(self) -> Rows | None:
        """Its bytes where they lie, in llama.cpp's order of rows, if they can be multiplied so."""
        kind = self.stored.kind.name
        if kind not in KINDS or len(self.shape) != 2:
            return None
        with warnings.catch_warnings():  # that it cannot be written: nobody means to
            warnings.simplefilter("ignore", UserWarning)
            return Rows(torch.from_numpy(self.file.stored(self.stored)), kind)

    def release(self) -> None:
        """Lets go of its resident pages."""
        self.file.release(self.stored)
        if self.on_release is not None:
            self.on_release()


def _unpermuted(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """Where the rows of a query or key projection lie in the file, [rows]. llama.cpp pairs RoPE's
    dimensions as neighbours (2i, 2i+1), Hugging Face pairs i and i + head_dim/2.
    """
    pairs = np.arange(rows).reshape(heads, -1, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


class _Model(NamedTuple):
    """A GGUF file's model, checked, and nothing of it in memory."""

    file: GgufFile
    settings: dict[str, Any]  # as config.json
    config: LlamaConfig
    parts: list[Part]
    family: Family

    def heads(self, name: str) -> int:
        """How many heads have rows in a tensor that llama.cpp orders by them; 0: it does not."""
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        return heads.get(name.split(".")[-2], 0) if self.family.permuted else 0


def _model(path: Path) -> _Model:
    """The model of a file. Raises Refused where it is malformed or not supported."""
    file = GgufFile(path)
    family = _family(file.fields, str(path))
    settings = _hf_settings(file.fields, file.tensors, family, str(path))
    config = parse_config(settings, str(path))
    parts = [part for field in packed_parts(config).values() for part in field]
    _check_tensors(file, parts, path, family)
    return _Model(file, settings, config, parts, family)


def _format(file: GgufFile) -> str:
    """The number format of the most numbers."""
    numbers: Counter[str] = Counter()
    for stored in file.tensors.values():
        numbers[stored.kind.name] += prod(stored.shape)
    return max(numbers, key=numbers.__getitem__, default="F32")


def _rope_factors(file: GgufFile, config: LlamaConfig) -> Tensor | None:
    """What every frequency is divided by, [head_dim / 2] float64, as in llama.cpp; None: nothing.
    Raises Refused.
    """
    stored = file.tensors.get(ROPE_FACTORS)
    if stored is None:
        return None
    what = f"{file.path}: tensor {ROPE_FACTORS}"
    if stored.shape != (config.head_dim // 2,) or stored.kind is not GGMLQuantizationType.F32:
        told = f"is {stored.kind.name} {list(stored.shape)}"
        raise Refused(f"{what} {told}, expected F32 {[config.head_dim // 2]}")
    factors = torch.cat(list(Dequantized(file, stored).rows())).view(-1).double()
    if not bool(((factors > 0) & factors.isfinite()).all()):
        raise Refused(f"{what} has a number that is not above 0; fetch the file again")
    return factors


def _warn_of_size(
    model: _Model, dtype: torch.dtype, weights: WeightFormat, *, blocks: bool
) -> None:
    """Says what the numbers take in memory, where that is more than the file has."""
    size, needed, made = model.file.path.stat().st_size, 0.0, set()
    for name, shape in model.parts:
        stored = model.file.tensors[gguf_name(name)]
        form, each = str(dtype).removeprefix("torch."), float(dtype.itemsize)
        if len(shape) > 1 and (blocks or weights is WeightFormat.int8):
            form, each = weights.value, bytes_of(shape[1], weights)
            if weights is WeightFormat.model:
                form = "bfloat16"
                if stored.kind.name in KINDS:  # stays as it is
                    needed += stored.end - stored.start
                    continue
        needed += prod(shape) * each
        if len(shape) > 1:
            made.add(form)
    if needed > 1.02 * size:
        warn(
            f"{model.file.path}: its {size / 1e6:,.0f} MB, mostly {_format(model.file)}, are "
            f"{needed / 1e6:,.0f} MB of {' and '.join(sorted(made))} in memory"
        )


def _check_tensors(file: GgufFile, parts: Sequence[Part], path: Path, family: Family) -> None:
    """Refuses tensors that are not exactly the model's."""
    unexpected = set(file.tensors) - {gguf_name(name) for name, _ in parts} - {ROPE_FACTORS}
    if unexpected:
        what = family.architecture
        why = f"it is not of a {what}, or more than {what}.block_count says"
        raise Refused(f"{path}: unexpected tensor {min(unexpected)}: {why}")
    for name, shape in parts:
        stored, what = file.tensors.get(gguf_name(name)), f"{path}: tensor {gguf_name(name)}"
        if stored is None:
            raise Refused(f"{what} is missing; expected {list(shape)}")
        if stored.shape != shape:
            raise Refused(f"{what} has shape {list(stored.shape)}, expected {list(shape)}")
        if stored.kind not in READABLE:
            raise Refused(f"{what} has unsupported type {stored.kind.name}")


def _family(fields: dict[str, Any], where: str) -> Family:
    """The family of a file. Raises Refused."""
    architecture = fields.get("general.architecture")
    if isinstance(architecture, str) and architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    told = f"GGUF architecture {shown(architecture)} is not supported"
    raise Refused(f"{where}: {told}; {remedy(architecture, ARCHITECTURES)}")


def _hf_settings(
    fields: dict[str, Any], tensors: dict[str, StoredTensor], family: Family, where: str
) -> dict[str, Any]:
    """The model's config.json."""
    prefix = family.architecture
    if (kind := fields.get("general.type", "model")) != "model":
        raise Refused(
            f"{where}: GGUF of type {shown(kind)} is no whole model; give the model's file"
        )
    if (count := fields.get("split.count", 1)) not in (0, 1):
        raise Refused(
            f"{where}: GGUF in {shown(count)} files is not supported; make one of them "
            "(llama-gguf-split --merge)"
        )
    # Of the scaled ones llama.cpp takes this for whether there is RoPE at all.
    switch = {"rope.scaling.finetuned": True} if family.scaled else {}
    for name, plain in (PLAIN | switch).items():
        key = f"{prefix}.{name}"
        if fields.get(key, plain) != plain:
            raise Refused(f"{where}: GGUF metadata {key} is {shown(fields[key])}; use {plain}")

    def required(key: str) -> Any:
        value = fields.get(f"{prefix}.{key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # the same in every block
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise Refused(f"{where}: GGUF metadata {prefix}.{key} is missing or is not one number")
        return value

    def whole(key: str) -> int:
        value = required(key)
        if not isinstance(value, int) or value < 1:
            raise Refused(f"{where}: GGUF metadata {prefix}.{key} is {value}; use a whole number")
        return value

    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    kv_heads = heads
    if f"{prefix}.attention.head_count_kv" in fields:
        kv_heads = whole("attention.head_count_kv")
    head_dim = _head_dim(fields, prefix, hidden // heads, where)
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise Refused(f"{where}: GGUF metadata tokenizer.ggml.tokens is missing or is not a list")
    if fields.get(f"{prefix}.vocab_size", len(tokens)) != len(tokens):
        told = shown(fields[f"{prefix}.vocab_size"])
        raise Refused(
            f"{where}: GGUF metadata {prefix}.vocab_size is {told}, tokenizer.ggml.tokens has "
            f"{len(tokens)}; they must agree"
        )
    theta = required("rope.freq_base") if f"{prefix}.rope.freq_base" in fields else 10000.0
    settings = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": required("context_length"),
        "rms_norm_eps": _shortest(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(theta),
        "rope_scaling": _rope_scaling(fields, prefix, where),
        **dict.fromkeys(family.optional_biases, False),
        "tie_word_embeddings": RENAMED[HEAD] not in tensors,
        "torch_dtype": "float32",
    }
    if family.skips_rope:
        settings["no_rope_layer_interval"] = UNROTATED_EVERY
    if family.scaled:
        # What is absent, or 0, does nothing in llama.cpp.
        for name, key, neutral in (
            ("embedding_multiplier", "embedding_scale", 1.0),
            ("residual_multiplier", "residual_scale", 1.0),
            ("attention_multiplier", "attention.scale", head_dim**-0.5),
            ("logits_scaling", "logit_scale", 1.0),
        ):
            said = required(key) if f"{prefix}.{key}" in fields else 0
            settings[name] = _shortest(said) or neutral
    for role, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int):
            settings[f"{role}_token_id"] = index
    return settings


def _head_dim(fields: dict[str, Any], prefix: str, size: int, where: str) -> int:
    """Numbers of a head's query, key and value, all of them rotated; ``size`` by default."""
    key = fields.get(f"{prefix}.attention.key_length", size)
    value = fields.get(f"{prefix}.attention.value_length", size)
    rotated = fields.get(f"{prefix}.rope.dimension_count", key)
    if not key == value == rotated:
        raise Refused(
            f"{where}: GGUF metadata {prefix}.attention.key_length is {shown(key)}, "
            f"{prefix}.attention.value_length {shown(value)} and {prefix}.rope.dimension_count "
            f"{shown(rotated)} (where absent, by embedding_length and head_count); use a model "
            "in which they agree"
        )
    return key  # type: ignore[no-any-return]  # what is no size is refused with the settings


def _rope_scaling(fields: dict[str, Any], prefix: str, where: str) -> dict[str, Any] | None:
    """As in llama.cpp: the type is linear where it is absent, ``none`` overrules a factor, and
    ``scale_linear`` is the old name of the factor.
    """
    scaling_type = f"{prefix}.{SCALING_TYPE}"
    factors = [f"{prefix}.{key}" for key in SCALING_FACTORS]
    kind = fields.get(scaling_type, "linear")
    said = [(key, fields[key]) for key in factors if key in fields]
    if len(said) == 2 and said[0][1] != said[1][1]:
        warn(_overruled(where, said[0], said[1]))
    key, factor = said[0] if said else (factors[0], 0)
    if kind == "none":
        if factor not in (0, 1):
            warn(_overruled(where, (scaling_type, kind), (key, factor)))
        return None
    if kind != "linear":
        told = f"{scaling_type} is {shown(kind)} ({key} {shown(factor)})"
        raise Refused(f"{where}: GGUF metadata {told}; use a model with none or linear")
    return None if factor in (0, 1) else {"rope_type": "linear", "factor": factor}


def _overruled(where: str, first: tuple[str, Any], other: tuple[str, Any]) -> str:
    counts, does_not = (f"{key} {shown(value)}" for key, value in (first, other))
    return f"{where}: GGUF metadata {counts} counts; {does_not} is overruled, as in llama.cpp"


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 rather than 9.999999747e-06."""
    with np.errstate(over="ignore"):  # what becomes infinite is refused with the settings
        return float(str(np.float32(value)))


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    if name in RENAMED:
        return RENAMED[name]
    _, _, layer, whole = name.split(".", 3)
    inner, _, kind = whole.rpartition(".")
    return f"blk.{layer}.{RENAMED_IN_LAYER[inner]}.{kind}"


def _json(settings: dict[str, Any]) -> bytes:
    return json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"
