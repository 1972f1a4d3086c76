"""The families of models that open, and what is lacking for others.

A family is plain Llama and what it has beside: the defaults of keys that its config.json may leave
out, its name in GGUF files, and which tensors and constants there are. ``hf_config`` and
``gguf_file`` read by it; the layers in ``compiled/`` know only what they are given.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What one ``model_type`` means, beside the keys that all share. Defaults are transformers'."""

    model_type: str
    class_name: str  # in ``architectures``
    architecture: str  # in GGUF files
    permuted: bool = False  # whether GGUF files hold a head's rows in RoPE's pairs
    context: int = 2048
    theta: float = 10000.0
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    tied: bool = False
    window: int | None = None
    window_is_flagged: bool = False  # whether it counts only with use_sliding_window
    optional_biases: tuple[str, ...] = ("attention_bias", "mlp_bias")
    qkv_bias: bool = False
    qk_norm: bool = False
    skips_rope: bool = False  # whether no_rope_layers counts
    scaled: bool = False  # whether the four multipliers count


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", "llama", permuted=True),
        Family(
            *("mistral", "MistralForCausalLM", "llama"),
            permuted=True,
            context=131072,
            kv_heads=8,
            window=4096,
        ),
        Family(
            *("qwen2", "Qwen2ForCausalLM", "qwen2"),
            context=32768,
            kv_heads=32,
            window=4096,
            window_is_flagged=True,
            optional_biases=(),
            qkv_bias=True,
        ),
        Family(
            *("qwen3", "Qwen3ForCausalLM", "qwen3"),
            context=32768,
            kv_heads=32,
            head_dim=128,
            window=4096,
            window_is_flagged=True,
            optional_biases=("attention_bias",),
            qk_norm=True,
        ),
        Family(
            *("smollm3", "SmolLM3ForCausalLM", "smollm3"),
            permuted=True,
            context=32768,
            theta=2000000.0,
            kv_heads=4,
            tied=True,
            window_is_flagged=True,
            skips_rope=True,
        ),
        Family("granite", "GraniteForCausalLM", "granite", permuted=True, scaled=True),
    )
}
"""By ``model_type`` of config.json."""

ARCHITECTURES = {f.architecture: f for f in FAMILIES.values() if f.model_type != "mistral"}
"""By ``general.architecture`` of GGUF files; a Mistral is a ``llama`` there."""

_GEMMA = "norms that multiply by 1 + weight, GeGLU"
_EXPERTS = "mixtures of experts"
_STATES = "state-space layers"
_LATENT = "latent attention (MLA)"
_LAYER_NORM = "LayerNorm with biases, an MLP without gate"
_LACKING = {
    ("gemma",): f"{_GEMMA}, embeddings times the root of the width",
    ("gemma2",): f"{_GEMMA}, four norms a layer, capped logits, sliding windows",
    ("gemma3", "gemma3_text"): f"{_GEMMA}, four norms a layer, sliding windows, two RoPE bases",
    ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"): (
        f"{_GEMMA}, four norms a layer, sliding windows, layers that share keys and values"
    ),
    ("phi", "phi2"): f"{_LAYER_NORM}, heads that rotate in part",
    ("phi3", "phi4mm", "phi4_multimodal"): (
        "fused qkv and gate_up tensors, longrope, heads that rotate in part, sliding windows"
    ),
    ("phimoe",): f"{_EXPERTS}, longrope",
    ("olmo",): "LayerNorm without weights, clipped queries and keys",
    ("olmo2",): "norms after attention and MLP, norms of queries and keys over their whole width",
    ("olmo3",): "norms after attention and MLP, sliding windows",
    ("olmoe", "flex_olmo"): _EXPERTS,
    ("qwen2_moe", "qwen2moe", "qwen3_moe", "qwen3moe", "mixtral", "gpt_oss", "gpt-oss"): _EXPERTS,
    ("qwen3_next", "qwen3next", "qwen3_5", "qwen3_5_text", "qwen35"): (
        "linear attention (gated delta rule), gated attention"
    ),
    ("qwen3_5_moe", "qwen3_5_moe_text", "qwen35moe"): f"linear attention, {_EXPERTS}",
    ("qwen2_vl", "qwen2_5_vl", "qwen2vl", "qwen3_vl", "qwen3vl"): "images, RoPE in sections",
    ("qwen3_vl_moe", "qwen3vlmoe"): f"images, {_EXPERTS}",
    ("lfm2",): "short convolutions between attention layers",
    ("lfm2_moe", "lfm2moe"): f"short convolutions, {_EXPERTS}",
    ("falcon_h1", "falcon-h1", "nemotron_h", "bamba", "jamba", "zamba2"): _STATES,
    ("mamba", "mamba2", "falcon_mamba"): f"{_STATES} alone",
    ("granitemoe", "granitemoeshared"): _EXPERTS,
    ("granitemoehybrid", "granitehybrid"): f"{_STATES}, {_EXPERTS}",
    ("ministral", "granite_swa"): "sliding windows",
    ("mistral3", "ministral3", "llava", "mllama", "smolvlm", "idefics3"): (
        "images, or RoPE scaling of another kind"
    ),
    ("llama4", "llama4_text"): f"{_EXPERTS}, chunked attention",
    ("deepseek_v2", "deepseek_v3", "deepseek2"): f"{_LATENT}, {_EXPERTS}",
    ("minicpm3",): _LATENT,
    ("glm", "glm4", "chatglm"): "fused gate_up tensors, heads that rotate in part",
    ("cohere", "cohere2", "command-r"): "LayerNorm, attention and MLP side by side",
    ("exaone4",): "norms after attention and MLP, sliding windows",
    ("stablelm",): "LayerNorm, heads that rotate in part",
    ("gpt2", "gpt_neox", "gptneox", "starcoder2", "bloom", "mpt"): _LAYER_NORM,
    ("falcon",): f"{_LAYER_NORM}, attention and MLP side by side",
}
LACKING = {name: lacked for names, lacked in _LACKING.items() for name in names}
"""What a model has that this program lacks, by ``model_type`` and by GGUF's name."""


def remedy(name: object, known: Iterable[str]) -> str:
    """What to say to whoever has a model of a family that is not ``known``."""
    lacked = LACKING.get(name) if isinstance(name, str) else None
    told = "" if lacked is None else f"it has {lacked}, which this program lacks; "
    return f"{told}use a model of {', '.join(known)}"
