"""Vocabularies from a SentencePiece ``tokenizer.model`` (Kudo & Richardson 2018), and writing one.

Field numbers below are those of ``sentencepiece_model.proto``.
"""

import functools
from collections.abc import Mapping, Sequence

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken

from brain.errors import Refused, one_line, shown
from brain.tokenizers.byte_level import is_byte_token
from brain.tokenizers.protobuf import bytes_field, fields, float_field, integer_field
from brain.tokenizers.vocabulary import (
    Vocabulary,
    WarnOnce,
    added_tokens_alone,
    control_tokens,
)

SPACE = "▁"

# ModelProto
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
# SentencePiece
PIECE, SCORE, TYPE = 1, 2, 3
# SentencePiece.Type, which GGUF's token types are numbered after
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
# TrainerSpec
MODEL_TYPE, BYTE_FALLBACK, UNK_ID, BOS_ID, EOS_ID, PAD_ID = 3, 35, 40, 41, 42, 43
BPE = 2
# NormalizerSpec
NORMALIZER_NAME, CHARSMAP, ADD_DUMMY_PREFIX = 1, 2, 3
REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 4, 5
KEEPING_SPACES = (
    bytes_field(NORMALIZER_NAME, b"identity")
    + integer_field(REMOVE_EXTRA_WHITESPACES, 0)
    + integer_field(ESCAPE_WHITESPACES, 1)
)


def load_sentencepiece(model: bytes, where: str) -> SentencePieceProcessor:
    """The library's processor of a serialized model. Raises Refused, naming it as ``where``."""
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        size = len(piece_list(processor))  # reads each, as some may be no text
    except (RuntimeError, TypeError, ValueError, OverflowError, IndexError) as error:
        raise Refused(f"{where}: not a SentencePiece model ({one_line(error)})") from None
    if size == 0:
        raise Refused(f"{where}: not a SentencePiece model: it has no pieces")
    if max(processor.bos_id(), processor.eos_id()) >= size:
        raise Refused(
            f"{where}: BOS {processor.bos_id()} or EOS {processor.eos_id()} is not among its "
            f"{size} pieces"
        )
    return processor


def piece_list(processor: SentencePieceProcessor) -> list[str]:
    """The pieces, by id."""
    return [processor.id_to_piece(index) for index in range(processor.get_piece_size())]


def changing_nothing(model: bytes, *, space: bool) -> bytes:
    """The same model keeping every character and space of a text, as LlamaTokenizer reads it, and
    putting a space before it or not.
    """
    normalizer = bytes_field(CHARSMAP, b"") + KEEPING_SPACES
    return _with_normalizer(model, normalizer + integer_field(ADD_DUMMY_PREFIX, int(space)))


def _with_normalizer(model: bytes, fields: bytes) -> bytes:
    # Concatenated messages are merged, the last value winning.
    return model + bytes_field(NORMALIZER_SPEC, fields)


def merges_in_order(processor: SentencePieceProcessor) -> bool:
    """Whether LlamaTokenizer, which merges pieces in the order of their ids, gives the same ids as
    their scores: those of BPE are whole numbers, and must fall, and no piece may be unused.
    """
    if any(map(processor.is_unused, range(processor.get_piece_size()))):
        return False
    scores = [
        processor.get_score(index)
        for index, piece in enumerate(piece_list(processor))
        if len(piece) > 1
        and not (processor.is_byte(index) or processor.is_control(index))
        and not processor.is_unknown(index)
    ]
    return all(map(float.is_integer, scores)) and scores == sorted(set(scores), reverse=True)


def listed_pieces(model: bytes, where: str) -> dict[int, AddedToken]:
    """The pieces that stand for themselves wherever they are written, by id: control pieces, the
    unknown one, and those that the model's maker defined. Raises Refused.
    """
    try:
        pieces = [dict(fields(value)) for key, value in fields(model) if key == PIECES]  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise Refused(f"{where}: not a SentencePiece model ({one_line(error)})") from None
    found = {}
    for index, piece in enumerate(pieces):
        kind, text = piece.get(TYPE, NORMAL), piece.get(PIECE)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and isinstance(text, bytes) and text:
            special = kind != USER_DEFINED
            found[index] = AddedToken(text.decode(), normalized=False, special=special)
    return found


def _without_controls(model: bytes, controls: Mapping[int, AddedToken]) -> bytes:
    """The same model in which no text becomes one of these: SentencePiece itself cuts out pieces
    that its maker defined.
    """
    made, index = [], 0
    for key, value in fields(model):
        assert isinstance(value, bytes)  # it has been loaded: all its parts are messages
        if key == PIECES:
            if index in controls and dict(fields(value)).get(TYPE) == USER_DEFINED:
                value += integer_field(TYPE, CONTROL)  # of two values the last counts
            index += 1
        made.append(bytes_field(key, value))
    return b"".join(made)


def read_sentencepiece(
    model: bytes, where: str, cut: Mapping[int, AddedToken], *, prefix: str
) -> Vocabulary:
    """The vocabulary in a serialized SentencePiece model. Raises Refused, naming it as ``where``.

    ``cut``: tokens that become their id in ``split`` where they are written in the text. Only
    the text's beginning, or what follows a leading BOS, gets the model's dummy space: so that
    decoding restores the text. ``prefix`` says where transformers puts it; ``always``, also after
    added tokens where there is no space, is followed.
    """
    processor = load_sentencepiece(model, where)
    bare_model = _with_normalizer(model, integer_field(ADD_DUMMY_PREFIX, 0))
    bare = load_sentencepiece(bare_model, where)
    pieces = piece_list(processor)
    bos, eos = processor.bos_id(), processor.eos_id()

    spelling: list[bytes | None] = [None] * max(len(pieces), *(index + 1 for index in cut), 0)
    for index, piece in enumerate(pieces):
        if processor.is_byte(index):
            if not is_byte_token(piece):
                raise Refused(f"{where}: piece {index} is not a byte: {shown(piece)}")
            spelling[index] = bytes([int(piece[3:5], 16)])
        elif processor.is_control(index) or processor.is_unknown(index):
            spelling[index] = piece.encode()
        else:
            spelling[index] = piece.replace(SPACE, " ").encode()
    for index, token in cut.items():
        spelling[index] = token.content.encode()
    sections, added_ids = added_tokens_alone(cut)
    first: list[str] = processor.encode("x", out_type=str)
    dummy = bool(first) and first[0].startswith(SPACE)
    differs = WarnOnce(
        f"{where}: a space at the beginning of a text, or after a special token written in it, "
        "counts as written; transformers puts one, or takes it for the one it puts"
    )

    def split_plain(text: str) -> list[int]:
        return processor.encode(text, out_type=int)  # type: ignore[no-any-return]

    controls = control_tokens(cut)

    @functools.cache
    def plain() -> tuple[SentencePieceProcessor, SentencePieceProcessor]:
        # Only a text needs it that has control tokens written in it.
        return tuple(  # type: ignore[return-value]
            load_sentencepiece(_without_controls(m, controls), where) for m in (model, bare_model)
        )

    def begins(part: str, ids: list[int]) -> bool:
        spaced = part.startswith(" ")
        return not ids or (not spaced if prefix == "always" else ids == [bos])

    def split_parts(parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                spaced, unspaced = plain()
                ids += (spaced if begins(part, ids) else unspaced).encode(part, out_type=int)
        return ids

    def split(text: str) -> list[int]:
        ids: list[int] = []
        found = sections.encode(text, add_special_tokens=False)
        for own, (start, end) in zip(found.ids, found.offsets, strict=True):
            if own:
                ids.append(added_ids[own])
                continue
            part = text[start:end]
            spaced, put = part.startswith(" "), begins(part, ids)
            theirs = {"always": not spaced, "first": start == 0 and not spaced}.get(prefix, True)
            if dummy and put != theirs:
                differs()
            ids += (processor if put else bare).encode(part, out_type=int)
        return ids

    return Vocabulary(
        split=split,
        split_plain=split_plain,
        controls=controls,
        split_parts=split_parts,
        spelling=tuple(spelling),
        leading_space=dummy,
        lossless=False,
        id_of=(
            {piece: index for index, piece in enumerate(pieces)}
            | {token.content: index for index, token in cut.items()}
        ).get,
        prepended=(bos,) if bos >= 0 else (),
        bos_text=pieces[bos] if bos >= 0 else None,
        eos_text=pieces[eos] if eos >= 0 else None,
    )


def write_sentencepiece(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    bos: int,
    eos: int,
    dummy_prefix: bool,
) -> bytes:
    """A serialized SentencePiece BPE model of these pieces, normalizing nothing. ``types`` are
    SentencePiece's (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte).
    """
    pieces = b"".join(
        bytes_field(
            PIECES,
            bytes_field(PIECE, token.encode())
            + float_field(SCORE, score)
            + integer_field(TYPE, kind),
        )
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    unknown = next((index for index, kind in enumerate(types) if kind == UNKNOWN), 0)
    trainer = (
        integer_field(MODEL_TYPE, BPE)
        + integer_field(BYTE_FALLBACK, int(6 in types))
        + integer_field(UNK_ID, unknown)
        + integer_field(BOS_ID, bos)
        + integer_field(EOS_ID, eos)
        + integer_field(PAD_ID, -1)
    )
    normalizer = integer_field(ADD_DUMMY_PREFIX, int(dummy_prefix)) + KEEPING_SPACES
    return pieces + bytes_field(TRAINER_SPEC, trainer) + bytes_field(NORMALIZER_SPEC, normalizer)
