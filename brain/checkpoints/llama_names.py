"""Which Hugging Face tensors, in which order, make up each packed tensor of ``Weights``.

A packed tensor is the concatenation of its parts, flattened. A file that stores the parts one
after the other in this order stores the packed tensor itself.
"""

from compiled.llama import LlamaConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Part = tuple[str, tuple[int, ...]]


def packed_parts(config: LlamaConfig) -> dict[str, list[Part]]:
    """The parts, name and shape, of every field of ``Weights`` that is stored in files, in the
    order in which a layer uses them; ``head`` only where it is not tied.
    """
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    hidden, wide = c.hidden_size, c.intermediate_size

    def each_layer(*parts: Part, kind: str = "weight") -> list[Part]:
        return [
            (f"model.layers.{layer}.{name}.{kind}", shape)
            for layer in range(c.num_layers)
            for name, shape in parts
        ]

    biases: list[Part] = [
        ("self_attn.q_proj", (queries,)),
        ("self_attn.k_proj", (keys,)),
        ("self_attn.v_proj", (keys,)),
    ]
    gains: list[Part] = [("self_attn.q_norm", (c.head_dim,)), ("self_attn.k_norm", (c.head_dim,))]
    fields: dict[str, list[Part]] = {
        "embedding": [(EMBEDDING, (c.vocab_size, hidden))],
        "qkv": each_layer(
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
        ),
        **({"qkv_bias": each_layer(*biases, kind="bias")} if c.qkv_bias else {}),
        **({"qk_gain": each_layer(*gains)} if c.qk_norm else {}),
        "attention_out": each_layer(("self_attn.o_proj", (hidden, queries))),
        "gate_up": each_layer(("mlp.gate_proj", (wide, hidden)), ("mlp.up_proj", (wide, hidden))),
        "down": each_layer(("mlp.down_proj", (hidden, wide))),
        "attention_norm": each_layer(("input_layernorm", (hidden,))),
        "mlp_norm": each_layer(("post_attention_layernorm", (hidden,))),
        "final_norm": [("model.norm.weight", (hidden,))],
    }
    if not c.tie_word_embeddings:
        fields["head"] = [(HEAD, (c.vocab_size, hidden))]
    return fields
