"""``config.json`` of a Hugging Face folder, checked value by value, as a ``LlamaConfig``.

Defaults for absent keys are those of transformers' ``LlamaConfig`` and ``MistralConfig``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brain.errors import Refused, shown
from brain.files import read_object
from compiled.llama import LlamaConfig
from compiled.rope import RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
MAX_SIZE, MAX_LAYERS = 1 << 24, 4096


def read_config(path: Path) -> LlamaConfig:
    """The model's dimensions. Raises Refused naming the key that cannot be used, and why."""
    try:
        return parse_config(read_object(path), str(path))
    except FileNotFoundError:
        raise Refused(
            f"{path}: no such file; a model folder holds config.json, safetensors and a tokenizer"
        ) from None


def parse_config(settings: Mapping[str, Any], where: str) -> LlamaConfig:
    """As :func:`read_config`, from the parsed JSON object; ``where`` names it in errors."""
    read = _Settings(settings, where)
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise read.refuse("model_type", "use a llama or mistral model")
    wanted = ARCHITECTURES[model_type]
    if settings.get("architectures") not in (None, [], [wanted]):
        raise read.refuse("architectures", f"use [{wanted!r}]")
    mistral = model_type == "mistral"
    _refuse_unsupported(read, mistral)

    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    kv_heads = read.size("num_key_value_heads", 8 if mistral else heads)
    if heads % kv_heads:
        raise read.refuse("num_key_value_heads", f"use a divisor of num_attention_heads, {heads}")
    if settings.get("head_dim") is None and hidden % heads:
        raise read.refuse("hidden_size", f"use a multiple of num_attention_heads, {heads}")
    head_dim = read.size("head_dim", hidden // heads)
    if head_dim % 2:
        raise Refused(f"{where}: head_dim is {head_dim}; RoPE needs an even number")
    context = read.size("max_position_embeddings", 131072 if mistral else 2048)
    theta, scaling = _rope(read, context)
    return LlamaConfig(
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.size("intermediate_size"),
        num_layers=read.size("num_hidden_layers", limit=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_position_embeddings=context,
        rope_scaling=scaling,
        tie_word_embeddings=read.flag("tie_word_embeddings"),
    )


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

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "use true or false")
        return bool(value)


def _refuse_unsupported(read: _Settings, mistral: bool) -> None:
    """Refuses, by name, every feature that would change the arithmetic."""
    settings = read.values
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise read.refuse("hidden_act", "use a model with silu")
    for key in ("attention_bias", "mlp_bias"):
        if read.flag(key):
            raise read.refuse(key, "use a model without biases")
    if settings.get("quantization_config") is not None:
        raise read.refuse("quantization_config", "use unquantized weights")
    if settings.get("sliding_window", 4096 if mistral else None) is not None:
        default = "" if "sliding_window" in settings else " (4096, mistral's default)"
        raise read.refuse("sliding_window", f"use a model with sliding_window null{default}")
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise read.refuse("partial_rotary_factor", "use a model that rotates whole heads")


def _rope(read: _Settings, context: int) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling. ``rope_parameters`` (transformers 5) holds both; earlier,
    ``rope_theta`` stood by itself and ``rope_scaling`` named its kind ``rope_type`` or ``type``.
    """
    key = "rope_parameters" if read.values.get("rope_parameters") else "rope_scaling"
    values = read.values.get(key)
    if values is None or values == {}:
        return read.number("rope_theta", 10000.0), None
    if not isinstance(values, dict):
        raise read.refuse(key, "use a JSON object or null")
    rope = _Settings(values, read.where, f"{key}.")
    theta = (rope if values.get("rope_theta") is not None else read).number("rope_theta", 10000.0)
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise rope.refuse("partial_rotary_factor", "use a model that rotates whole heads")
    kind_key = "rope_type" if "rope_type" in values else "type"
    kind = values.get(kind_key, "default")
    if kind == "default":
        if any(isinstance(value, dict) for value in values.values()):
            raise read.refuse(key, "use one set of RoPE parameters for all layers")
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    if kind == "llama3":
        original = "original_max_position_embeddings"
        source = read if read.values.get(original) is not None else rope
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.refuse("low_freq_factor", f"use less than high_freq_factor, {high}")
        return theta, RopeScaling(
            "llama3", rope.number("factor"), low, high, source.size(original, context)
        )
    raise rope.refuse(kind_key, "use default, linear or llama3")
