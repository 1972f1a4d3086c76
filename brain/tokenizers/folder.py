"""What a Hugging Face folder says about its tokenizer: one function for each fact.

Each reads every place that speaks of the fact. Where they differ, the order is that of
transformers, and one line says what was overruled; where it has none, the folder is refused.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from brain.errors import Refused, one_line, shown, warn
from brain.files import TOKENIZER_BYTES, read_bytes, read_json, read_object, read_text
from brain.tokenizers.vocabulary import MOST_TOKENS, Vocabulary

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERATION, MODEL_CONFIG = "generation_config.json", "config.json"
LIBRARY, SENTENCEPIECE, VOCAB, MERGES = (
    *("tokenizer.json", "tokenizer.model"),
    *("vocab.json", "merges.txt"),
)

NAMED = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTED = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LLAMA, GPT2 = "LlamaTokenizer", "GPT2Tokenizer"
AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", "BloomTokenizer")
DEFAULTS: dict[str | None, dict[str, str]] = {
    LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
"""The tokens that these classes of transformers have where a folder names none."""


@dataclass(frozen=True)
class Folder:
    """The files of a folder that speak of its tokenizer; an absent one says nothing."""

    path: Path
    settings: Mapping[str, dict[str, Any]]  # the small JSON files, by name
    vocabulary: str  # the name of the file that is the vocabulary
    library: str  # tokenizer.json, as text
    sentencepiece: bytes  # tokenizer.model

    @property
    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``."""
        return self.settings[CONFIG]

    def warn(self, message: str) -> None:
        """Warns in one line that names the folder."""
        warn(f"{self.path}: {message}")

    def flag(self, key: str) -> bool | None:
        """What ``tokenizer_config.json`` says under this key; None: nothing."""
        value = self.config.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise Refused(f"{self.path / CONFIG}: {key} is {shown(value)}; use true or false")


@dataclass(frozen=True)
class Stated:
    """What one place says of an added token."""

    place: str
    token: AddedToken
    index: int | None = None
    flags: tuple[str, ...] = ()  # the ones it speaks of


def read_folder(path: Path) -> Folder:
    """Reads the files, and decides which is the vocabulary: ``tokenizer.json``, else
    ``tokenizer.model``, else ``vocab.json`` with ``merges.txt``. Raises Refused.
    """
    settings = {
        name: read_object(path / name, TOKENIZER_BYTES) if (path / name).exists() else {}
        for name in (CONFIG, SPECIAL_MAP, ADDED, GENERATION, MODEL_CONFIG)
    }
    versions = settings[CONFIG].get("fast_tokenizer_files")
    if versions not in (None, [], [LIBRARY]):
        raise Refused(
            f"{path}: {CONFIG} has fast_tokenizer_files {shown(versions)}, which may overrule "
            f"{LIBRARY}; name the file that counts {LIBRARY}, and remove the key"
        )
    library, sentencepiece = "", b""
    try:
        if (path / SENTENCEPIECE).exists():
            sentencepiece = read_bytes(path / SENTENCEPIECE, TOKENIZER_BYTES)
        if (path / LIBRARY).exists():
            vocabulary, library = LIBRARY, read_text(path / LIBRARY, TOKENIZER_BYTES)
        elif (path / SENTENCEPIECE).exists():
            vocabulary = SENTENCEPIECE
        elif (path / VOCAB).exists() and (path / MERGES).exists():
            vocabulary, library = VOCAB, json.dumps({"model": _loose_model(path)})
        else:
            raise Refused(f"{path}: no tokenizer; put {SENTENCEPIECE} or {LIBRARY} there")
    except (OSError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{path}: tokenizer cannot be read ({one_line(error)})") from None
    return Folder(path, settings, vocabulary, library, sentencepiece)


def _loose_model(path: Path) -> dict[str, Any]:
    """``vocab.json`` and ``merges.txt`` as the model of a ``tokenizer.json``."""
    lines = read_text(path / MERGES, TOKENIZER_BYTES).splitlines()
    merges = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    vocab = read_json(path / VOCAB, TOKENIZER_BYTES)
    return {"type": "BPE", "vocab": vocab, "merges": merges}


def reading_class(folder: Folder) -> str | None:
    """The class of transformers that makes parts of the tokenizer anew, whatever ``tokenizer.json``
    says: LlamaTokenizer or GPT2Tokenizer. None: the file counts as it is.

    Places: ``tokenizer_class`` in tokenizer_config.json, else in config.json; ``model_type``
    mistral and byte-level files overrule it.
    """
    declared = [
        (name, value.removesuffix("Fast"))
        for name in (CONFIG, MODEL_CONFIG)
        if isinstance(value := folder.settings[name].get("tokenizer_class"), str)
    ]
    if not declared:
        return None
    place, chosen = declared[0]
    for other, name in declared[1:]:
        if name != chosen:
            folder.warn(f"{place} names {chosen}, which overrules {name} in {other}")
    if chosen in AS_IT_IS:
        return None
    if folder.settings[MODEL_CONFIG].get("model_type") == "mistral":
        return None
    if chosen == LLAMA and '"ByteLevel"' in folder.library:
        folder.warn(f"{LIBRARY} is byte-level, which overrules {chosen} in {place}")
        return None
    if chosen in (LLAMA, GPT2):
        return chosen
    folder.warn(f"{place} names {chosen}, which is not known here: {folder.vocabulary} counts")
    return None


def report_unheeded(folder: Folder) -> None:
    """Says which settings of tokenizer_config.json are not followed, though transformers would."""
    unheeded = {
        "split_special_tokens": "special tokens written in a text become their id",
        "fix_mistral_regex": "text is cut as the vocabulary says",
        "auto_map": "no code of a folder is run",
        "add_eos_token": "nothing is put after a text, which can so go on",
    }
    for key, instead in unheeded.items():
        # With tokenizer.json its template decides what is put around a text.
        heeded = key == "add_eos_token" and folder.vocabulary != SENTENCEPIECE
        if folder.config.get(key) and not heeded:
            folder.warn(f"{key} in {CONFIG} is not followed as in transformers: {instead}")


def stated_tokens(folder: Folder, in_library: object) -> list[Stated]:
    """What every place says of added tokens, in no order. ``in_library``: the added_tokens of
    tokenizer.json. Raises Refused where one of them is malformed.
    """
    found: list[Stated] = []

    def add(place: str, value: object, index: object = None) -> None:
        found.append(_stated(folder.path, place, value, index))

    for text, index in folder.settings[ADDED].items():
        add(ADDED, text, shown(index) if not isinstance(index, int | str) else index)
    for index, value in _declared(folder).items():
        add(CONFIG, value, index)
    for value in in_library if isinstance(in_library, list) else []:
        index = value.get("id") if isinstance(value, dict) else None
        add(LIBRARY, value, "none" if index is None else index)
    for place in (CONFIG, SPECIAL_MAP):
        for key in LISTED:
            if not isinstance(folder.settings[place].get(key, []), list | dict | None):
                raise Refused(f"{folder.path / place}: {key} is no list of tokens; use one")
        for _, value in _special(folder.settings[place]):
            add(place, value)
    return found


def _declared(folder: Folder) -> dict[str, Any]:
    """``added_tokens_decoder`` of tokenizer_config.json."""
    declared = folder.config.get("added_tokens_decoder", {})
    if not isinstance(declared, dict):
        raise Refused(
            f"{folder.path / CONFIG}: added_tokens_decoder is {shown(declared)}; use an object of "
            "tokens by id"
        )
    return declared


def _special(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The special tokens of a settings file: those with a name, and those that are listed."""
    named = [(k, v) for k, v in settings.items() if k.endswith("_token") and _is_token(v)]
    for key in LISTED:
        listed = settings.get(key)
        if isinstance(listed, dict):
            named += listed.items()
        elif isinstance(listed, list):
            named += [(key, value) for value in listed]
    return named


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _stated(path: Path, place: str, value: object, index: object) -> Stated:
    """A token as a file writes it: its text, or an object with ``content`` and flags."""
    written = value if isinstance(value, dict) else {"content": value}
    text: Any = written.get("content")
    flags = {flag: written[flag] for flag in FLAGS if flag in written}
    digits = str(index)
    number = int(digits) if digits.isdecimal() and len(digits) < 8 else MOST_TOKENS
    # Half a surrogate pair, which JSON can hold, is not text.
    is_text = isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)
    if not text or not is_text or (index is not None and number >= MOST_TOKENS):
        raise Refused(
            f"{path / place}: added token {shown(text)} has id {shown(index)}; use a text and a "
            f"number below {MOST_TOKENS}"
        )
    if not all(isinstance(value, bool) for value in flags.values()):
        raise Refused(f"{path / place}: added token {shown(text)} has a flag that is not a bool")
    token = AddedToken(text, **flags)
    return Stated(place, token, None if index is None else number, tuple(flags))


def tokens_to_add(
    folder: Folder,
    defaults: Mapping[str, str],
    stated: Iterable[Stated],
    held: Mapping[int, AddedToken],
    listed: list[AddedToken] | None = None,
) -> dict[str, Stated]:
    """The tokens that are added to a vocabulary, by text and in the order of transformers, which
    numbers new ones in that order.

    Places: ``added_tokens_decoder`` of tokenizer_config.json; without it special_tokens_map.json,
    added_tokens.json and the added_tokens of tokenizer.json, the later ones winning. Then the
    tokens that have a name, then those that are listed. ``defaults``: names that the class gives;
    ``held``: added to the vocabulary already; ``listed``: what tokenizer.model would list.
    """
    config, path = folder.config, folder.path
    named: dict[str, Any] = {**defaults}
    named |= {k: v for k, v in config.items() if k.endswith("_token") and (_is_token(v) or not v)}
    extra, more = (config.get(key) for key in LISTED)
    if isinstance(extra, dict):
        named |= extra
        extra = None
    elif not extra and more:
        extra = more
    numbered = [s for s in stated if s.place == CONFIG and s.index is not None]
    if "added_tokens_decoder" not in config:
        for key, value in folder.settings[SPECIAL_MAP].items():
            if key.endswith("_token") and (_is_token(value) or value is None):
                marked = {"special": True}
                named[key] = value | marked if isinstance(value, dict) else value
            elif key == LISTED[0] and isinstance(value, list):
                extra = [*(extra or []), *value]
            elif key == LISTED[1] and isinstance(value, list):
                more = value
            elif key == LISTED[0] and isinstance(value, dict):
                named |= value
        values = [v for v in named.values() if v] + list(extra or ())
        texts = {_stated(path, CONFIG, value, None).token.content for value in values}
        for s in stated:
            if s.place == ADDED:
                special = s.token.content in texts
                token = AddedToken(s.token.content, normalized=not special, special=special)
                numbered.append(replace(s, token=token))
        numbered += [s for s in stated if s.place == LIBRARY]
    by_id = {s.index or 0: s for s in numbered}
    by_text = {s.token.content: s for s in numbered}
    written = {repr(token) for token in held.values()}
    added = {s.token.content: s for _, s in sorted(by_id.items()) if repr(s.token) not in written}
    known = {token.content for token in held.values()} | set(added)
    roles = sorted(named, key=lambda key: NAMED.index(key) if key in NAMED else len(NAMED))
    if listed is not None:
        more = None  # tokenizer.model's own take the place of these
    tried: list[object] = []
    for role, value in [
        *((role, named[role]) for role in roles if named[role]),
        *((LISTED[0], value) for value in (more if extra is None else extra) or ()),
    ]:
        s = _stated(path, CONFIG, value, None)
        text = s.token.content
        if role in NAMED and text in by_text:
            value = s = replace(by_text[text], index=None)
        if text not in known and value not in tried:
            tried.append(value)
            flags = {} if isinstance(value, str) else {f: getattr(s.token, f) for f in FLAGS}
            # The last one wins.
            added[text] = replace(s, token=AddedToken(text, **flags | {"special": True}))
    for token in listed or () if extra is None else ():
        if token.content not in known:
            added[token.content] = Stated(SENTENCEPIECE, token)
    return added


def report_tokens(
    folder: Folder,
    stated: Iterable[Stated],
    cut: Mapping[int, AddedToken],
    *,
    normalizes: bool,
) -> None:
    """Says in one line where what a place states of an added token is not what came of it. ``cut``:
    the tokens that are cut out of texts, by id. Flags that change no id are let be: ``normalized``
    matters only where something ``normalizes``.
    """
    stated = list(stated)
    result = {token.content: (index, token) for index, token in cut.items()}
    heeded = [flag for flag in FLAGS if normalizes or flag != "normalized"]

    def differences(s: Stated) -> list[tuple[str, object, object]]:
        found = result.get(s.token.content)
        if found is None:
            return [("itself", "there", "not there")]
        index, token = found
        pairs = [("its id", index if s.index is None else s.index, index)]
        pairs += [(f, getattr(s.token, f), getattr(token, f)) for f in heeded if f in s.flags]
        return [pair for pair in pairs if pair[1] != pair[2]]

    told = [(s, differences(s)) for s in stated]
    wrong = [(s, found) for s, found in told if found]
    if not wrong:
        return
    s, ((what, said, came), *_) = wrong[0]
    agreeing = [
        o.place
        for o, found in told
        if o.token.content == s.token.content
        and o.place != s.place
        and what not in [name for name, *_ in found]
        and (o.index is not None if what == "its id" else what in o.flags)
    ]
    winner = agreeing[0] if agreeing else folder.vocabulary
    others = f" ({len(wrong) - 1} more tokens differ)" if len(wrong) > 1 else ""
    folder.warn(
        f"added token {shown(s.token.content)}: {what} is {said} in {s.place}, but {came} with "
        f"{winner}, which counts{others}"
    )


def prefix_space(folder: Folder, reader: str | None, file_says: bool) -> str:
    """Where a space is put before text: ``never``, ``first`` (where a text begins) or ``always``
    (also after every added token); ``as it is`` where the vocabulary's file alone decides.

    Places: ``add_prefix_space`` and ``legacy`` of tokenizer_config.json, which LlamaTokenizer and
    GPT2Tokenizer follow (by default true and false); else what ``file_says``.
    """
    asked, legacy = folder.flag("add_prefix_space"), folder.flag("legacy")
    wanted = asked if asked is not None else reader == LLAMA
    counts = wanted if reader else file_says
    if (reader or asked is not None) and wanted != file_says:
        by = f"{CONFIG}, read by {reader}" if reader else folder.vocabulary
        overruled = folder.vocabulary if reader else f"add_prefix_space in {CONFIG}"
        folder.warn(
            f"{by} puts {'a' if counts else 'no'} space before a text, which overrules {overruled}"
        )
    if not reader:
        return "as it is"
    if not wanted:
        return "never"
    return "always" if legacy or reader == GPT2 else "first"


def begins(folder: Folder, reader: str | None, vocabulary: Vocabulary) -> tuple[int | None, bool]:
    """The token that begins a text, and whether it is put before a prompt.

    Places of the token: the template of tokenizer.json, ``bos_token`` of tokenizer_config.json or
    special_tokens_map.json, the class's own, ``bos_token_id`` of generation_config.json, of
    config.json, tokenizer.model's own. It is wanted where the template puts it; of tokenizer.model,
    unless ``add_bos_token`` of tokenizer_config.json says no.
    """
    own = vocabulary.id_of(vocabulary.bos_text) if vocabulary.bos_text is not None else None
    said = _named_ids(folder, "bos", vocabulary)
    named = any("bos_token" in folder.settings[place] for place in (CONFIG, SPECIAL_MAP))
    default = None if named else DEFAULTS.get(reader, {}).get("bos_token")
    places = [*said[:2], ("", vocabulary.id_of(default) if default else None), *said[2:]]
    if len(vocabulary.prepended) == 1 and folder.vocabulary != SENTENCEPIECE:
        places.insert(0, (f"the template of {folder.vocabulary}", vocabulary.prepended[0]))
    places.append((SENTENCEPIECE, own))
    given = [(place, index) for place, index in places if index is not None]
    bos_id = given[0][1] if given else None
    others = [f"{index} in {place}" for place, index in given[1:] if place and index != bos_id]
    if others:
        folder.warn(
            f"BOS is {bos_id} by {given[0][0] or reader}, which overrules {', '.join(others)}"
        )
    asked = folder.flag("add_bos_token")
    if folder.vocabulary == SENTENCEPIECE:
        wanted = asked is not False
        if asked is None and bos_id is not None:
            folder.warn(
                f"{CONFIG} has no add_bos_token: BOS is put before a prompt, as {SENTENCEPIECE} "
                "has one; transformers puts none"
            )
    else:
        wanted = bos_id in vocabulary.prepended
        if asked is not None and asked != wanted:
            folder.warn(
                f"the template of {folder.vocabulary} puts {'BOS' if wanted else 'no BOS'} before "
                f"a prompt, which overrules add_bos_token in {CONFIG}"
            )
        if len(vocabulary.prepended) > 1:
            folder.warn(
                f"the template of {folder.vocabulary} puts {list(vocabulary.prepended)} before a "
                f"prompt; only BOS is put there, {bos_id if wanted else 'none'}, by {CONFIG}"
            )
    return bos_id, wanted and bos_id is not None


def ends(folder: Folder, vocabulary: Vocabulary) -> frozenset[int]:
    """The tokens that end a text: all that any place names.

    Places: ``eos_token_id`` of generation_config.json and config.json, ``eos_token`` of
    tokenizer_config.json and special_tokens_map.json, tokenizer.model's own.
    """
    said: list[tuple[str, set[int]]] = [
        (name, set(_ids(folder.settings[name].get("eos_token_id"))))
        for name in (GENERATION, MODEL_CONFIG)
    ]
    for place, index in _named_ids(folder, "eos", vocabulary)[:2]:
        said.append((place, set() if index is None else {index}))
    own = vocabulary.id_of(vocabulary.eos_text) if vocabulary.eos_text is not None else None
    said.append((SENTENCEPIECE, set() if own is None else {own}))
    said = [(place, ids) for place, ids in said if ids]
    if vocabulary.appended:
        folder.warn(
            f"the template of {folder.vocabulary} puts {list(vocabulary.appended)} after a text; "
            "unlike in transformers nothing is put there, so that it can go on"
        )
    if any(not ids <= said[0][1] for _, ids in said):
        listed = "; ".join(f"{sorted(ids)} by {place}" for place, ids in said)
        folder.warn(f"EOS is {listed}: each of them ends a text")
    return frozenset().union(*(ids for _, ids in said))


def _named_ids(folder: Folder, role: str, vocabulary: Vocabulary) -> list[tuple[str, int | None]]:
    """The first id that each place gives a role, in the order of transformers."""
    found: list[tuple[str, int | None]] = []
    for place in (CONFIG, SPECIAL_MAP):
        token = folder.settings[place].get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        found.append((place, vocabulary.id_of(text) if isinstance(text, str) else None))
    if "added_tokens_decoder" not in folder.config:  # then the special tokens' own file wins
        found.reverse()
    for place in (GENERATION, MODEL_CONFIG):
        ids = _ids(folder.settings[place].get(f"{role}_token_id"))
        found.append((place, ids[0] if ids else None))
    return found


def _ids(value: object) -> list[int]:
    """Token ids written as one number, a list of numbers, or null."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
