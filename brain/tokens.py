"""Text to token ids and back, and every decision about special tokens.

Tokenizing adds nothing and drops nothing. The one place where a BOS token is ever inserted is
:meth:`Tokenizer.with_bos`, called where a text begins.
"""

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brain.errors import Refused, one_line, shown
from brain.files import TOKENIZER_BYTES, read_bytes, read_object, read_text
from brain.tokenizers.sentencepiece_model import read_sentencepiece
from brain.tokenizers.tokenizer_json import read_tokenizer_json
from brain.tokenizers.vocabulary import MOST_TOKENS, Vocabulary


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary together with its special tokens."""

    vocabulary: Vocabulary
    bos_id: int | None  # begins a text, if the vocabulary has such a token
    eos_ids: frozenset[int]  # each ends a text
    wants_bos: bool  # the model was trained to see BOS first

    @property
    def vocab_size(self) -> int:
        """One more than the highest id the tokenizer knows (a model's embedding may have more)."""
        return len(self.vocabulary.spelling)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text: nothing added, no BOS, EOS or padding, and nothing cut off. With
        ``special``, special tokens written out in the text ("<|im_start|>") become their id. Raises
        Refused where the text is not valid Unicode or the vocabulary cannot spell it.
        """
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise Refused(
                f"text has half a surrogate pair, U+{ord(text[error.start]):04X}, "
                f"at character {error.start}; give valid Unicode"
            ) from None
        ids = self.vocabulary.split(text) if special else self.vocabulary.split_plain(text)
        if self.vocabulary.lossless and b"".join(map(self.token_bytes, ids)) != raw:
            raise Refused(self._unspeakable(text))
        return ids

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


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: ``tokenizer.model`` first, else ``tokenizer.json``.
    The folder's settings say which tokens begin and end a text. Raises Refused.
    """
    tokenizer_config = _read_settings(folder / "tokenizer_config.json")
    sentencepiece, library = folder / "tokenizer.model", folder / "tokenizer.json"
    added = _added_tokens(folder, tokenizer_config)
    try:
        if sentencepiece.exists():
            content = read_bytes(sentencepiece, TOKENIZER_BYTES)
            vocabulary = read_sentencepiece(content, str(sentencepiece), added)
        elif library.exists():
            vocabulary = read_tokenizer_json(read_text(library, TOKENIZER_BYTES), str(library))
        else:
            raise Refused(f"{folder}: no tokenizer; put tokenizer.model or tokenizer.json there")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{folder}: tokenizer cannot be read ({one_line(error)})") from None
    settings = [_read_settings(folder / name) for name in ("generation_config.json", "config.json")]
    return with_special_tokens(vocabulary, tokenizer_config, settings)


def with_special_tokens(
    vocabulary: Vocabulary, tokenizer_config: dict[str, Any], settings: list[dict[str, Any]]
) -> Tokenizer:
    """Decides which tokens begin and end a text.

    BOS: as named in the tokenizer's own settings, else by id in the first of ``settings`` that
    has one, else the vocabulary's own. EOS: all that any of these names. BOS is wanted where
    ``add_bos_token`` asks for it or, without that key, the reference tokenizer prepends it.
    """
    text = _token_text(tokenizer_config.get("bos_token"))
    named = vocabulary.id_of(text) if text is not None else None
    stated = [ids[0] for s in settings if (ids := _ids(s.get("bos_token_id")))]
    own = vocabulary.id_of(vocabulary.bos_text) if vocabulary.bos_text is not None else None
    bos_id = next((i for i in (named, *stated, own) if i is not None), None)

    eos_ids = {i for s in settings for i in _ids(s.get("eos_token_id"))}
    for eos in (_token_text(tokenizer_config.get("eos_token")), vocabulary.eos_text):
        if eos is not None and (eos_id := vocabulary.id_of(eos)) is not None:
            eos_ids.add(eos_id)

    asked = tokenizer_config.get("add_bos_token")
    wanted = asked if isinstance(asked, bool) else bos_id in vocabulary.prepended
    return Tokenizer(
        vocabulary=vocabulary,
        bos_id=bos_id,
        eos_ids=frozenset(eos_ids),
        wants_bos=wanted and bos_id is not None,
    )


def _read_settings(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no such file."""
    return read_object(path, TOKENIZER_BYTES) if path.exists() else {}


def _added_tokens(folder: Path, tokenizer_config: dict[str, Any]) -> dict[int, str]:
    """Tokens that a folder adds to its SentencePiece model, or marks special, by id."""
    stated = _read_settings(folder / "added_tokens.json").items()
    found: list[tuple[str, Any, Any]] = [("added_tokens.json", i, text) for text, i in stated]
    declared = tokenizer_config.get("added_tokens_decoder")
    if isinstance(declared, dict):
        found += [("tokenizer_config.json", i, _token_text(t)) for i, t in declared.items()]
    added = {}
    for file, index, text in found:
        digits = str(index) if isinstance(index, str | int) else ""
        number = int(digits) if digits.isdecimal() and len(digits) < 8 else MOST_TOKENS
        # Half a surrogate pair, which JSON can hold, is not text.
        is_text = isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)
        if number >= MOST_TOKENS or not text or not is_text:
            raise Refused(
                f"{folder / file}: added token {shown(text)} has id {shown(index)}; use a text and "
                f"a number below {MOST_TOKENS}"
            )
        added[number] = text
    return added


def _token_text(token: object) -> str | None:
    """A special token's text, written either plainly or as an object with ``content``."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _ids(value: object) -> list[int]:
    """Token ids written as one number, a list of numbers, or null."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
