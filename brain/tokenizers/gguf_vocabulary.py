"""Vocabularies embedded in GGUF files, read or rewritten as the standard tokenizer file they came
from, and byte-level ones the other way round.

Source of names and numbers: the GGUF specification and llama.cpp's ``llama-vocab.cpp``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from brain.errors import Refused, did_you_mean, shown, warn
from brain.tokenizers.sentencepiece_model import (
    listed_pieces,
    read_sentencepiece,
    write_sentencepiece,
)
from brain.tokenizers.tokenizer_json import QWEN2_PATTERN, load_library, vocabulary_of
from brain.tokenizers.vocabulary import Vocabulary

# GGUF token types (those of SentencePiece)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe")
"""Those of GGUF's names of the ways of cutting text into words that are written."""

LARGEST_SCORE = 1e30  # of a SentencePiece piece, in either direction; real ones are above -1e6

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
BREAKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
LLAMA3_PATTERN = rf"{WORD}|\p{{N}}{{1,3}}|{PUNCTUATION}|{BREAKS}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*",
)
AND_SLASHES = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BREAKS}"
TEKKEN_PATTERN = rf"{'|'.join(CASED)}|\p{{N}}|{AND_SLASHES}"
GPT4O_PATTERN = rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{AND_SLASHES}"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DEEPSEEK3_PATTERNS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{BREAKS}",
)
FALCON_PATTERNS = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, r"[0-9][0-9][0-9]")
DEFAULT_PATTERNS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")


class Cut(NamedTuple):
    """How a text is cut into words before merging."""

    patterns: tuple[str, ...]  # one after the other; none: GPT-2's own way
    whole: bool = False  # a word that is a token is not merged from its parts
    bos: bool = False  # BOS is put before a prompt, if the file does not say


GPT2, DIGITS = Cut(()), Cut((r"\p{N}",))
LLAMA3, QWEN2 = Cut((LLAMA3_PATTERN,), whole=True, bos=True), Cut((QWEN2_PATTERN,))
CUTS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat", "mellum"), GPT2),
    **dict.fromkeys(("exaone4", "trillion", "granite-docling", "a.x-4.0"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), DIGITS),
    **dict.fromkeys(("exaone", "minerva-7b", "mellum2"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), LLAMA3),
    **dict.fromkeys(("midm-2.0", "lfm2"), LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Cut((LLAMA3_PATTERN,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), QWEN2),
    **dict.fromkeys(("kormo", "solar-open", "grok-2"), QWEN2),
    "tekken": Cut((TEKKEN_PATTERN,), whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Cut((GPT4O_PATTERN,))),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), Cut(DEEPSEEK3_PATTERNS)),
    "falcon": Cut(FALCON_PATTERNS),
    "default": Cut(DEFAULT_PATTERNS),
}
"""By GGUF's names. Where llama.cpp's own expression only comes near that of the model's
tokenizer.json (tekken, gpt-4o), this is the latter.
"""

ENDS = (
    *("</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<end_of_turn>", "<end_of_utterance>"),
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    "<｜end▁of▁sentence｜>",
)
"""Tokens that end a text wherever there are any, and are control tokens whatever the file calls
them, as in llama.cpp.
"""


NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Roles of special tokens in transformers, and in GGUF."""


def tokenizer_files(fields: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """The Hugging Face tokenizer files equivalent to the vocabulary in a GGUF file's metadata, by
    file name. Raises Refused, naming the file as ``where``.
    """
    listed = _listed(fields, where)
    if listed.sentencepiece:
        files = {"tokenizer.model": _sentencepiece(fields, listed, where)}
    else:
        spec = _byte_level(fields, listed, where)
        files = {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode()}
    files["tokenizer_config.json"] = _tokenizer_config(fields, listed)
    return files


def read_vocabulary(fields: Mapping[str, Any], where: str) -> Vocabulary:
    """The vocabulary in a GGUF file's metadata. Raises Refused, naming the file as ``where``."""
    listed = _listed(fields, where)
    if not listed.sentencepiece:
        spec = _byte_level(fields, listed, where)
        return vocabulary_of(load_library(spec, where), spec, where)
    model = _sentencepiece(fields, listed, where)
    space = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    prefix = "first" if space else "never"
    return read_sentencepiece(model, where, listed_pieces(model, where), prefix=prefix)


def begins(
    fields: Mapping[str, Any], vocabulary: Vocabulary, where: str
) -> tuple[int | None, bool]:
    """The token that begins a text, and whether it is put before a prompt. Raises Refused."""
    spm = fields.get("tokenizer.ggml.model") == "llama"
    bos_id = _special(fields, "bos", vocabulary, where, 1 if spm else None)
    wanted = fields.get("tokenizer.ggml.add_bos_token")
    if wanted is None:
        wanted = spm or _cut(fields, where).bos
    if not isinstance(wanted, bool):
        told = f"tokenizer.ggml.add_bos_token is {shown(wanted)}"
        raise Refused(f"{where}: GGUF metadata {told}; use true or false")
    return bos_id, wanted and bos_id is not None


def ends(fields: Mapping[str, Any], vocabulary: Vocabulary, where: str) -> frozenset[int]:
    """The tokens that end a text: what the file says ends it, a turn or a message, and ENDS."""
    spm = fields.get("tokenizer.ggml.model") == "llama"
    found = [_special(fields, role, vocabulary, where) for role in ("eot", "eom")]
    found += [_special(fields, "eos", vocabulary, where, 2 if spm else None)]
    found += map(vocabulary.id_of, ENDS)
    return frozenset(index for index in found if index is not None)


def named_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by transformers' names for them."""
    tokens, found = fields["tokenizer.ggml.tokens"], {}
    for role, key in NAMES.items():
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            found[f"{role}_token"] = tokens[index]
    return found


def _special(
    fields: Mapping[str, Any],
    role: str,
    vocabulary: Vocabulary,
    where: str,
    default: int | None = None,
) -> int | None:
    """The id of a special token; one that is none counts as not said, as in llama.cpp."""
    key = f"tokenizer.ggml.{role}_token_id"
    index = fields.get(key, default)
    size = len(vocabulary.spelling)
    if index is None or (type(index) is int and 0 <= index < size):
        return index
    if index != default:
        warn(f"{where}: GGUF metadata {key} is {shown(index)}, which is no token; it is not used")
    return default if default is not None and default < size else None


class _Listed(NamedTuple):
    """The tokens of a GGUF file, and their types."""

    sentencepiece: bool
    tokens: list[str]
    types: list[int]


def _listed(fields: Mapping[str, Any], where: str) -> _Listed:
    """The tokens. Raises Refused where they are malformed, or of a kind that is not supported."""
    model = fields.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        vocabulary = f"GGUF vocabulary {shown(model)}"
        raise Refused(f"{where}: {vocabulary} is not supported; use gpt2 or llama")
    tokens = _strings(fields, "tokenizer.ggml.tokens", where)
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not isinstance(types, list) or any(type(kind) is not int or kind < 0 for kind in types):
        raise Refused(f"{where}: GGUF metadata tokenizer.ggml.token_type is not a list of numbers")
    if len(types) != len(tokens):
        raise Refused(f"{where}: {len(tokens)} tokens but {len(types)} token types")
    types = [CONTROL if token in ENDS else kind for token, kind in zip(tokens, types, strict=True)]
    return _Listed(model == "llama", tokens, types)


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
    wanted = json.dumps(_pre_tokenizer(CUTS[pre]), sort_keys=True)
    return spec.get("normalizer") is None and found == wanted


def _strings(fields: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = fields.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise Refused(f"{where}: GGUF metadata {key} is missing or is not a list of strings")
    return values


def _byte_level(fields: Mapping[str, Any], listed: _Listed, where: str) -> dict[str, Any]:
    """The ``tokenizer.json`` of a byte-level vocabulary, as its object."""
    cut = _cut(fields, where)
    if cut is CUTS["default"]:
        warn(
            f"{where}: no tokenizer.ggml.pre says how text is cut into words, so it is cut in a "
            "way that may not be the model's, as in llama.cpp; a newer file of the model says it"
        )
    merges = [tuple(m.split(" ", 1)) for m in _strings(fields, "tokenizer.ggml.merges", where)]
    return {
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
            for index, (token, kind) in enumerate(zip(listed.tokens, listed.types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(cut),
        "post_processor": _template(fields, listed.tokens),
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut.whole,
            "vocab": {token: index for index, token in enumerate(listed.tokens)},
            "merges": merges,
        },
    }


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


def _cut(fields: Mapping[str, Any], where: str) -> Cut:
    """How the file says that text is cut. Raises Refused where that is not known."""
    pre = fields.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in CUTS:
        known = f"known are {', '.join(CUTS)}{did_you_mean(pre, CUTS)}"
        raise Refused(f"{where}: GGUF pre-tokenizer {shown(pre)} is not supported; {known}")
    return CUTS[pre]


def _pre_tokenizer(cut: Cut) -> dict[str, Any]:
    """The same as a step of a ``tokenizer.json``."""
    with_regex = BYTE_LEVEL | {"use_regex": True}
    if cut == GPT2:
        return with_regex
    if cut == DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, with_regex]}
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in cut.patterns
    ]
    without = BYTE_LEVEL | {"use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, without]}


def _sentencepiece(fields: Mapping[str, Any], listed: _Listed, where: str) -> bytes:
    """A serialized SentencePiece model."""
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(listed.tokens):
        raise Refused(f"{where}: GGUF metadata tokenizer.ggml.scores is missing or misshapen")
    if not all(isinstance(score, int | float) and abs(score) < LARGEST_SCORE for score in scores):
        raise Refused(f"{where}: GGUF metadata tokenizer.ggml.scores has an invalid score")
    return write_sentencepiece(
        listed.tokens,
        scores,
        listed.types,
        bos=_id(fields, "bos", 1, len(listed.tokens)),
        eos=_id(fields, "eos", 2, len(listed.tokens)),
        dummy_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _id(fields: Mapping[str, Any], role: str, default: int, size: int) -> int:
    """A token that there is: the default of SentencePiece where none is named, as -1 for instance
    does.
    """
    index = fields.get(f"tokenizer.ggml.{role}_token_id", default)
    return index if type(index) is int and 0 <= index < size else default


def _tokenizer_config(fields: Mapping[str, Any], listed: _Listed) -> bytes:
    sentencepiece = listed.sentencepiece
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if sentencepiece else "PreTrainedTokenizerFast",
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", sentencepiece)),
        "add_eos_token": False,
        "add_prefix_space": bool(fields.get("tokenizer.ggml.add_space_prefix", sentencepiece)),
        "clean_up_tokenization_spaces": False,
    }
    config |= named_tokens(fields)
    architecture = fields.get("general.architecture")
    if isinstance(context := fields.get(f"{architecture}.context_length"), int):
        config["model_max_length"] = context
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
