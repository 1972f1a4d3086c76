"""What a Hugging Face folder says about its tokenizer: one function for each fact.

Each reads every place that speaks of the fact, in the order of transformers. Where they differ, one
line says what was overruled, or the folder is refused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from brain.errors import Refused, one_line, shown, warn
from brain.files import TOKENIZER_BYTES, read_bytes, read_object, read_text
from brain.tokenizers.vocabulary import MOST_TOKENS, Vocabulary

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE = "chat_template.jinja"
GENERATION, MODEL_CONFIG = "generation_config.json", "config.json"
LIBRARY, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"

NAMED = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTED = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LLAMA, GPT2, QWEN2 = "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"
AS_IT_IS = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", "BloomTokenizer")
DEFAULTS: dict[str | None, dict[str, str]] = {
    LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    QWEN2: dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
"""The tokens that these classes of transformers have where a folder names none."""
UNHEEDED = {
    "split_special_tokens": "special tokens written in a text become their id",
    "fix_mistral_regex": "text is cut as the vocabulary says",
    "auto_map": "no code of a folder is run",
    "add_eos_token": "nothing is put after a text, which can so go on",
}
"""Settings of tokenizer_config.json, and what is done instead."""


@dataclass(frozen=True)
class Folder:
    """The files of a folder that speak of its tokenizer; an absent one says nothing."""

    path: Path
    settings: Mapping[str, dict[str, Any]]  # the small JSON files, by name
    library: str  # tokenizer.json, as text; where there is none, tokenizer.model is the vocabulary
    sentencepiece: bytes  # tokenizer.model
    template: str | None = None  # chat_template.jinja

    @property
    def vocabulary(self) -> str:
        """The name of the file that is the vocabulary."""
        return LIBRARY if self.library else SENTENCEPIECE

    def warn(self, message: str) -> None:
        """Warns in one line that names the folder."""
        warn(f"{self.path}: {message}")

    def flag(self, key: str) -> bool | None:
        """What ``tokenizer_config.json`` says under this key; None: nothing."""
        value = self.settings[CONFIG].get(key)
        if value is None or isinstance(value, bool):
            return value
        raise Refused(f"{self.path / CONFIG}: {key} is {shown(value)}; use true or false")


@dataclass(frozen=True)
class Stated:
    """What one place says of an added token."""

    place: str
    role: str  # the name it has, such as bos_token
    token: AddedToken
    index: int | None  # None: the place only names it, or lists it
    flags: tuple[str, ...]  # the ones it speaks of
    heeded: bool  # by transformers

    @property
    def text(self) -> str:
        """What is written in a text."""
        return self.token.content


def read_folder(path: Path) -> Folder:
    """Reads the files. Raises Refused."""
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
    library, model = path / LIBRARY, path / SENTENCEPIECE
    if not library.exists() and not model.exists():
        raise Refused(
            f"{path}: no tokenizer; put {LIBRARY} or {SENTENCEPIECE} there (from vocab.json and "
            f"merges.txt, save_pretrained of transformers makes {LIBRARY})"
        )
    try:
        # Blank where the file is empty: that is not JSON.
        text = (read_text(library, TOKENIZER_BYTES) or " ") if library.exists() else ""
        content = b""
        with suppress(OSError) if text else nullcontext():  # then it is only compared
            content = read_bytes(model, TOKENIZER_BYTES) if model.exists() else b""
        template = path / TEMPLATE
        written = read_text(template, TOKENIZER_BYTES) if template.exists() else None
        return Folder(path, settings, text, content, written)
    except (OSError, UnicodeError) as error:
        raise Refused(f"{path}: tokenizer cannot be read ({one_line(error)})") from None


def reading_class(folder: Folder) -> str | None:
    """The class of transformers that makes parts of the tokenizer anew, whatever ``tokenizer.json``
    says: LlamaTokenizer, GPT2Tokenizer or Qwen2Tokenizer. None: the file counts as it is.
    """
    model_type = folder.settings[MODEL_CONFIG].get("model_type")
    declared = [
        (name, value.removesuffix("Fast"))
        for name in (CONFIG, MODEL_CONFIG)
        if isinstance(value := folder.settings[name].get("tokenizer_class"), str)
    ]
    if not declared:
        return QWEN2 if model_type in ("qwen2", "qwen3") else None
    place, chosen = declared[0]
    if declared[-1][1] != chosen:
        folder.warn(f"{place} names {chosen}, which overrules {declared[-1][1]} in {MODEL_CONFIG}")
    if model_type == "qwen2":
        if chosen != QWEN2:
            folder.warn(f"model_type qwen2 in {MODEL_CONFIG} overrules {chosen} in {place}")
        return QWEN2
    if chosen in AS_IT_IS or model_type in ("mistral", "granite"):
        return None
    if chosen == LLAMA and '"ByteLevel"' in folder.library:
        folder.warn(f"{LIBRARY} is byte-level, which overrules {chosen} in {place}")
        return None
    if chosen in (LLAMA, GPT2, QWEN2):
        return chosen
    folder.warn(f"{place} names {chosen}, which is not known here: {folder.vocabulary} counts")
    return None


def report_unheeded(folder: Folder, reader: str | None, vocabulary: Vocabulary) -> None:
    """Says which settings of tokenizer_config.json are not followed."""
    asked, put = folder.flag("add_prefix_space"), vocabulary.leading_space
    if reader is None and asked not in (None, put):
        folder.warn(
            f"{folder.vocabulary} puts {'a' if put else 'no'} space before a text, which overrules "
            f"add_prefix_space in {CONFIG}"
        )
    for key, instead in UNHEEDED.items():
        # With tokenizer.json its template decides what is put around a text.
        heeded = key == "add_eos_token" and folder.library
        if folder.settings[CONFIG].get(key) and not heeded:
            folder.warn(f"{key} in {CONFIG} is not followed as in transformers: {instead}")


def stated_tokens(folder: Folder, reader: str | None, in_library: object) -> list[Stated]:
    """What every place says of added tokens: those with a number, with a name, then listed ones; of
    each text the first that is heeded counts. ``in_library``: the added_tokens of tokenizer.json.
    Raises Refused where one is malformed, or two lists differ.
    """
    path, settings = folder.path, folder.settings
    declared = settings[CONFIG].get("added_tokens_decoder", {})
    if not isinstance(declared, dict):
        raise Refused(
            f"{path / CONFIG}: added_tokens_decoder is {shown(declared)}; use an object of tokens "
            "by id"
        )
    # With it, transformers reads no other file.
    others = () if "added_tokens_decoder" in settings[CONFIG] else (SPECIAL_MAP, LIBRARY, ADDED)
    named = [
        (place, role, value)
        for place in ((SPECIAL_MAP, CONFIG) if others else (CONFIG, SPECIAL_MAP))
        for role, value in _special(path / place, settings[place])
    ]
    lists: dict[str, list[Any]] = {}
    for place, role, value in named:
        if role in LISTED and place in (CONFIG, *others):
            lists.setdefault(f"{role} in {place}", []).append(_text(value))
    for key, texts in lists.items():
        if texts != next(iter(lists.values())):
            raise Refused(f"{path}: {key} is not what {next(iter(lists))} is; keep one of them")
    late = (SPECIAL_MAP, LISTED[1])  # not looked at where added_tokens.json is read
    listed = [
        _text(v) for place, role, v in named if role in NAMED + LISTED if (place, role) != late
    ]

    found = [_stated(path, CONFIG, value, index, heeded=True) for index, value in declared.items()]
    for value in in_library if isinstance(in_library, list) else []:
        index = value.get("id") if isinstance(value, dict) else None
        found.append(_stated(path, LIBRARY, value, str(index), heeded=LIBRARY in others))
    for text, index in settings[ADDED].items():
        special = text in listed
        stated = _stated(path, ADDED, text, str(index), heeded=ADDED in others)
        found.append(replace(stated, token=AddedToken(text, special=special)))
    named += [(reader or "", role, text) for role, text in DEFAULTS.get(reader, {}).items()]
    ranks = {role: rank for rank, role in enumerate((*NAMED, "", *LISTED))}
    first: dict[str, str] = {}
    for place, role, value in sorted(named, key=lambda row: ranks.get(row[1], ranks[""])):
        heeded = place in (CONFIG, reader, *others) and first.setdefault(role, place) == place
        if value and (heeded or place != reader):
            found.append(_stated(path, place, value, None, heeded=heeded, role=role))
    return found


def _special(path: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The special tokens of a settings file: those with a name, and those that are listed."""
    for key, value in settings.items():
        if key in LISTED:
            if not isinstance(value, list | dict | None):
                raise Refused(f"{path}: {key} is no list of tokens; use one")
            if isinstance(value, dict):
                yield from value.items()
            else:
                yield from ((key, token) for token in value or ())
        elif key.endswith("_token") and (value is None or isinstance(_text(value), str)):
            yield key, value


def _text(value: Any) -> Any:
    """The text of a token as a file writes it, alone or with flags; None: it is neither."""
    return value.get("content") if isinstance(value, dict) else value


def _stated(
    path: Path, place: str, value: object, index: str | None, *, heeded: bool, role: str = ""
) -> Stated:
    """A token as a file writes it. ``index``: as text; None: it has a name, or is listed."""
    text = _text(value)
    written = value if isinstance(value, dict) else {}
    flags = {flag: written[flag] for flag in FLAGS if flag in written}
    number = MOST_TOKENS
    if index is not None and index.isdecimal() and len(index) < 8:
        number = int(index)
    # Half a surrogate pair, which JSON can hold, is not text.
    is_text = isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)
    if not text or not is_text or (index is not None and number >= MOST_TOKENS):
        told = "is no text; use one"
        if index is not None:
            told = f"has id {index}; use a text and a number below {MOST_TOKENS}"
        raise Refused(f"{path / place}: added token {shown(text)} {told}")
    if not all(isinstance(value, bool) for value in flags.values()):
        raise Refused(f"{path / place}: added token {shown(text)} has a flag that is not a bool")
    token = AddedToken(text, **flags)
    if index is None:
        if place != CONFIG or not written:
            token = AddedToken(text, **flags | {"special": True})
        token.special = True
    return Stated(place, role, token, None if index is None else number, tuple(flags), heeded)


def tokens_to_add(stated: Iterable[Stated], held: Mapping[int, AddedToken]) -> list[AddedToken]:
    """The tokens that are added to a tokenizer.json that ``held`` these already, in the order in
    which transformers numbers new ones.
    """
    heeded = [s for s in stated if s.heeded]
    by_id = {s.index: s for s in reversed(heeded) if s.index is not None}
    added = {s.text: s.token for _, s in sorted(by_id.items())}
    known = {token.content for token in held.values()} | set(added)
    # Of names the last counts.
    added |= {s.text: s.token for s in heeded if s.index is None and s.text not in known}
    return list(added.values())


def check_tokens(
    folder: Folder, stated: Sequence[Stated], cut: Mapping[int, AddedToken], *, normalizes: bool
) -> None:
    """Compares what is stated with the tokens that are ``cut`` out of texts, by id. One that is not
    there, or a name's flags that a number's overrule, are told in a line; else raises Refused.
    ``normalized`` counts where something ``normalizes``.
    """
    result = {token.content: (index, token) for index, token in cut.items()}
    lines: list[str] = []
    for s in stated:
        if s.text not in result:
            lines.append(f"{shown(s.text)} of {s.place} is not added, as transformers reads it")
            continue
        index, token = result[s.text]
        facts = [("its id", index if s.index is None else s.index, index)]
        facts += [(flag, getattr(s.token, flag), getattr(token, flag)) for flag in s.flags]
        for what, said, came in facts:
            if said != came and (normalizes or what != "normalized"):
                others = [o for o in stated if o.text == s.text and o.place != s.place]
                numbered = [o.place for o in others if o.index is not None]
                place = [*numbered, *(o.place for o in others), folder.vocabulary][0]
                line = f"{shown(s.text)}: {what} is {said} in {s.place}, but {came} with {place}"
                if s.index is not None or not numbered:
                    raise Refused(f"{folder.path}: added token {line}; make them agree")
                lines.append(f"{line}, which counts")
    if lines:
        more = f" ({len(lines) - 1} more differ)" if len(lines) > 1 else ""
        folder.warn(f"added token {lines[0]}{more}")


def prefix_space(folder: Folder, reader: str | None) -> str:
    """Where ``add_prefix_space`` and ``legacy`` of tokenizer_config.json put a space, as the class
    reads them: ``never``, ``first`` (where a text begins) or ``always`` (also after every added
    token); ``as it is`` where the vocabulary's file alone decides.
    """
    asked, legacy = folder.flag("add_prefix_space"), folder.flag("legacy")
    if reader is None:
        return "as it is"
    wanted = asked if asked is not None else reader == LLAMA
    return "never" if not wanted else "always" if legacy or reader != LLAMA else "first"


def begins(
    folder: Folder, stated: Iterable[Stated], vocabulary: Vocabulary
) -> tuple[int | None, bool]:
    """The token that begins a text, the first of: the template of tokenizer.json, ``bos_token``,
    ``bos_token_id``, tokenizer.model's own; and whether it is put before a prompt, as the template
    does, or for tokenizer.model unless ``add_bos_token`` says no.
    """
    template = f"the template of {LIBRARY}"
    prepended = vocabulary.prepended if folder.library else ()
    places = [(template, index) for index in prepended if len(prepended) == 1]
    places += _stated_ids(folder, "bos", stated, vocabulary)
    bos_id = places[0][1] if places else None
    others = [f"{index} in {place}" for place, index in places if index != bos_id]
    if others:
        folder.warn(f"BOS is {bos_id} by {places[0][0]}, which overrules {', '.join(others)}")
    asked = folder.flag("add_bos_token")
    if not folder.library:
        if asked is None and bos_id is not None:
            folder.warn(
                f"{CONFIG} has no add_bos_token: BOS is put before a prompt, as {SENTENCEPIECE} "
                "has one; transformers puts none"
            )
        return bos_id, asked is not False and bos_id is not None
    wanted = bos_id in prepended
    if asked is not None and asked != wanted:
        folder.warn(
            f"{template} puts {'BOS' if wanted else 'no BOS'} before a prompt, which overrules "
            f"add_bos_token in {CONFIG}"
        )
    if len(prepended) > 1:
        folder.warn(
            f"{template} puts {list(prepended)} before a prompt; only BOS is put there, "
            f"{bos_id if wanted else 'none'}, by {CONFIG}"
        )
    return bos_id, wanted


def ends(folder: Folder, stated: Iterable[Stated], vocabulary: Vocabulary) -> frozenset[int]:
    """The tokens that end a text: all that any place names."""
    said: dict[str, set[int]] = {GENERATION: set(), MODEL_CONFIG: set()}
    for place, index in _stated_ids(folder, "eos", stated, vocabulary):
        said.setdefault(place, set()).add(index)
    told = [(place, ids) for place, ids in said.items() if ids]
    if vocabulary.appended:
        folder.warn(
            f"the template of {folder.vocabulary} puts {list(vocabulary.appended)} after a text; "
            "unlike in transformers nothing is put there, so that it can go on"
        )
    if any(not ids <= told[0][1] for _, ids in told):
        listed = "; ".join(f"{sorted(ids)} by {place}" for place, ids in told)
        folder.warn(f"EOS is {listed}: each of them ends a text")
    return frozenset().union(*said.values())


def chat_template(folder: Folder) -> str | None:
    """How the model's makers write a conversation, in Jinja's language: ``chat_template.jinja``,
    else ``chat_template`` of tokenizer_config.json, of several the one called ``default``. None:
    nothing says it.
    """
    said = folder.settings[CONFIG].get("chat_template")
    if isinstance(said, list):
        entries = [entry for entry in said if isinstance(entry, dict)]
        said = {entry.get("name"): entry.get("template") for entry in entries}.get("default")
    found = said if isinstance(said, str) else None
    if folder.template is None:
        if found is None and folder.settings[CONFIG].get("chat_template") is not None:
            folder.warn(f"chat_template in {CONFIG} is no text, and has none called default")
        return found
    if found not in (None, folder.template):
        folder.warn(f"{TEMPLATE} overrules chat_template in {CONFIG}")
    return folder.template


def named_tokens(stated: Iterable[Stated]) -> dict[str, str]:
    """The special tokens that transformers gives to a chat template, by name."""
    return {s.role: s.text for s in reversed([*stated]) if s.role in NAMED and s.heeded}


def _stated_ids(
    folder: Folder, role: str, stated: Iterable[Stated], vocabulary: Vocabulary
) -> list[tuple[str, int]]:
    """The ids that each place gives a role, ``bos`` or ``eos``, in the order of transformers."""
    own = {"bos": vocabulary.bos_text, "eos": vocabulary.eos_text}[role]
    named = [s for s in stated if s.role == f"{role}_token"]
    # A class's own EOS is left out: it is seldom the model's.
    named = [s for s in named if role == "bos" or s.place in folder.settings]
    found = [(s.place, vocabulary.id_of(s.text)) for s in named]
    for place in (GENERATION, MODEL_CONFIG):
        value = folder.settings[place].get(f"{role}_token_id")
        values = value if isinstance(value, list) else [value]
        ids = [v for v in values if type(v) is int and v >= 0]
        found += [(place, index) for index in (ids[:1] if role == "bos" else ids)]
    found.append((SENTENCEPIECE, None if own is None else vocabulary.id_of(own)))
    return [(place, index) for place, index in found if index is not None]
