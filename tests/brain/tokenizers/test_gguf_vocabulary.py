"""The vocabulary of a GGUF file becomes the tokenizer that it was made of."""

import json
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from brain.errors import BrainWarning, Refused
from brain.tokenizers.gguf_vocabulary import CUTS, tokenizer_files
from brain.tokenizers.sentencepiece_model import SPACE
from brain.tokens import gguf_tokenizer, load_tokenizer
from gguf_files import byte_level_fields, sentencepiece_fields, write_fields
from texts import CORPUS, TEXTS, train_sentencepiece


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
    fields = sentencepiece_fields(model) | {"tokenizer.ggml.add_space_prefix": dummy_prefix}
    tokenizer = load_tokenizer(save_files(tmp_path, tokenizer_files(fields, "x.gguf")))
    assert (tokenizer.bos_id, tokenizer.wants_bos) == (1, True)
    assert tokenizer.eos_ids == {2}
    for text in [*TEXTS, CORPUS]:
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "qwen9"}, r"pre-tokenizer 'qwen9'.* did you mean qwen2\?"),
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


# Read where they lie ------------------------------------------------------------------------------

HOSTILE = (
    *TEXTS,
    "I'LL you'Re it'S ’twas",
    "x1y22z333 4444 ½²Ⅻ ١٢٣ 1,234,567.89",
    "\r\n\r\n \n\t \u00a0\u3000 \n  end  ",
    "…!!! ---/// <<>> ${x} \\n `code`",
    "e\u0301\u0327 ﬁ ＡＢＣ ㍿ ǅ ſ ΑΣΣΟΣ",
    "中文，句子。日本語とカタカナ ไทย हिन्दी",
    "<|im_start|>user\n<|im_end|> </s><s> <0x41>▁x",
    "\x00\x01\x7f\ufeff\u200b\u2028",
    "🤦🏼‍♂️🇩🇪\U0010ffff",
    "HTTPServerError camelCaseWord ÉCOLE naïveÉté",
)
END, START = "<|im_end|>", "<|im_start|>"


def split(pattern: str) -> list[Any]:
    """The steps of a published tokenizer.json that cuts with one expression."""
    by = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [by, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


PUBLISHED: dict[str, tuple[list[Any], bool]] = {
    "gpt-2": ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
    "smollm": (
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ],
        False,
    ),
    "llama-bpe": (
        split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        True,
    ),
    "qwen2": (
        split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        False,
    ),
    "tekken": (
        split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        True,
    ),
}
"""What the tokenizer.json of GPT-2, SmolLM2, Llama 3, Qwen2 and Mistral Nemo say of cutting, and
whether a word that is a token is taken whole.
"""
LIKE = {"refact": "smollm", "deepseek-r1-qwen": "qwen2", "llama-v3": "llama-bpe", "olmo": "gpt-2"}


def trained(cut: list[Any], *, whole: bool) -> Library:
    """A byte-level vocabulary trained on texts that are cut so."""
    library = Library(models.BPE(ignore_merges=whole))
    library.pre_tokenizer = pre_tokenizers.Sequence(cut) if len(cut) > 1 else cut[0]
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([CORPUS, *HOSTILE] * 3, trainer)
    library.add_tokens([AddedToken("<tool>", normalized=False)])
    return library


@pytest.fixture(scope="module")
def libraries() -> dict[str, Library]:
    """One for each of PUBLISHED."""
    return {pre: trained(cut, whole=whole) for pre, (cut, whole) in PUBLISHED.items()}


@pytest.mark.parametrize("pre", [*PUBLISHED, *LIKE])
def test_I10_text_is_cut_as_the_model_s_own_tokenizer_does(
    pre: str, libraries: dict[str, Library], tmp_path: Path
) -> None:
    library = libraries[LIKE.get(pre, pre)]
    library.save(str(tmp_path / "tokenizer.json"))
    original = load_tokenizer(tmp_path)
    ours = gguf_tokenizer(byte_level_fields(str(library.to_str()), pre), "x.gguf")
    for text in (*HOSTILE, CORPUS, "a <tool> b"):
        for special in (True, False):
            ids = ours.encode(text, special=special)
            assert ids == original.encode(text, special=special), text
            assert ours.decode(ids) == text
    assert ours.vocabulary.spelling == original.vocabulary.spelling


@pytest.mark.parametrize("pair", combinations(PUBLISHED, 2))
def test_the_kinds_of_cutting_differ(libraries: dict[str, Library], pair: tuple[str, str]) -> None:
    """So that the test before this one can fail. A vocabulary may be too poor to show it."""
    differ = []
    for pre in pair:
        fields = byte_level_fields(str(libraries[pre].to_str()), pre)
        one, other = (
            gguf_tokenizer({**fields, "tokenizer.ggml.pre": name}, "x.gguf") for name in pair
        )
        differ += [one.encode(text) != other.encode(text) for text in HOSTILE]
    assert any(differ)


@pytest.mark.parametrize("cut", [None, "qwen2"])
def test_a_file_that_does_not_say_how_text_is_cut(
    libraries: dict[str, Library], cut: str | None
) -> None:
    fields = byte_level_fields(str(libraries["qwen2"].to_str()), "qwen2")
    if cut is None:
        del fields["tokenizer.ggml.pre"]
        with pytest.warns(BrainWarning, match="no tokenizer.ggml.pre says how") as told:
            gguf_tokenizer(fields, "x.gguf")
        assert len(told) == 1
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gguf_tokenizer(fields, "x.gguf")


@pytest.mark.parametrize("space", [True, False])
def test_I10_pieces_are_those_of_the_folder(tmp_path: Path, space: bool) -> None:
    marks = ["<|im_start|>", "<|im_end|>"]
    model = train_sentencepiece(add_dummy_prefix=space, user_defined_symbols=marks[:1])
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "add_prefix_space": space})
    )
    original = load_tokenizer(tmp_path)
    fields = sentencepiece_fields(model, marks) | {"tokenizer.ggml.add_space_prefix": space}
    ours = gguf_tokenizer(fields, "x.gguf")
    assert (ours.bos_id, ours.wants_bos) == (1, True)
    assert ours.eos_ids == {2}
    assert original.bos_id == 1
    for text in (*HOSTILE, CORPUS, " <s> x", "a<|im_start|> b"):
        for special in (True, False):
            ids = ours.encode(text, special=special)
            assert ids == original.encode(text, special=special), text
            assert ours.decode(ids) == text.replace(SPACE, " ")
    assert ours.vocabulary.spelling == original.vocabulary.spelling


@pytest.mark.parametrize(
    ("changes", "bos"),
    [
        ({}, (None, False)),
        ({"tokenizer.ggml.bos_token_id": 1}, (1, False)),
        ({"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.pre": "llama-bpe"}, (1, True)),
        ({"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.pre": "tekken"}, (1, True)),
        ({"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True}, (1, True)),
        ({"tokenizer.ggml.add_bos_token": True}, (None, False)),
    ],
)
def test_what_begins_a_text(
    libraries: dict[str, Library], changes: dict[str, object], bos: tuple[int | None, bool]
) -> None:
    fields = byte_level_fields(str(libraries["gpt-2"].to_str()), "gpt-2") | changes
    ours = gguf_tokenizer(fields, "x.gguf")
    assert (ours.bos_id, ours.wants_bos) == bos
    assert ours.initial_prompt("x")[: len(ours.encode("x")) * -1 or None] == [1] * bos[1]


def test_every_token_that_ends_a_text(libraries: dict[str, Library]) -> None:
    fields = byte_level_fields(str(libraries["gpt-2"].to_str()), "gpt-2", eos=7)
    assert gguf_tokenizer(fields, "x.gguf").eos_ids == {0, 2, 7}  # by what two are called
    named = {"tokenizer.ggml.eot_token_id": 8, "tokenizer.ggml.eom_token_id": 9}
    assert gguf_tokenizer(fields | named, "x.gguf").eos_ids == {0, 2, 7, 8, 9}
    # Whatever the file calls it, it is no text that anybody may write.
    fields["tokenizer.ggml.token_type"][2] = 1
    ours = gguf_tokenizer(fields, "x.gguf")
    assert ours.encode(END) == [2]
    assert ours.encode(END, special=False) != [2]


@pytest.mark.parametrize("wrong", [-1, 10**6, True, "0"])
def test_an_end_that_is_no_token_is_told_and_not_used(
    libraries: dict[str, Library], wrong: object
) -> None:
    fields = byte_level_fields(str(libraries["gpt-2"].to_str()), "gpt-2")
    with pytest.warns(BrainWarning, match="tokenizer.ggml.eos_token_id is .*, which is no token"):
        ours = gguf_tokenizer(fields | {"tokenizer.ggml.eos_token_id": wrong}, "x.gguf")
    assert ours.eos_ids == {0, 2}


@pytest.mark.parametrize("wrong", [4294967295, 9999, "0"])
@pytest.mark.parametrize("role", ["bos", "eos"])
def test_a_sentencepiece_file_need_not_name_a_token(role: str, wrong: object) -> None:
    """As -1 in 32 bits, for instance: it is told, and the vocabulary's own takes its place, as in
    llama.cpp.
    """
    fields = sentencepiece_fields(train_sentencepiece())
    with pytest.warns(BrainWarning, match=f"tokenizer.ggml.{role}_token_id is .*, which is no tok"):
        ours = gguf_tokenizer(fields | {f"tokenizer.ggml.{role}_token_id": wrong}, "x.gguf")
    assert ours.decode(ours.encode("a word")) == "a word"
    assert (ours.bos_id, ours.wants_bos) == (1, True)
    assert ours.eos_ids == {2}


def test_a_rule_for_bos_that_is_none_is_refused(libraries: dict[str, Library]) -> None:
    fields = byte_level_fields(str(libraries["gpt-2"].to_str()), "gpt-2")
    with pytest.raises(Refused, match="add_bos_token is 'yes'; use true or false"):
        gguf_tokenizer(fields | {"tokenizer.ggml.add_bos_token": "yes"}, "x.gguf")


INEXACT = ("tekken", "gpt-4o", "llama4", "kanana2")
"""llama.cpp's own expressions only come near those of the models."""


@pytest.mark.parametrize("pre", CUTS)
def test_llama_cpp_cuts_in_the_same_way(
    pre: str, libraries: dict[str, Library], tmp_path: Path
) -> None:
    """Every name, whether its rules were published as a tokenizer.json here or not."""
    llama_cpp = pytest.importorskip("llama_cpp")
    fields = byte_level_fields(str(libraries["gpt-2"].to_str()), pre)
    fields |= {"tokenizer.ggml.bos_token_id": 1}
    texts = [text for text in HOSTILE if pre not in INEXACT or text.isascii()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = gguf_tokenizer(fields, "x.gguf")
    theirs = LlamaCppVocabulary(llama_cpp, fields, tmp_path / "x.gguf")
    for text in (*texts, CORPUS, "a <tool> b"):
        if "\x00" not in text:  # where C ends a text
            for special in (True, False):
                assert ours.encode(text, special=special) == theirs.encode(text, special), text
    assert theirs.ends() == ours.eos_ids
    assert theirs.puts_bos() == ours.wants_bos


def test_llama_cpp_finds_the_same_pieces(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = train_sentencepiece(user_defined_symbols=["<|im_start|>"])
    fields = sentencepiece_fields(model, ["<|im_start|>"])
    ours = gguf_tokenizer(fields, "x.gguf")
    theirs = LlamaCppVocabulary(llama_cpp, fields, tmp_path / "x.gguf")
    for text in (*HOSTILE, CORPUS):
        if text and "\x00" not in text and "<" not in text:  # after a token it puts a space
            assert ours.encode(text) == theirs.encode(text, special=True), text
    assert theirs.ends() == ours.eos_ids
    assert theirs.puts_bos() == ours.wants_bos


class LlamaCppVocabulary:
    """llama.cpp's reading of a file that has nothing but a vocabulary."""

    def __init__(self, library: Any, fields: dict[str, Any], path: Path) -> None:
        dimensions = ("context_length", "embedding_length", "feed_forward_length", "block_count")
        sizes = {f"llama.{key}": 32 for key in (*dimensions, "attention.head_count")}
        norm = {"llama.attention.layer_norm_rms_epsilon": 1e-5}
        write_fields(path, sizes | norm | fields, {})
        options = {"vocab_only": True, "verbose": False, "n_ctx": 8}
        self._library, self._model = library, library.Llama(str(path), **options)
        self._vocabulary = library.llama_model_get_vocab(self._model.model)

    def encode(self, text: str, special: bool) -> list[int]:
        if not text:
            return []
        ids = self._model.tokenize(text.encode(), add_bos=False, special=special)
        return [int(index) for index in ids]

    def ends(self) -> set[int]:
        count = self._library.llama_vocab_n_tokens(self._vocabulary)
        is_end = self._library.llama_vocab_is_eog
        return {index for index in range(count) if is_end(self._vocabulary, index)}

    def puts_bos(self) -> bool:
        return bool(self._library.llama_vocab_get_add_bos(self._vocabulary))
