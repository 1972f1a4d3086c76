"""Chat templates that write conversations as those of known families do, each with a small
tokenizer that has the family's special tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tokenizer_folders import Json, Specimens, added, metaspace, template, write_folder

CHATML = """
{%- if messages[0].role != 'system' and default %}
    {{- '<|im_start|>system\\n' + default + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday is ' + date_string + '\\n\\n' }}
{{- ns.system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

QWEN3 = """
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- if '</think>' in message.content and loop.index0 > ns.last %}
            {{- message.content }}
        {%- else %}
            {{- message.content.split('</think>')[-1].lstrip('\\n') }}
        {%- endif %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

ALTERNATING = """
{%- if messages[0].role == 'system' %}{{ raise_exception('no system prompt here') }}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- USER }}
    {%- else %}
        {{- REPLY }}
    {%- endif %}
{%- endfor %}"""

MISTRAL = ALTERNATING.replace("USER", "'[INST] ' + message.content + ' [/INST]'").replace(
    "REPLY", "' ' + message.content + eos_token"
)

MISTRAL_NEMO = """
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + (system if loop.last else '') + message.content + '[/INST]' }}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

PHI3 = """
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

PHI4 = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

GEMMA2 = ALTERNATING.replace(
    "USER", "'<start_of_turn>user\\n' + message.content | trim + '<end_of_turn>\\n'"
).replace("REPLY", "'<start_of_turn>model\\n' + message.content | trim + '<end_of_turn>\\n'")
GEMMA2 += "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"

GEMMA3 = """
{{- bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

R1_DISTILL = """
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.system = message.content %}{% endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- set said = message.content.split('</think>')[-1] %}
        {{- '<｜Assistant｜>' + said + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A template, and the special tokens beside ``<s>`` and ``</s>``."""

    template: str
    tokens: tuple[str, ...]
    bos: str | None = None
    eos: str = "</s>"
    kind: str = "byte"  # of vocabulary: byte, llama, gemma
    reader: str = "PreTrainedTokenizerFast"
    puts_bos: bool = False  # before every text
    loose: tuple[str, ...] = ()  # tokens that are not flagged as special
    rstrip: bool = False  # tokens take white space after them
    takes_system: bool = True
    rewrites: bool = False  # earlier turns are written otherwise once there are later ones
    variables: dict[str, object] = field(default_factory=dict)


IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")
TURNS = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")
THINK = ("<think>", "</think>", "<tool_call>")
R1 = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
DAY: dict[str, object] = {"date_string": "26 Jul 2024"}
FAMILIES = {
    "SmolLM2": Family(CHATML, IM, eos="<|im_end|>", variables={"default": "You are SmolLM."}),
    "Llama 3": Family(
        *(LLAMA3, HEADERS, "<|begin_of_text|>", "<|eot_id|>"), puts_bos=True, variables=DAY
    ),
    "Qwen2.5": Family(
        *(CHATML, IM, None, "<|im_end|>"),
        reader="Qwen2Tokenizer",
        variables={"default": "You are Qwen."},
    ),
    "Qwen3": Family(QWEN3, IM, None, "<|im_end|>", reader="Qwen2Tokenizer", loose=THINK),
    "Qwen3, no thoughts": Family(
        *(QWEN3, IM, None, "<|im_end|>"),
        reader="Qwen2Tokenizer",
        loose=THINK,
        rewrites=True,
        variables={"enable_thinking": False},
    ),
    "Mistral": Family(
        *(MISTRAL, (), "<s>"), kind="llama", reader="LlamaTokenizer", takes_system=False
    ),
    "Mistral Nemo": Family(
        *(MISTRAL_NEMO, ("[INST]", "[/INST]"), "<s>"), puts_bos=True, rewrites=True
    ),
    "Mistral 7B 0.3": Family(
        *(MISTRAL_NEMO, ("[INST]", "[/INST]"), "<s>"),
        kind="llama",
        reader="LlamaTokenizer",
        puts_bos=True,
        rewrites=True,
    ),
    "Phi 3": Family(
        *(PHI3, ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), None, "<|end|>"),
        kind="llama",
        reader="LlamaTokenizer",
        rstrip=True,
    ),
    "Phi 4": Family(PHI4, (*IM, "<|im_sep|>"), None, "<|im_end|>"),
    "Gemma 2": Family(
        *(GEMMA2, TURNS, "<bos>", "<eos>", "gemma"), puts_bos=True, takes_system=False
    ),
    "Gemma 3": Family(GEMMA3, TURNS, "<bos>", "<eos>", "gemma", puts_bos=True),
    "R1 distill": Family(
        *(R1_DISTILL, ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")),
        *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        puts_bos=True,
        loose=R1,
        rewrites=True,
    ),
}


def chat_folder(path: Path, family: Family, specimens: Specimens) -> Path:
    """A folder with such a tokenizer and template."""
    base = specimens.byte_json if family.kind == "byte" else specimens.llama_json
    library: Json = {**base, "added_tokens": [*base["added_tokens"]]}
    vocab = library["model"]["vocab"]
    ids = {entry["content"]: entry["id"] for entry in library["added_tokens"]}
    for rank, text in enumerate((*family.tokens, *family.loose)):
        ids[text] = len(vocab) + rank
        special = text not in family.loose
        entry = added(ids[text], text, rstrip=family.rstrip, special=special)
        library["added_tokens"].append(entry)
    first = family.bos if family.puts_bos else None
    library["post_processor"] = template((first, ids[first])) if first else None
    if family.kind == "gemma":
        steps = library["decoder"]["decoders"]
        library["decoder"] = {"type": "Sequence", "decoders": steps[:3]}
        library["pre_tokenizer"] = metaspace("never")
    settings: Json = {"tokenizer_class": family.reader, "chat_template": family.template}
    settings |= {"bos_token": family.bos, "eos_token": family.eos}
    qwen = {"model_type": "qwen2"} if family.reader == "Qwen2Tokenizer" else {}
    return write_folder(
        path, {"tokenizer.json": library, "tokenizer_config.json": settings, "config.json": qwen}
    )
