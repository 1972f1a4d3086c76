"""The vocabulary of a GGUF file becomes the tokenizer that it was made of."""

import json
from pathlib import Path

import pytest
import sentencepiece

from brain.errors import Refused
from brain.tokenizers.gguf_vocabulary import tokenizer_files
from brain.tokens import load_tokenizer
from texts import CORPUS, TEXTS, train_sentencepiece


def byte_level_fields(byte_level_json: str, pre: str) -> dict[str, object]:
    spec = json.loads(byte_level_json)
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


def save_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe"])
def test_I10_gguf_byte_level_vocabulary(tmp_path: Path, byte_level_json: str, pre: str) -> None:
    folder = save_files(
        tmp_path, tokenizer_files(byte_level_fields(byte_level_json, pre), "x.gguf")
    )
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|end|>") == [0]
    assert tokenizer.eos_ids == {0}
    assert not tokenizer.wants_bos
    assert tokenizer.bos_id is None


@pytest.mark.parametrize("wanted", [True, False])
def test_gguf_byte_level_bos(tmp_path: Path, byte_level_json: str, wanted: bool) -> None:
    fields = byte_level_fields(byte_level_json, "gpt-2")
    fields |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": wanted}
    tokenizer = load_tokenizer(save_files(tmp_path, tokenizer_files(fields, "x.gguf")))
    assert (tokenizer.bos_id, tokenizer.wants_bos) == (0, wanted)


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_I10_gguf_sentencepiece_vocabulary(
    spm_folder: Path, tmp_path: Path, dummy_prefix: bool
) -> None:
    model = train_sentencepiece(add_dummy_prefix=dummy_prefix)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = original.get_piece_size()

    def kind(index: int) -> int:
        if original.is_unknown(index):
            return 2
        if original.is_control(index):
            return 3
        return 6 if original.is_byte(index) else 1

    fields: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [original.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": dummy_prefix,
    }
    tokenizer = load_tokenizer(save_files(tmp_path, tokenizer_files(fields, "x.gguf")))
    assert (tokenizer.bos_id, tokenizer.wants_bos) == (1, True)
    assert tokenizer.eos_ids == {2}
    for text in [*TEXTS, CORPUS]:
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "qwen2"}, "pre-tokenizer 'qwen2'"),
        ({"tokenizer.ggml.model": "bert"}, "vocabulary 'bert'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": [1]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
    ],
)
def test_unusable_gguf_vocabularies_are_refused(
    byte_level_json: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        tokenizer_files(byte_level_fields(byte_level_json, "gpt-2") | changes, "x.gguf")
