"""Text to token ids and back, and the tokenizer of a folder or a GGUF file.

What they say of special tokens is decided in ``brain.tokenizers.folder`` and
``brain.tokenizers.gguf_vocabulary``. Tokenizing adds
nothing and drops nothing, or says so once. The one place where a BOS token is ever inserted is
:meth:`Tokenizer.with_bos`, called where a text begins.
"""

import codecs
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from brain.errors import Refused, shown
from brain.tokenizers import gguf_vocabulary, sentencepiece_model, tokenizer_json
from brain.tokenizers.folder import (
    ADDED,
    CONFIG,
    GPT2,
    LIBRARY,
    LISTED,
    LLAMA,
    QWEN2,
    SENTENCEPIECE,
    Folder,
    Stated,
    begins,
    chat_template,
    check_tokens,
    ends,
    named_tokens,
    prefix_space,
    read_folder,
    reading_class,
    report_unheeded,
    stated_tokens,
    tokens_to_add,
)
from brain.tokenizers.vocabulary import Vocabulary, WarnOnce, added_tokens_alone

PROBES = ("Hello world", "two  spaces", "ﬁve Ⅻ 12 ① 漢 🤖", "naïve cafe\u0301\n\tend ")
"""Texts that show how a vocabulary normalizes and cuts."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary together with its special tokens."""

    vocabulary: Vocabulary
    bos_id: int | None  # begins a text, if the vocabulary has such a token
    eos_ids: frozenset[int]  # each ends a text
    wants_bos: bool  # the model was trained to see BOS first
    chat_template: str | None = None  # how a conversation is written, in Jinja's language
    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by the names that a template has for them, such as ``bos_token``."""
    _altered: WarnOnce = field(
        default_factory=lambda: WarnOnce(
            "the model's tokenizer alters this text: its ids stand for one with other white space "
            "or characters"
        ),
        repr=False,
    )

    @property
    def vocab_size(self) -> int:
        """One more than the highest id the tokenizer knows (a model's embedding may have more)."""
        return len(self.vocabulary.spelling)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text: nothing added, no BOS, EOS or padding, and nothing cut off. With
        ``special``, special tokens written out in the text ("<|im_start|>") become their id. Raises
        Refused where the text is not valid Unicode or the vocabulary cannot spell it.
        """
        self._require_unicode(text)
        ids = self.vocabulary.split(text) if special else self.vocabulary.split_plain(text)
        self._check_spelling(text, ids)
        return ids

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """The ids of a text of which only parts may hold control tokens.

        Where no other part has one written in it, these are the ids of ``encode`` for the whole
        text: pieces are joined before they are split. Where one has, it is split as plain text.
        A control token is every added token but plain white space, whether or not it is flagged
        as special.

        Args:
            pieces: Texts, and whether control tokens in them count.
        Returns:
            The ids: nothing added.
        Raises:
            Refused: A text is not valid Unicode, the vocabulary cannot spell it, or has no way to
                spell it without a control token.
        """
        pieces = [piece for piece in pieces if piece[0]]
        text = "".join(piece for piece, _ in pieces)
        self._require_unicode(text)
        trusted = [
            "".join(piece for piece, _ in run)
            for counts, run in groupby(pieces, key=lambda piece: piece[1])
            if counts
        ]
        written = [token.content for token in self.vocabulary.controls.values()]
        veiled = "".join(piece if counts else self._veil(piece) for piece, counts in pieces)
        ids = self.vocabulary.split(text)
        if self._controls_in(ids) != self._controls_in(self.vocabulary.split(veiled)) or any(
            _count(text, token) != sum(_count(piece, token) for piece in trusted)
            for token in written
        ):
            parts = self._parts(text, veiled)
            ids = self.vocabulary.split_parts(parts)
            if self._controls_in(ids) != self._controls_in(i for i in parts if isinstance(i, int)):
                raise Refused(
                    "text becomes a control token of this model's vocabulary, which has no other "
                    f"spelling for it; change it: {shown(text)}"
                )
        self._check_spelling(text, ids)
        return ids

    def _parts(self, text: str, veiled: str) -> list[str | int]:
        """The control tokens that count, and the texts between them."""
        library, numbers = self._sections
        found = library.encode(veiled, add_special_tokens=False)
        return [
            numbers[own] if own else text[start:end]
            for own, (start, end) in zip(found.ids, found.offsets, strict=True)
        ]

    @cached_property
    def _sections(self) -> tuple[Library, dict[int, int]]:
        return added_tokens_alone(self.vocabulary.controls)

    @cached_property
    def _forbidden(self) -> frozenset[int]:
        """What no text from outside may become. What stands for unknown characters may come."""
        ids = {*self.vocabulary.controls, *self.eos_ids, self.bos_id} - {None}
        return frozenset(ids - {*self.vocabulary.split_plain("\U0010fffd")})  # type: ignore[arg-type]

    def _controls_in(self, ids: Iterable[int]) -> list[int]:
        return [index for index in ids if index in self._forbidden]

    @cached_property
    def _veils(self) -> tuple[str, str, str]:
        """A space, a letter and another character that are in no control token."""
        taken = {c for token in self.vocabulary.controls.values() for c in token.content}
        kinds = (range(0x2000, 0x200A), range(0xA000, 0xA48D), range(0xE000, 0xF8FF))
        space, letter, other = (next(chr(c) for c in kind if chr(c) not in taken) for kind in kinds)
        return space, letter, other

    def _veil(self, text: str) -> str:
        """As many characters in which no control token is written. White space and letters stay
        what they are: some tokens take white space beside them, some need no letter there.
        """
        space, letter, other = self._veils
        return "".join(
            space if c.isspace() else letter if c.isalnum() or c == "_" else other for c in text
        )

    def _require_unicode(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused(
                f"text has half a surrogate pair, U+{ord(text[error.start]):04X}, "
                f"at character {error.start}; give valid Unicode"
            ) from None

    def _check_spelling(self, text: str, ids: list[int]) -> None:
        """Refuses ids that do not stand for the text, or says once that they stand for another."""
        lossless = self.vocabulary.lossless
        if lossless and b"".join(map(self.token_bytes, ids)) != text.encode():
            raise Refused(self._unspeakable(text))
        # A text may be long: what has been told once is not looked for again.
        if not (lossless or self._altered.given) and self.decode(ids) != text:
            self._altered()

    def _unspeakable(self, text: str) -> str:
        """Names the character that the vocabulary has no bytes for."""
        for index, character in enumerate(text):
            ids = self.vocabulary.split_plain(character)
            if b"".join(map(self.token_bytes, ids)) != character.encode():
                return (
                    f"text has U+{ord(character):04X} at character {index}, which this model's "
                    "vocabulary cannot spell; remove or replace it"
                )
        return "text is not restored by decoding its tokens: the tokenizer alters it"

    def with_bos(self, ids: Iterable[int]) -> list[int]:
        """The ids of an initial prompt: BOS first, if the model wants it and it is not there."""
        ids = list(ids)
        if not self.wants_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def initial_prompt(self, text: str) -> list[int]:
        """The ids that begin a context with this text."""
        return self.with_bos(self.encode(text))

    def token_bytes(self, token_id: int) -> bytes:
        """What one id stands for: UTF-8 or a fragment of it; control tokens are their own text. An
        id that the tokenizer does not know is shown as ``<id 49200>``.
        """
        token_id = int(token_id)
        if 0 <= token_id < len(self.vocabulary.spelling):
            spelling = self.vocabulary.spelling[token_id]
            if spelling is not None:
                return spelling
        return f"<id {token_id}>".encode()

    def decode(self, ids: Iterable[int], *, at_start: bool = True) -> str:
        """The text of these ids, control tokens included; invalid UTF-8 becomes U+FFFD. Where they
        begin a text, the one space that SentencePiece puts before it (or after BOS) is removed.
        """
        stream = StreamDecoder(self, at_start=at_start)
        raw = b"".join(stream.spell(token_id) for token_id in ids)
        return raw.decode(errors="replace")


def _count(text: str, part: str) -> int:
    """How often a part is in a text, overlapping or not."""
    count, at = 0, text.find(part)
    while at >= 0:
        count, at = count + 1, text.find(part, at + 1)
    return count


class StreamDecoder:
    """Turns ids into text one at a time, never returning a part of a character.

    The returned pieces, joined, are ``tokenizer.decode`` of the same ids with the same
    ``at_start``. A byte that cannot be valid UTF-8 becomes U+FFFD as soon as that is certain.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = True) -> None:
        self._tokenizer = tokenizer
        self._drop_space = at_start and tokenizer.vocabulary.leading_space
        self._may_be_bos = self._drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def spell(self, token_id: int) -> bytes:
        """The next id's bytes, less the space that begins a text. Does not decode them."""
        raw = self._tokenizer.token_bytes(token_id)
        if not self._drop_space:
            return raw
        if self._may_be_bos and token_id == self._tokenizer.bos_id:
            self._may_be_bos = False
            return raw
        self._drop_space = False
        return raw.removeprefix(b" ")

    def push(self, token_id: int) -> str:
        """The characters that this id completes; often one word, possibly none."""
        return self._utf8.decode(self.spell(token_id))

    @property
    def unfinished(self) -> bytes:
        """The bytes of a character that has begun and is not complete."""
        return self._utf8.getstate()[0]

    def go_on(self, unfinished: bytes) -> None:
        """Continues a stream that stopped within a character."""
        self._utf8.setstate((unfinished, 0))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)


REMADE = {
    LLAMA: tokenizer_json.as_llama,
    GPT2: tokenizer_json.as_gpt2,
    QWEN2: tokenizer_json.as_qwen2,
}
"""What the classes of transformers make of a ``tokenizer.json``."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, as transformers reads it. What a folder says twice is
    decided in ``brain.tokenizers.folder``, with a warning where it differs. Raises Refused.
    """
    said = read_folder(folder)
    reader = reading_class(said)
    where = str(folder / said.vocabulary)
    spec = tokenizer_json.parse_tokenizer_json(said.library, where) if said.library else {}
    stated = stated_tokens(said, reader, spec.get("added_tokens"))
    if said.library:
        vocabulary = _from_library(said, reader, spec, stated, where)
    else:
        vocabulary = _from_sentencepiece(said, reader, stated, where)
    report_unheeded(said, reader, vocabulary)
    bos_id, wants_bos = begins(said, stated, vocabulary)
    return Tokenizer(
        vocabulary,
        bos_id,
        ends(said, stated, vocabulary),
        wants_bos,
        chat_template=chat_template(said),
        named=named_tokens(stated),
    )


def gguf_tokenizer(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata. Raises Refused, naming the file as ``where``."""
    vocabulary = gguf_vocabulary.read_vocabulary(fields, where)
    bos_id, wants_bos = gguf_vocabulary.begins(fields, vocabulary, where)
    template = fields.get("tokenizer.chat_template")
    return Tokenizer(
        vocabulary,
        bos_id,
        gguf_vocabulary.ends(fields, vocabulary, where),
        wants_bos,
        chat_template=template if isinstance(template, str) else None,
        named=gguf_vocabulary.named_tokens(fields),
    )


def _from_library(
    said: Folder, reader: str | None, spec: dict[str, Any], stated: list[Stated], where: str
) -> Vocabulary:
    """The vocabulary of a folder whose ``tokenizer.json``, parsed as ``spec``, counts."""
    prefix, made = prefix_space(said, reader), spec
    if reader:
        made = REMADE[reader](spec, prefix)
        other_kind = reader != LLAMA and not tokenizer_json.is_byte_level(spec, where)
        if other_kind or not isinstance(made["model"]["vocab"], dict):
            raise Refused(
                f"{where}: not the vocabulary that {reader} of the folder's settings needs; name "
                "PreTrainedTokenizerFast there"
            )
    content = said.library if made is spec else None
    library = tokenizer_json.load_library(made, where, content)
    with tokenizer_json.refusing(f"{where}: tokenizer cannot be loaded"):
        library.add_tokens(tokens_to_add(stated, library.get_added_tokens_decoder()))
    cut = library.get_added_tokens_decoder()
    check_tokens(said, stated, cut, normalizes=bool(made.get("normalizer")))
    vocabulary = tokenizer_json.vocabulary_of(library, made, where)
    if reader:
        _compare(said, f"{reader} of the settings", vocabulary, LIBRARY, _as_it_is(spec, where))
    if said.sentencepiece:
        try:
            model = sentencepiece_model.load_sentencepiece(said.sentencepiece, where)
        except Refused:  # a list for tiktoken, it may be
            return vocabulary
        pieces = sentencepiece_model.piece_list(model)
        if [*map(vocabulary.id_of, pieces)] != [*range(len(pieces))]:
            said.warn(f"{LIBRARY} overrules {SENTENCEPIECE}, which has other ids")
        else:
            _compare(said, LIBRARY, vocabulary, SENTENCEPIECE, model.encode)
    return vocabulary


def _as_it_is(spec: dict[str, Any], where: str) -> Callable[[str], list[int]]:
    """How a ``tokenizer.json`` itself splits a text; none, where it cannot be read alone."""
    try:
        steady = {**spec, "model": {**spec["model"], "dropout": None}}
        library = tokenizer_json.load_library(steady, where)
    except Refused:
        return lambda text: []

    def split(text: str) -> list[int]:
        try:
            with tokenizer_json.refusing(where):
                return list(library.encode(text, add_special_tokens=False).ids)
        except Refused:
            return []

    return split


def _compare(
    said: Folder, winner: str, vocabulary: Vocabulary, file: str, split: Callable[[str], list[int]]
) -> None:
    """Says where ``winner`` overrules a file that would ``split`` texts otherwise."""
    for text in PROBES:
        if vocabulary.split_plain(text) != split(text):
            said.warn(f"{winner}, which overrules {file}, splits {text!r} otherwise")
            return


def _from_sentencepiece(
    said: Folder, reader: str | None, stated: list[Stated], where: str
) -> Vocabulary:
    """The vocabulary of a folder that has only a ``tokenizer.model``."""
    model = said.sentencepiece
    try:
        processor = sentencepiece_model.load_sentencepiece(model, where)
    except Refused as refusal:
        raise Refused(f"{refusal}; if it is a list for tiktoken, put {LIBRARY} there") from None
    prefix = prefix_space(said, reader)
    if reader in (GPT2, QWEN2):
        raise Refused(f"{where}: {reader}, which the folder's settings name, does not read it")
    if reader == LLAMA:
        model = sentencepiece_model.changing_nothing(model, space=prefix != "never")
    pieces = {p: index for index, p in enumerate(sentencepiece_model.piece_list(processor))}
    listed = sentencepiece_model.listed_pieces(model, where)
    numbers = {s.text: s.index for s in reversed(stated) if s.index is not None} | pieces
    # Where no list is given, transformers lists the model's own special pieces instead.
    heeded = [s for s in stated if s.heeded and (s.role != LISTED[1] or s.place == CONFIG)]
    lists = any(s.role in LISTED for s in heeded)
    own = {} if lists else {token.content: token for token in listed.values()}
    given: dict[str, AddedToken] = {}
    for s in heeded:
        if s.text in numbers:
            token = own.get(s.text, s.token) if s.index is None else s.token
            given.setdefault(s.text, token)
        elif s.place != reader:
            raise Refused(
                f"{said.path}: {s.place} has the special token {shown(s.text)}, which has no id in "
                f"{SENTENCEPIECE} or {ADDED}; give it one there"
            )
    cut = listed | {numbers[text]: token for text, token in given.items()}
    check_tokens(said, stated, cut, normalizes=False)
    new = [text for text in given if text not in pieces]
    theirs = {text: len(pieces) + rank for rank, text in enumerate(new)}
    theirs |= {text: pieces[text] for text in (*given, *own) if text in pieces}
    strips = any(t.normalized and (t.lstrip or t.rstrip) for t in cut.values())
    if theirs != {t.content: index for index, t in cut.items()} or (strips and reader is None):
        said.warn(
            f"added tokens are cut out and numbered as {CONFIG} and {ADDED} say, not by the order "
            f"of transformers after {SENTENCEPIECE}"
        )
    vocabulary = sentencepiece_model.read_sentencepiece(model, where, cut, prefix=prefix)
    if reader == LLAMA:
        _compare(said, f"{reader} of the settings", vocabulary, SENTENCEPIECE, processor.encode)
        if not sentencepiece_model.merges_in_order(processor):
            said.warn(
                f"{SENTENCEPIECE} counts; {reader} of the settings would merge its pieces in the "
                "order of their ids"
            )
    return vocabulary
