"""Vocabularies from a Hugging Face ``tokenizer.json``, read by the ``tokenizers`` library.

Two kinds are supported: byte-level (GPT-2, Llama 3, SmolLM) and the Llama 2 kind, with ``▁`` for
space and, as a rule, byte fallback.
"""

import functools
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer as Library

from brain.errors import Refused, one_line, shown, warn
from brain.files import parse_json
from brain.tokenizers.byte_level import byte_of_character, is_byte_token
from brain.tokenizers.vocabulary import MOST_TOKENS, Vocabulary, WarnOnce, control_tokens

SPACE = "▁"
MOST_GROWTH = 64
"""Of a text before it is split; SmolLM's doubles at most, Llama's is four times as long."""
DEEPEST = 8  # sequences within sequences of steps
MODELS = ("BPE", "Unigram", "WordLevel")
STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's words."""
LLAMA_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def parse_tokenizer_json(content: str, where: str) -> dict[str, Any]:
    """The parsed ``tokenizer.json`` text. Raises Refused, naming the file as ``where``."""
    try:
        spec = parse_json(content)
    except ValueError as error:
        raise Refused(f"{where}: not JSON ({one_line(error)}); fetch the file again") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise Refused(f"{where}: not a tokenizer.json: it has no 'model' object")
    return spec


def load_library(spec: dict[str, Any], where: str, content: str | None = None) -> Library:
    """The library's tokenizer. Truncation, padding and dropout, which the file may ask for, are
    off. ``content`` is what ``spec`` was parsed from, if it was, which saves writing it again.
    Raises Refused where it cannot be loaded, or its tokens would not give a text back.
    """
    kind = spec["model"].get("type")  # files of the library's early days have none
    if kind is not None and kind not in MODELS:
        raise Refused(
            f"{where}: tokenizer model {shown(kind)} is not supported; use {', '.join(MODELS)}"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if spec["model"].get(key) not in (None, ""):
            raise Refused(f"{where}: {key} {shown(spec['model'][key])} is not supported; use none")
    model = {**spec["model"], "dropout": None} if "dropout" in spec["model"] else spec["model"]
    if spec["model"].get("dropout"):
        warn(f"{where}: its dropout is off; transformers would split texts at random")
    is_byte_level(spec, where)
    _check_growth(spec, where)
    _check_templates(spec, where)
    meant = {**spec, "model": model, "truncation": None, "padding": None}
    text = content if meant == spec else None
    with refusing(f"{where}: tokenizer cannot be loaded"):
        return Library.from_str(text or json.dumps(meant))


def vocabulary_of(library: Library, spec: dict[str, Any], where: str) -> Vocabulary:
    """The vocabulary of a loaded tokenizer. Its texts are split as the library splits them, but one
    that begins with a space keeps it, where the library would take it for the space it puts there.
    """
    byte_level = is_byte_level(spec, where)
    one_at_a_time = threading.Lock()

    def encoded(words: str, *, special: bool) -> list[int]:
        # Which of the two is a setting of the library, not of the call.
        with one_at_a_time, refusing(f"{where}: tokenizer cannot split a text"):
            library.encode_special_tokens = not special
            return list(library.encode(words, add_special_tokens=False).ids)

    fallback = bool(spec["model"].get("byte_fallback"))
    spelling = _spellings(library, where, byte_level=byte_level, byte_fallback=fallback)
    bare, spaced = (encoded(text, special=True) for text in ("x", " x"))
    with refusing(f"{where}: tokenizer cannot split a text"):
        full = list(library.encode("x", add_special_tokens=True).ids)
    first = next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)
    leading_space = b"".join(spelling[i] or b"" for i in bare).startswith(b" ")
    takes_space = leading_space and spaced == bare
    kept = WarnOnce(
        f"{where}: a text that begins with a space keeps it; transformers takes it for the one "
        "that is put before a text"
    )

    def split(words: str, *, special: bool) -> list[int]:
        if takes_space and words.startswith(" "):
            kept()
            words = " " + words
        return encoded(words, special=special)

    added = library.get_added_tokens_decoder()
    controls = control_tokens(added)

    @functools.cache
    def plain(scheme: str) -> Library:
        # Made anew, which takes a second of a large vocabulary: only a text needs it that has
        # control tokens written in it.
        told = json.loads(library.to_str())
        for token in told["added_tokens"]:
            token["special"] |= token["id"] in controls
        for step in _steps(told.get("pre_tokenizer"), "pretokenizers", where):
            if step.get("prepend_scheme") == "first":
                step["prepend_scheme"] = scheme
        made = Library.from_str(json.dumps(told))
        made.encode_special_tokens = True
        return made

    def split_parts(parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            with one_at_a_time, refusing(f"{where}: tokenizer cannot split a text"):
                # Only where the text begins is there a first word to put a space before.
                reader = plain("never" if index else "first")
                words = " " + part if not index and takes_space and part[:1] == " " else part
                ids += reader.encode(words, add_special_tokens=False).ids
        return ids

    strips = any(t.lstrip or t.rstrip for t in added.values())
    return Vocabulary(
        split=functools.partial(split, special=True),
        split_plain=functools.partial(split, special=False),
        controls=controls,
        split_parts=split_parts,
        spelling=spelling,
        leading_space=leading_space,
        lossless=byte_level and not (leading_space or strips or spec.get("normalizer")),
        id_of=library.token_to_id,
        prepended=tuple(full[:first]),
        appended=tuple(full[first + len(bare) :]),
    )


def as_llama(spec: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What transformers' LlamaTokenizer makes of a ``tokenizer.json``: its vocabulary, merges and
    template, all else new. ``prefix``: where a space is put, ``never``, ``first`` or ``always``.
    """
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    metaspace = {"replacement": SPACE, "prepend_scheme": prefix, "split": False}
    decoder = {"type": "Sequence", "decoders": decoders}
    return _made_anew(spec, {"type": "Metaspace", **metaspace}, decoder, llama=True)


def as_gpt2(spec: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The same for GPT2Tokenizer."""
    step = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True, "add_prefix_space": True}
    before = step | {"add_prefix_space": prefix != "never"}
    return _made_anew(spec, before, step)


def as_qwen2(spec: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The same for Qwen2Tokenizer."""
    step = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True, "add_prefix_space": True}
    words = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated"}
    letters = step | {"use_regex": False, "add_prefix_space": prefix != "never"}
    before = {"type": "Sequence", "pretokenizers": [words | {"invert": False}, letters]}
    return _made_anew(spec, before, step) | {"normalizer": {"type": "NFC"}}


def _made_anew(
    spec: dict[str, Any], pre_tokenizer: Any, decoder: Any, *, llama: bool = False
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "pre_tokenizer": pre_tokenizer,
        "post_processor": spec.get("post_processor"),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "vocab": spec["model"].get("vocab"),
            "merges": spec["model"].get("merges") or [],
            "byte_fallback": llama,
            "fuse_unk": llama,
        },
    }


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Refuses any error of the library: a bare Exception or, for a panic, a BaseException."""
    try:
        yield
    except (Refused, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise Refused(f"{what}: {one_line(error)}") from None


def is_byte_level(spec: dict[str, Any], where: str) -> bool:
    """Whether the file is of the byte-level kind; Refused where it is neither that nor Llama's. The
    decoder tells; where there is none, the way in.
    """
    names = [_name(step) for step in _steps(spec.get("decoder"), "decoders", where)]
    if names and set(names) <= {"ByteLevel", "Fuse"} and "ByteLevel" in names:
        return True
    if names and set(names) <= LLAMA_STEPS:
        return False
    if not names:
        ways = _steps(spec.get("pre_tokenizer"), "pretokenizers", where)
        kinds = {_name(step) for step in ways}
        if "ByteLevel" in kinds:
            return True
        if "Metaspace" in kinds:
            return False
    raise Refused(
        f"{where}: tokenizer decoder {', '.join(names) or 'none'} is not supported; "
        "use byte-level BPE or the Llama kind (Replace, ByteFallback, Fuse, Strip)"
    )


def _steps(part: Any, key: str, where: str, depth: int = 0) -> list[dict[str, Any]]:
    """A tokenizer.json component as a flat list of its steps."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    within = part.get(key, [])
    if not isinstance(within, list) or depth == DEEPEST:
        raise Refused(f"{where}: {key} is not a list of steps, or nested more than {DEEPEST} deep")
    return [step for inner in within for step in _steps(inner, key, where, depth + 1)]


def _check_growth(spec: dict[str, Any], where: str) -> None:
    """Refuses steps of which each makes a text longer: together they would do so exponentially."""
    growth = 1
    for part, key in STEPS.items():
        for step in _steps(spec.get(part), key, where):
            growth *= 2 if step.get("type") == "ByteLevel" else 1
            for added in (step.get("content"), step.get("prepend")):
                growth *= 1 + len(added) if isinstance(added, str) else 1
            if growth > MOST_GROWTH:
                raise Refused(
                    f"{where}: its {key} may make a text more than {MOST_GROWTH} times as long"
                )


def _check_templates(spec: dict[str, Any], where: str) -> None:
    """Refuses a template of tokens that it does not define: the library would print a panic."""
    for step in _steps(spec.get("post_processor"), "processors", where):
        defined = step.get("special_tokens")
        known = set(defined) if isinstance(defined, dict) else set()
        for key in ("single", "pair"):
            pieces = step.get(key)
            for piece in pieces if isinstance(pieces, list) else []:
                token = piece.get("SpecialToken") if isinstance(piece, dict) else None
                name = token.get("id") if isinstance(token, dict) else None
                if token is not None and not (isinstance(name, str) and name in known):
                    raise Refused(f"{where}: its template has the undefined token {shown(name)}")


def _name(step: dict[str, Any]) -> str:
    """What kind of step it is."""
    kind = step.get("type")
    return kind if isinstance(kind, str) else shown(kind)


def _spellings(
    library: Library, where: str, *, byte_level: bool, byte_fallback: bool
) -> tuple[bytes | None, ...]:
    """What each id stands for, as bytes; added tokens stand for their own text."""
    vocab: dict[str, int] = library.get_vocab(with_added_tokens=True)
    highest = max(vocab.values(), default=-1)
    if highest >= MOST_TOKENS:
        raise Refused(f"{where}: token id {highest} is too high; use ids below {MOST_TOKENS}")
    added = set(library.get_added_tokens_decoder())
    alphabet = byte_of_character()
    table: list[bytes | None] = [None] * (highest + 1)
    for text, index in vocab.items():
        if index in added:
            table[index] = text.encode()
        elif byte_level:
            try:
                table[index] = bytes(map(alphabet.__getitem__, text))
            except KeyError:  # not spelt in that alphabet
                table[index] = text.encode()
        elif byte_fallback and is_byte_token(text):
            table[index] = bytes([int(text[3:5], 16)])
        else:
            table[index] = text.replace(SPACE, " ").encode()
    return tuple(table)
