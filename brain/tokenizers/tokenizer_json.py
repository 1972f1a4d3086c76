"""Vocabularies from a Hugging Face ``tokenizer.json``, read by the ``tokenizers`` library.

Two kinds are supported: byte-level BPE (GPT-2, Llama 3, SmolLM) and the Llama 2 kind, BPE over
characters with ``▁`` for space and byte fallback.
"""

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer as Library

from brain.errors import Refused, one_line, shown
from brain.files import parse_json
from brain.tokenizers.byte_level import byte_of_character, is_byte_token
from brain.tokenizers.vocabulary import MOST_TOKENS, Vocabulary

SPACE = "▁"
MOST_GROWTH = 64
"""Of a text before it is split; SmolLM's doubles at most, Llama's is four times as long."""
DEEPEST = 8  # sequences within sequences of steps


def read_tokenizer_json(content: str, where: str) -> Vocabulary:
    """The vocabulary in a ``tokenizer.json`` text. Truncation, padding, post-processing and BPE
    dropout, which the file may ask for, are off. Raises Refused, naming the file as ``where``.
    """
    try:
        spec = parse_json(content)
    except ValueError as error:
        raise Refused(f"{where}: not JSON ({one_line(error)}); fetch the file again") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise Refused(f"{where}: not a tokenizer.json: it has no 'model' object")
    kind = spec["model"].get("type")
    if kind != "BPE":
        raise Refused(f"{where}: tokenizer model {shown(kind)} is not supported; use BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if spec["model"].get(key) not in (None, ""):
            raise Refused(f"{where}: {key} {shown(spec['model'][key])} is not supported; use none")
    spec["model"]["dropout"] = None
    spec["truncation"] = spec["padding"] = None
    byte_level = _is_byte_level(spec, where)
    _check_growth(spec, where)
    _check_templates(spec, where)
    byte_fallback = bool(spec["model"].get("byte_fallback"))
    text = json.dumps(spec)
    del spec  # large, and the library makes its own of it
    with _refusing(f"{where}: tokenizer cannot be loaded"):
        library = Library.from_str(text)
    one_at_a_time = threading.Lock()

    def encoded(words: str, *, special: bool) -> list[int]:
        # Which of the two is a setting of the library, not of the call.
        with one_at_a_time, _refusing(f"{where}: tokenizer cannot split a text"):
            library.encode_special_tokens = not special
            return list(library.encode(words, add_special_tokens=False).ids)

    def id_of(token: str) -> int | None:
        try:
            return library.token_to_id(token)
        except UnicodeError:  # half a surrogate pair, which JSON can hold, is not a token
            return None

    split = functools.partial(encoded, special=True)
    split_plain = functools.partial(encoded, special=False)
    spelling = _spellings(library, where, byte_level=byte_level, byte_fallback=byte_fallback)
    with _refusing(f"{where}: tokenizer cannot split a text"):
        bare, full = split("x"), list(library.encode("x", add_special_tokens=True).ids)
    first = next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)
    probe = b"".join(spelling[i] or b"" for i in bare)
    return Vocabulary(
        split=split,
        split_plain=split_plain,
        spelling=spelling,
        leading_space=probe.startswith(b" "),
        lossless=byte_level,
        id_of=id_of,
        prepended=tuple(full[:first]),
    )


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Refuses any error of the library: a bare Exception or, for a panic, a BaseException."""
    try:
        yield
    except (Refused, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise Refused(f"{what}: {one_line(error)}") from None


def _is_byte_level(spec: dict[str, Any], where: str) -> bool:
    """Whether the file is of the byte-level kind; Refused where it is neither that nor Llama's."""
    names = [_name(step) for step in _steps(spec.get("decoder"), "decoders", where)]
    if names == ["ByteLevel"]:
        normalizers = [_name(n) for n in _steps(spec.get("normalizer"), "normalizers", where)]
        if normalizers:
            raise Refused(
                f"{where}: byte-level BPE with normalizer {', '.join(normalizers)} is not supported"
            )
        for step in _steps(spec.get("pre_tokenizer"), "pretokenizers", where):
            if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
                raise Refused(f"{where}: byte-level BPE with add_prefix_space is not supported")
        return True
    if names and set(names) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
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
    for part, key in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
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
