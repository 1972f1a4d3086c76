"""``config.json`` of a Hugging Face folder, checked value by value, as a ``LlamaConfig``.

One function for each fact, which reads every key that speaks of it. Where two keys disagree, that
one counts which counts in transformers, and one line says what is overruled. Defaults for absent
keys are those of transformers, family by family (``families``).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brain.checkpoints.families import FAMILIES, Family, remedy
from brain.errors import Refused, shown, warn
from brain.files import read_object
from compiled.llama import ROTATED, UNROTATED, LlamaConfig
from compiled.rope import RopeScaling

CONVERTED_FROM = "converted_from"
"""Our own key: the number format of the file that the folder was made of, as GGUF names it."""
MAX_SIZE, MAX_LAYERS = 1 << 24, 4096
MOST_SCALE = 1e6  # beyond it, float32 would not hold the squares


def read_config(path: Path) -> LlamaConfig:
    """The model's dimensions. Raises Refused naming the key that cannot be used, and why."""
    return parse_config(read_settings(path), str(path))


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object of a folder's config.json. Raises Refused."""
    try:
        return read_object(path)
    except FileNotFoundError:
        if files := sorted(path.parent.glob("*.gguf")):
            told = f"no {path.name}; to open a GGUF file of it, model={files[0]}"
            raise Refused(f"{path.parent}: {told}") from None
        raise Refused(
            f"{path}: no such file; a model folder holds config.json, safetensors and a tokenizer"
        ) from None


def parse_config(settings: Mapping[str, Any], where: str) -> LlamaConfig:
    """As :func:`read_config`, from the parsed JSON object; ``where`` names it in errors."""
    read = _Settings(settings, where)
    family = _family(read)
    _refuse_unsupported(read, family)

    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    said = "num_key_value_heads" in settings  # null: as many as heads
    kv_heads = read.size("num_key_value_heads", heads if said else family.kv_heads or heads)
    if heads % kv_heads:
        raise read.refuse("num_key_value_heads", f"use a divisor of num_attention_heads, {heads}")
    if settings.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise read.refuse("hidden_size", f"use a multiple of num_attention_heads, {heads}")
    head_dim = read.size("head_dim", family.head_dim or hidden // heads)
    if head_dim % 2:
        raise Refused(f"{where}: head_dim is {head_dim}; RoPE needs an even number")
    context = read.size("max_position_embeddings", family.context)
    theta, scaling = _rope(read, context, family.theta)
    layers = read.size("num_hidden_layers", limit=MAX_LAYERS)
    return LlamaConfig(
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_position_embeddings=context,
        rope_scaling=scaling,
        tie_word_embeddings=read.flag("tie_word_embeddings", family.tied),
        rotary_kinds=_rotary_kinds(read, layers) if family.skips_rope else (),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        **(_scales(read) if family.scaled else {}),
    )


def _scales(read: "_Settings") -> dict[str, float]:
    """Granite's four multipliers; one that is absent is 1, that of attention too."""
    keys = {
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attention_scale": "attention_multiplier",
        "logit_divisor": "logits_scaling",
    }
    scales = {name: read.number(key, 1.0) for name, key in keys.items()}
    for name, scale in scales.items():
        if not 1 / MOST_SCALE <= scale <= MOST_SCALE:
            raise read.refuse(keys[name], f"use a number from {1 / MOST_SCALE:g} to {MOST_SCALE:g}")
    return scales


def _rotary_kinds(read: "_Settings", layers: int) -> tuple[int, ...]:
    """Which layers rotate: ``no_rope_layers``, in which 0 says that one does not, else all but
    every ``no_rope_layer_interval``th.
    """
    rotates = read.values.get("no_rope_layers")
    if rotates is None:
        interval = read.size("no_rope_layer_interval", 4)
        rotates = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(rotates, list) or any(type(n) is not int or n not in (0, 1) for n in rotates):
        raise read.refuse("no_rope_layers", "use a list of 0 and 1, or null")
    if len(rotates) < layers:
        raise read.refuse("no_rope_layers", f"use {layers} numbers, one for each layer")
    kinds = tuple(ROTATED if rotates[layer] else UNROTATED for layer in range(layers))
    return kinds if UNROTATED in kinds else ()


@dataclass(frozen=True)
class _Settings:
    """Typed, range-checked access to the keys of one JSON object."""

    values: Mapping[str, Any]
    where: str
    prefix: str = ""

    def refuse(self, key: str, remedy: str) -> Refused:
        value = shown(self.values.get(key))
        return Refused(f"{self.where}: {self.prefix}{key} {value} is not supported; {remedy}")

    def size(self, key: str, default: int | None = None, *, limit: int = MAX_SIZE) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise self.refuse(key, f"use a whole number from 1 to {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value) if abs(value) < 1e300 else math.inf
            if math.isfinite(number) and number > 0:
                return number
        raise self.refuse(key, "use a positive number")

    def table(self, key: str) -> "_Settings":
        """What is below a key that holds a JSON object, or nothing."""
        values = self.values.get(key) or {}
        if not isinstance(values, dict):
            raise self.refuse(key, "use a JSON object or null")
        return _Settings(values, self.where, f"{self.prefix}{key}.")

    def overrule(self, why: str, key: str) -> None:
        """Says that a key does not count, and why."""
        value = shown(self.values[key])
        warn(f"{self.where}: {why}; {self.prefix}{key} {value} is overruled, as in transformers")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "use true or false")
        return bool(value)


def _refuse_unsupported(read: _Settings, family: Family) -> None:
    """Refuses, by name, every feature that would change the arithmetic."""
    settings = read.values
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise read.refuse("hidden_act", "use a model with silu")
    for key in family.optional_biases:
        if read.flag(key):
            raise read.refuse(key, "use a model without biases")
    if settings.get("quantization_config") is not None:
        raise read.refuse("quantization_config", "use unquantized weights")
    counts = not family.window_is_flagged or read.flag("use_sliding_window")
    if counts and settings.get("sliding_window", family.window) is not None:
        absent = "" if "sliding_window" in settings else f" ({family.window}, the default)"
        if family.window_is_flagged:
            raise read.refuse("use_sliding_window", f"use a model without a window{absent}")
        raise read.refuse("sliding_window", f"use a model with sliding_window null{absent}")
    if settings.get("is_causal") not in (None, True):
        raise read.refuse("is_causal", "use a model in which tokens see only what is before them")
    for key in ("per_layer_config", "kv_sharing_modes"):
        if settings.get(key) is not None:
            raise read.refuse(key, "use a model whose layers are alike")
    kinds = settings.get("layer_types")
    alike = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    mistral = family.model_type == "mistral"  # transformers calls one with these ministral
    if kinds is not None and (mistral or not alike):
        raise read.refuse("layer_types", "use a model with full_attention everywhere")


def _first(*places: tuple[_Settings, str]) -> tuple[_Settings, str]:
    """The first place that says anything, by the object and its key. One line for each place after
    it that says something else.
    """
    said = [(read, key) for read, key in places if read.values.get(key) is not None]
    if not said:
        return places[0]
    (first, key), *others = said
    value = first.values[key]
    for read, other in others:
        if read.values[other] != value:
            read.overrule(f"{first.prefix}{key} {shown(value)} counts", other)
    return first, key


def _family(read: _Settings) -> Family:
    """``model_type`` counts; ``architectures`` and ``auto_map`` may name other classes."""
    model_type = read.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise read.refuse("model_type", remedy(model_type, FAMILIES))
    wanted = FAMILIES[model_type].class_name
    named = read.values.get("architectures") or wanted
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise read.refuse("architectures", f"use [{wanted!r}]")
    why = f"model_type {model_type!r} counts, so this is a {wanted}"
    if wanted.casefold() not in (name.casefold() for name in names):
        read.overrule(why, "architectures")
    if read.values.get("auto_map"):
        read.overrule(why, "auto_map")
    return FAMILIES[model_type]


def _rope(read: _Settings, context: int, default_theta: float) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling. ``rope_parameters`` (transformers 5) holds both; earlier,
    ``rope_theta`` stood by itself and ``rope_scaling`` named its kind ``rope_type`` or ``type``.
    """
    rope, other = read.table("rope_scaling"), read.table("rope_parameters")
    if not rope.values:
        rope = other
    elif other.values and (_turns(read, rope, default_theta) != _turns(read, other, default_theta)):
        read.overrule(f"rope_scaling {shown(rope.values)} counts", "rope_parameters")
    source, key = _first((rope, "rope_theta"), (read, "rope_theta"))
    theta = source.number(key, default_theta)
    source, key = _first((rope, "partial_rotary_factor"), (read, "partial_rotary_factor"))
    if source.values.get(key) not in (None, 1, 1.0):
        raise source.refuse(key, "use a model that rotates whole heads")
    return theta, _rope_scaling(read, rope, context)


def _turns(read: _Settings, rope: _Settings, default_theta: float) -> dict[str, Any]:
    """What a table comes to, to be compared with another one."""
    unsaid = {"rope_type": rope.values.get("type", "default")}
    unsaid["rope_theta"] = read.values.get("rope_theta", default_theta)
    return {key: value for key, value in {**unsaid, **rope.values}.items() if key != "type"}


def _rope_scaling(read: _Settings, rope: _Settings, context: int) -> RopeScaling | None:
    """The scaling that a table asks for."""
    source, key = _first((rope, "rope_type"), (rope, "type"))
    kind = source.values.get(key, "default")
    if kind == "default":
        if any(isinstance(value, dict) for value in rope.values.values()):
            raise read.refuse(rope.prefix[:-1], "use one set of RoPE parameters for all layers")
        return None
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor"))
    if kind == "llama3":
        original = "original_max_position_embeddings"
        source, _ = _first((read, original), (rope, original))
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.refuse("low_freq_factor", f"use less than high_freq_factor, {high}")
        return RopeScaling(
            "llama3", rope.number("factor"), low, high, source.size(original, context)
        )
    raise source.refuse(key, "use default, linear or llama3")
