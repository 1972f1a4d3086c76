"""Vocabularies embedded in GGUF files, rewritten as the standard tokenizer file they came from,
and byte-level ones the other way round.

Source of names and numbers: the GGUF specification and llama.cpp's ``llama-vocab.cpp``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from brain.errors import Refused, shown
from brain.tokenizers.sentencepiece_model import write_sentencepiece
from brain.tokenizers.vocabulary import MOST_TOKENS

# GGUF token types (those of SentencePiece)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe")
"""GGUF's names of the ways of cutting text into words that are known here."""

LARGEST_SCORE = 1e30  # of a SentencePiece piece, in either direction; real ones are above -1e6

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_files(fields: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """The Hugging Face tokenizer files equivalent to the vocabulary in a GGUF file's metadata, by
    file name. Raises Refused, naming the file as ``where``.
    """
    model = fields.get("tokenizer.ggml.model")
    tokens = _strings(fields, "tokenizer.ggml.tokens", where)
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(types, list) or any(type(kind) is not int or kind < 0 for kind in types):
        raise Refused(f"{where}: GGUF metadata tokenizer.ggml.token_type is not a list of numbers")
    if len(types) != len(tokens):
        raise Refused(f"{where}: {len(tokens)} tokens but {len(types)} token types")
    if model == "gpt2":
        files = {"tokenizer.json": _byte_level_json(fields, tokens, types, where)}
    elif model == "llama":
        files = {"tokenizer.model": _sentencepiece(fields, tokens, types, where)}
    else:
        vocabulary = f"GGUF vocabulary {shown(model)}"
        raise Refused(f"{where}: {vocabulary} is not supported; use gpt2 or llama")
    files["tokenizer_config.json"] = _tokenizer_config(fields, tokens, model == "llama")
    return files


@dataclass(frozen=True)
class ByteLevelFields:
    """A byte-level vocabulary in GGUF's terms."""

    pre: str  # how text is cut into words, one of PRE_TOKENIZERS
    tokens: list[str]
    types: list[int]
    merges: list[str]


def vocabulary_fields(spec: Mapping[str, Any], vocab_size: int) -> ByteLevelFields | None:
    """A ``tokenizer.json``, parsed, as GGUF stores it; None where it is of another kind, or merges
    nothing: llama.cpp reads no vocabulary without merges. Ids that the tokenizer does not use, up
    to ``vocab_size``, become unused tokens.
    """
    pre = next((name for name in PRE_TOKENIZERS if _cuts_like(spec, name)), None)
    model = spec.get("model", {})
    if pre is None or model.get("type") != "BPE" or not model["merges"]:
        return None
    kinds = {index: (token, NORMAL) for token, index in model["vocab"].items()}
    for added in spec.get("added_tokens", []):
        kind = CONTROL if added["special"] else USER_DEFINED
        kinds[added["id"]] = (added["content"], kind)
    if max(kinds, default=0) >= vocab_size:
        return None
    tokens = [kinds.get(index, (f"[PAD{index}]", UNUSED)) for index in range(vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return ByteLevelFields(pre, [text for text, _ in tokens], [kind for _, kind in tokens], merges)


def _cuts_like(spec: Mapping[str, Any], pre: str) -> bool:
    """Whether a ``tokenizer.json`` changes no text and cuts it into words as GGUF's name asks."""
    found = json.dumps(spec.get("pre_tokenizer"), sort_keys=True)
    # Offsets have no part in what the ids are.
    found = found.replace('"trim_offsets": false', '"trim_offsets": true')
    wanted = json.dumps(_pre_tokenizer(pre, ""), sort_keys=True)
    return spec.get("normalizer") is None and found == wanted


def _strings(fields: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = fields.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise Refused(f"{where}: GGUF metadata {key} is missing or is not a list of strings")
    return values


def _byte_level_json(
    fields: Mapping[str, Any], tokens: list[str], types: list[int], where: str
) -> bytes:
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    merges = [tuple(m.split(" ", 1)) for m in _strings(fields, "tokenizer.ggml.merges", where)]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "special": kind == CONTROL,
            }
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(pre, where),
        "post_processor": _template(fields, tokens),
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(spec, ensure_ascii=False).encode()


def _template(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """What puts BOS before a text, if the file asks for it: a tokenizer.json's own way."""
    index = fields.get("tokenizer.ggml.bos_token_id")
    wanted = fields.get("tokenizer.ggml.add_bos_token", False)
    if not wanted or type(index) is not int or not 0 <= index < len(tokens):
        return None
    bos, text = {"id": tokens[index], "type_id": 0}, {"id": "A", "type_id": 0}
    other = {"id": "B", "type_id": 1}
    single = [{"SpecialToken": bos}, {"Sequence": text}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": other}],
        "special_tokens": {bos["id"]: {"id": bos["id"], "ids": [index], "tokens": [bos["id"]]}},
    }


def _pre_tokenizer(pre: str, where: str) -> dict[str, Any]:
    """How text is cut into words before merging, by GGUF's name for it."""
    with_regex = BYTE_LEVEL | {"use_regex": True}
    if pre in ("default", "gpt-2"):
        return with_regex
    if pre == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, with_regex]}
    if pre == "llama-bpe":
        pattern = {"Regex": LLAMA3_PATTERN}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        without = BYTE_LEVEL | {"use_regex": False}
        return {"type": "Sequence", "pretokenizers": [split, without]}
    raise Refused(
        f"{where}: GGUF pre-tokenizer {shown(pre)} is not supported; use smollm, gpt-2 or llama-bpe"
    )


def _sentencepiece(
    fields: Mapping[str, Any], tokens: list[str], types: list[int], where: str
) -> bytes:
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise Refused(f"{where}: GGUF metadata tokenizer.ggml.scores is missing or misshapen")
    if not all(isinstance(score, int | float) and abs(score) < LARGEST_SCORE for score in scores):
        raise Refused(f"{where}: GGUF metadata tokenizer.ggml.scores has an invalid score")
    return write_sentencepiece(
        tokens,
        scores,
        types,
        bos=_id(fields, "bos", 1, where),
        eos=_id(fields, "eos", 2, where),
        dummy_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _id(fields: Mapping[str, Any], role: str, default: int, where: str) -> int:
    key = f"tokenizer.ggml.{role}_token_id"
    index = fields.get(key, default)
    if type(index) is not int or not 0 <= index < MOST_TOKENS:
        raise Refused(f"{where}: GGUF metadata {key} is {shown(index)}; use a token id")
    return index


def _tokenizer_config(fields: Mapping[str, Any], tokens: list[str], sentencepiece: bool) -> bytes:
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if sentencepiece else "PreTrainedTokenizerFast",
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", sentencepiece)),
        "add_eos_token": False,
        "add_prefix_space": bool(fields.get("tokenizer.ggml.add_space_prefix", sentencepiece)),
        "clean_up_tokenization_spaces": False,
    }
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            config[f"{role}_token"] = tokens[index]
    if isinstance(context := fields.get("llama.context_length"), int):
        config["model_max_length"] = context
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
