"""Vocabularies from a SentencePiece ``tokenizer.model`` (Kudo & Richardson 2018), and writing one.

Field numbers below are those of ``sentencepiece_model.proto``.
"""

import re
from collections.abc import Mapping, Sequence

from sentencepiece import SentencePieceProcessor

from brain.errors import Refused, one_line, shown
from brain.tokenizers.byte_level import is_byte_token
from brain.tokenizers.protobuf import bytes_field, float_field, integer_field
from brain.tokenizers.vocabulary import Vocabulary

SPACE = "▁"

# ModelProto
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
# SentencePiece
PIECE, SCORE, TYPE = 1, 2, 3
# SentencePiece.Type, which GGUF's token types are numbered after
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
# TrainerSpec
MODEL_TYPE, BYTE_FALLBACK, UNK_ID, BOS_ID, EOS_ID, PAD_ID = 3, 35, 40, 41, 42, 43
BPE = 2
# NormalizerSpec
NORMALIZER_NAME, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 1, 3, 4, 5


def read_sentencepiece(
    model: bytes, where: str, added: Mapping[int, str] | None = None
) -> Vocabulary:
    """The vocabulary in a serialized SentencePiece model. Raises Refused, naming it as ``where``.

    ``added``: tokens that the model's folder adds, or declares special, by id.
    In ``split``, control, unknown and added tokens written out in the text become their id. Only
    the text's beginning, or what follows a leading BOS, gets the model's dummy space: so that
    decoding restores the text.
    """
    added = added or {}
    # Concatenated messages are merged, the last value winning: a processor without dummy prefix.
    bare_model = model + bytes_field(NORMALIZER_SPEC, integer_field(ADD_DUMMY_PREFIX, 0))
    processor, bare = SentencePieceProcessor(), SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        bare.LoadFromSerializedProto(bare_model)
        size = processor.get_piece_size()
        pieces = [processor.id_to_piece(index) for index in range(size)]
    except (RuntimeError, TypeError, ValueError, OverflowError, IndexError) as error:
        raise Refused(f"{where}: not a SentencePiece model ({one_line(error)})") from None
    if size == 0:
        raise Refused(f"{where}: not a SentencePiece model: it has no pieces")
    bos, eos = processor.bos_id(), processor.eos_id()
    if max(bos, eos) >= size:
        raise Refused(f"{where}: BOS {bos} or EOS {eos} is not among its {size} pieces")

    spelling: list[bytes | None] = [None] * max([size, *(index + 1 for index in added)])
    special: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        if processor.is_byte(index):
            if not is_byte_token(piece):
                raise Refused(f"{where}: piece {index} is not a byte: {shown(piece)}")
            spelling[index] = bytes([int(piece[3:5], 16)])
        elif processor.is_control(index) or processor.is_unknown(index):
            spelling[index] = piece.encode()
            special[piece] = index
        else:
            spelling[index] = piece.replace(SPACE, " ").encode()
    for index, text in added.items():
        spelling[index] = text.encode()
        special[text] = index

    longest_first = sorted((text for text in special if text), key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def split_plain(text: str) -> list[int]:
        return processor.encode(text, out_type=int)  # type: ignore[no-any-return]

    def split(text: str) -> list[int]:
        if pattern is None:
            return split_plain(text)
        ids: list[int] = []
        for part in pattern.split(text):  # text and special tokens alternate
            if part in special:
                ids.append(special[part])
            elif part:
                at_start = not ids or ids == [bos]
                ids += (processor if at_start else bare).encode(part, out_type=int)
        return ids

    probe = b"".join(spelling[index] or b"" for index in split_plain("x"))
    return Vocabulary(
        split=split,
        split_plain=split_plain,
        spelling=tuple(spelling),
        leading_space=probe.startswith(b" "),
        lossless=False,
        id_of=({piece: index for index, piece in enumerate(pieces)} | special).get,
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
    normalizer = (
        bytes_field(NORMALIZER_NAME, b"identity")
        + integer_field(ADD_DUMMY_PREFIX, int(dummy_prefix))
        + integer_field(REMOVE_EXTRA_WHITESPACES, 0)
        + integer_field(ESCAPE_WHITESPACES, 1)
    )
    return pieces + bytes_field(TRAINER_SPEC, trainer) + bytes_field(NORMALIZER_SPEC, normalizer)
