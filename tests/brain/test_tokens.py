"""The contracts of ``brain.tokens``: nothing added, nothing dropped, no broken characters."""

import functools
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from brain.errors import BrainWarning, Refused
from brain.tokens import StreamDecoder, Tokenizer, gguf_tokenizer, load_tokenizer
from gguf_files import byte_level_fields, sentencepiece_fields
from texts import TEXTS, train_sentencepiece
from tokenizer_folders import Specimens, added, metaspace, write_folder


@pytest.fixture(scope="module")
def spm(spm_folder: Path) -> Tokenizer:
    return load_tokenizer(spm_folder)


@pytest.fixture(scope="module")
def greedy_json_folder(tmp_path_factory: pytest.TempPathFactory, byte_level_json: str) -> Path:
    """A tokenizer.json that adds BOS and EOS, pads and truncates unless told not to."""
    folder = tmp_path_factory.mktemp("json")
    library = Library.from_str(byte_level_json)
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(t, library.token_to_id(t)) for t in ("<s>", "</s>")],
    )
    library.enable_truncation(max_length=5)
    library.enable_padding(pad_id=0, pad_token="<|end|>", length=8)
    library.save(str(folder / "tokenizer.json"))
    settings_file = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_file))
    return folder


@pytest.fixture(scope="module")
def byte_level(greedy_json_folder: Path) -> Tokenizer:
    return load_tokenizer(greedy_json_folder)


@pytest.fixture(scope="module")
def llama_json(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A Llama 2 style tokenizer.json: Prepend and Replace, byte fallback, Strip."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "h", "e", "l", "o", "he", "ll", "▁he", "▁hell", "▁hello"]
    merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("▁he", "ll"), ("▁hell", "o")]
    vocab = {token: index for index, token in enumerate(tokens)}
    library = Library(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder = tmp_path_factory.mktemp("llama")
    library.save(str(folder / "tokenizer.json"))
    settings_file = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_file))
    return load_tokenizer(folder)


# I10: tokenizing adds nothing ---------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_I10_sentencepiece_adds_nothing(spm: Tokenizer, spm_folder: Path, text: str) -> None:
    model = (spm_folder / "tokenizer.model").read_bytes()
    greedy = sentencepiece.SentencePieceProcessor(model_proto=model, add_bos=True, add_eos=True)
    reference = greedy.encode(text)
    assert (reference[0], reference[-1]) == (greedy.bos_id(), greedy.eos_id())
    assert spm.encode(text) == spm.encode(text, special=False) == reference[1:-1]


@pytest.mark.parametrize("text", TEXTS)
def test_I10_tokenizer_json_adds_and_cuts_nothing(
    byte_level: Tokenizer, greedy_json_folder: Path, text: str
) -> None:
    greedy = Library.from_file(str(greedy_json_folder / "tokenizer.json"))
    assert len(greedy.encode(text).ids) == 8  # padded or truncated, BOS and EOS within
    greedy.no_padding()
    greedy.no_truncation()
    assert byte_level.encode(text) == greedy.encode(text, add_special_tokens=False).ids
    assert byte_level.encode(text) == greedy.encode(text).ids[1:-1]


@pytest.mark.parametrize("text", TEXTS)
def test_I10_smollm2_adds_nothing(smollm2_folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2_folder)
    ours = load_tokenizer(smollm2_folder)
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False)
    assert ours.initial_prompt(text) == ours.encode(text)  # this model wants no BOS


def test_I10_bos_is_inserted_only_for_an_initial_prompt(
    spm: Tokenizer, byte_level: Tokenizer
) -> None:
    for tokenizer in (spm, byte_level):
        assert tokenizer.wants_bos
        assert tokenizer.bos_id is not None
        ids = tokenizer.encode("hello")
        assert tokenizer.bos_id not in ids
        assert tokenizer.initial_prompt("hello") == [tokenizer.bos_id, *ids]
        assert tokenizer.with_bos([tokenizer.bos_id, *ids]) == [tokenizer.bos_id, *ids]
        assert tokenizer.with_bos([]) == [tokenizer.bos_id]


# Special tokens in text ----------------------------------------------------------------------


def test_special_text_becomes_one_id_or_plain_characters(smollm2_folder: Path) -> None:
    tokenizer = load_tokenizer(smollm2_folder)
    text = "<|im_start|>user\nhi<|im_end|>"
    special, plain = tokenizer.encode(text), tokenizer.encode(text, special=False)
    assert special[0] == tokenizer.bos_id == 1
    assert special[-1] == 2
    assert tokenizer.eos_ids == {2}
    assert not set(plain) & set(range(17))
    assert tokenizer.decode(special) == tokenizer.decode(plain) == text


def test_sentencepiece_special_text_round_trips(spm: Tokenizer) -> None:
    for text in ("<s>man", "<s> man", "a</s>b", "a</s> b", "</s>x", "</s> x", "<unk>", "<s><s>x"):
        ids = spm.encode(text)
        assert spm.decode(ids) == text
        assert len(ids) < len(spm.encode(text, special=False))
        assert spm.decode(spm.encode(text, special=False)) == text
    assert spm.encode("<s>man") == spm.initial_prompt("man")


def test_added_tokens_of_a_sentencepiece_folder(spm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((spm_folder / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 352}')
    declared = {"351": {"content": "<|im_start|>"}}
    settings_file = {"added_tokens_decoder": declared, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_file))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 353
    ids = tokenizer.encode("<|im_start|>a man<|im_end|>")
    assert (ids[0], ids[-1]) == (351, 352)
    assert 352 in tokenizer.eos_ids
    assert tokenizer.decode([*ids, 350]) == "<|im_start|>a man<|im_end|><id 350>"
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": "many"}')
    with pytest.raises(Refused, match="added token"):
        load_tokenizer(tmp_path)


def test_begin_and_end_tokens_come_from_all_settings(
    greedy_json_folder: Path, tmp_path: Path
) -> None:
    library = (greedy_json_folder / "tokenizer.json").read_text()
    vocabulary = load_tokenizer(greedy_json_folder).vocabulary
    start, end = vocabulary.id_of("<s>"), vocabulary.id_of("</s>")
    assert start is not None
    assert end is not None
    assert vocabulary.id_of("no such token") is None

    def opened(template: bool = True, **files: Mapping[str, object]) -> Tokenizer:
        told = json.loads(library) | ({} if template else {"post_processor": None})
        (tmp_path / "tokenizer.json").write_text(json.dumps(told))
        for name in ("tokenizer_config", "generation_config", "config"):
            (tmp_path / f"{name}.json").write_text(json.dumps(files.get(name, {})))
        return load_tokenizer(tmp_path)

    with pytest.warns(BrainWarning, match=r"EOS is \[0, 7\] by generation_config.json"):
        tokenizer = opened(
            template=False,
            tokenizer_config={"eos_token": "</s>", "add_bos_token": False},
            generation_config={"eos_token_id": [0, 7]},
        )
    assert tokenizer.eos_ids == {0, 7, end}
    assert tokenizer.bos_id is None
    assert not tokenizer.wants_bos
    tokenizer = opened(config={"bos_token_id": start})
    assert tokenizer.bos_id == start
    assert tokenizer.wants_bos  # the file's own template puts it there
    tokenizer = opened(template=False, config={"bos_token_id": 0})
    assert (tokenizer.bos_id, tokenizer.wants_bos) == (0, False)
    with pytest.warns(BrainWarning, match="overrules 0 in config.json"):
        tokenizer = opened(config={"bos_token_id": 0})
    assert (tokenizer.bos_id, tokenizer.wants_bos) == (start, True)
    half_a_character = {"bos_token": "\ud800", "eos_token": "\ud800"}  # which JSON can spell
    with pytest.raises(Refused, match="added token"):
        opened(tokenizer_config=half_a_character)


# Round trips -----------------------------------------------------------------------------------


@given(st.text())
@settings(deadline=None, max_examples=200)
def test_byte_level_round_trips(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text
    assert byte_level.decode(byte_level.encode(text, special=False)) == text


@given(st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=200)
def test_sentencepiece_round_trips(spm: Tokenizer, text: str) -> None:
    assert spm.decode(spm.encode(text)) == text
    assert spm.decode(spm.initial_prompt(text)) == "<s>" + text


@pytest.mark.parametrize("text", [*TEXTS, "hello hello", "  hello"])
def test_llama_style_json_round_trips(llama_json: Tokenizer, text: str) -> None:
    ids = llama_json.encode(text)
    assert llama_json.decode(ids) == text
    assert llama_json.wants_bos
    assert llama_json.decode(llama_json.initial_prompt(text)) == "<s>" + text


def test_smollm2_refuses_what_it_cannot_spell(smollm2_folder: Path) -> None:
    tokenizer = load_tokenizer(smollm2_folder)
    with pytest.raises(Refused, match=r"U\+0004 at character 2") as refusal:
        tokenizer.encode("ab\x04c")
    assert "\n" not in str(refusal.value)


def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(Refused, match=r"U\+D800, at character 1"):
        byte_level.encode("a\ud800")


def test_unknown_ids_are_shown(byte_level: Tokenizer) -> None:
    beyond = byte_level.vocab_size + 5
    assert byte_level.decode([beyond, 0, -1]) == f"<id {beyond}><|end|><id -1>"
    assert byte_level.token_bytes(0) == b"<|end|>"


def test_a_continuation_keeps_its_space(spm: Tokenizer) -> None:
    ids = spm.encode("man")
    assert spm.decode(ids) == "man"
    assert spm.decode(ids, at_start=False) == " man"


# Streams -----------------------------------------------------------------------------------------

MULTIBYTE = st.text(alphabet=st.sampled_from("a é漢字🤖🏽e\u0301👩\u200d👧\n"), max_size=30)


@given(MULTIBYTE)
@settings(deadline=None)
def test_stream_prints_whole_characters(byte_level: Tokenizer, text: str) -> None:
    stream = StreamDecoder(byte_level)
    pieces = [stream.push(token_id) for token_id in byte_level.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", ["spm", "byte_level", "llama_json"])
@pytest.mark.parametrize("at_start", [True, False])
@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_stream_equals_decode_for_any_ids(
    request: pytest.FixtureRequest, kind: str, at_start: bool, data: st.DataObject
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1)))
    stream = StreamDecoder(tokenizer, at_start=at_start)
    streamed = "".join([*(stream.push(i) for i in ids), stream.finish()])
    assert streamed == tokenizer.decode(ids, at_start=at_start)


def test_stream_waits_for_a_character_and_gives_up_only_when_certain(
    byte_level: Tokenizer,
) -> None:
    robot = byte_level.encode("🤖")
    assert len(robot) == 4
    stream = StreamDecoder(byte_level)
    assert [stream.push(i) for i in robot] == ["", "", "", "🤖"]
    assert stream.push(robot[0]) == ""
    assert stream.push(byte_level.encode("x")[0]) == "\ufffdx"
    assert stream.push(robot[0]) == ""
    assert stream.finish() == "\ufffd"


# Files that cannot be used ------------------------------------------------------------------------


def test_tokenizer_json_comes_first(spm_folder: Path, tmp_path: Path, byte_level_json: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((spm_folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer.json").write_text(byte_level_json)
    with pytest.warns(BrainWarning, match="tokenizer.json overrules tokenizer.model"):
        assert load_tokenizer(tmp_path).vocab_size == 260


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"not a model at all"),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}'),
        ("tokenizer.txt", b"no tokenizer here"),
    ],
)
def test_corrupt_tokenizers_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused) as refusal:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_truncated_sentencepiece_is_refused(spm_folder: Path, tmp_path: Path) -> None:
    model = (spm_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(Refused, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "'WordPiece'"),
        ({"decoder": {"type": "WordPiece"}}, "decoder WordPiece"),
        ({"decoder": None, "pre_tokenizer": {"type": "Whitespace"}}, "decoder none"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ],
)
def test_other_kinds_are_refused_by_name(
    tmp_path: Path,
    byte_level_json: str,
    edit_json: Callable[[Path, dict[str, object]], None],
    changes: dict[str, object],
    message: str,
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level_json)
    edit_json(path, changes)
    with pytest.raises(Refused, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_corrupt_settings_are_refused(tmp_path: Path, byte_level_json: str, name: str) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level_json)
    for content in ("{", "[1]"):
        (tmp_path / name).write_text(content)
        with pytest.raises(Refused, match=name):
            load_tokenizer(tmp_path)


# Texts of which only parts may hold control tokens ------------------------------------------------

CONTROLS = ("<|user|>", "<|done|>", "<tool>", "<s>", "</s>")
HARMLESS = [*TEXTS, "a < b | c >", "hello hello", "  hello", "s> <tool |user|"]
TYPED = [
    *(*CONTROLS, "<|user|", "|user|>", "a<|done|>b", " <tool> </s>", "<s><s>x", "<|done|>\n\n<s>"),
    *("\u2000ꀀ\ue000<tool>", "\x00<s>\u202e", "mid<tool>", "<unk></s>", "\n", " "),
]


def with_controls(folder: Path, kind: str) -> Path:
    """A folder whose tokenizer has CONTROLS, of which <tool> is not flagged as special."""
    specimens = specimens_once()
    library = specimens.llama_json if kind.startswith("llama") else specimens.byte_json
    library = json.loads(json.dumps(library))
    size = len(library["model"]["vocab"])
    flags = {"rstrip": True, "lstrip": kind == "byte strips"} if "strips" in kind else {}
    library["added_tokens"] += [
        added(size + rank, text, special=text != "<tool>", **flags)
        for rank, text in enumerate(CONTROLS[:3])
    ]
    library["added_tokens"].append(added(size + 3, "  ", special=False))  # white space is a text
    if kind == "llama always":
        library["pre_tokenizer"] = metaspace("always")
    if kind == "llama old":
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        steps = [{"type": "Prepend", "prepend": "▁"}, replaced]
        library |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    if kind == "byte whole":
        library["model"]["ignore_merges"] = True
    return write_folder(folder, {"tokenizer.json": library})


@functools.cache
def specimens_once() -> Specimens:
    return Specimens()


def alone(folder: Path, **options: object) -> Path:
    """A folder that has only a tokenizer.model with CONTROLS, some of them its maker's own."""
    model = train_sentencepiece(
        user_defined_symbols=["<tool>"], control_symbols=["<|user|>"], **options
    )
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    return write_folder(folder, {"tokenizer.model": model, "added_tokens.json": {"<|done|>": size}})


KINDS = ("byte", "byte strips", "byte whole", "llama", "llama always", "llama old", "llama strips")


@pytest.fixture(scope="session")
def pieced(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A tokenizer of each kind."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrainWarning)
        for kind in KINDS:
            found[kind] = load_tokenizer(with_controls(tmp_path_factory.mktemp("k"), kind))
        found["sentencepiece"] = load_tokenizer(alone(tmp_path_factory.mktemp("k")))
        unigram = {"model_type": "unigram", "vocab_size": 300, "hard_vocab_limit": False}
        found["unigram"] = load_tokenizer(alone(tmp_path_factory.mktemp("k"), **unigram))
        told = json.loads(
            (with_controls(tmp_path_factory.mktemp("k"), "byte") / "tokenizer.json").read_text()
        )
        fields = byte_level_fields(json.dumps(told), "gpt-2")
        found["gguf bytes"] = gguf_tokenizer(fields, "x.gguf")
        spm = train_sentencepiece(
            user_defined_symbols=["<tool>", "<|done|>"], control_symbols=["<|user|>"]
        )
        found["gguf sentencepiece"] = gguf_tokenizer(sentencepiece_fields(spm), "x.gguf")
    return found


ALL_KINDS = (*KINDS, "sentencepiece", "unigram", "gguf bytes", "gguf sentencepiece")


def controls_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The control tokens of a text, which are written out in it."""
    named = {tokenizer.vocabulary.id_of(text): text for text in CONTROLS}
    return [named[index] for index in tokenizer.encode(text) if index in named]


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.filterwarnings("ignore::brain.errors.BrainWarning")
def test_harmless_pieces_are_one_text(pieced: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = pieced[kind]
    for text in HARMLESS:
        for before, after in (
            ("<|user|>\n", "<|done|>"),
            ("<s>", " </s>\n"),
            ("", ""),
            ("he", "ll"),
        ):
            pieces = [(before, True), (text, False), (after, True)]
            assert tokenizer.encode_pieces(pieces) == tokenizer.encode(before + text + after)
    assert tokenizer.encode_pieces([]) == []


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.filterwarnings("ignore::brain.errors.BrainWarning")
@given(typed=st.lists(st.sampled_from([*TYPED, *HARMLESS]) | st.text(max_size=4)).map("".join))
@settings(deadline=None, max_examples=80)
def test_a_typed_control_token_is_plain_text(
    pieced: dict[str, Tokenizer], kind: str, typed: str
) -> None:
    tokenizer = pieced[kind]
    named = {tokenizer.vocabulary.id_of(text): text for text in CONTROLS}
    assert None not in named
    for before, after in (
        ("<|user|>\n", "<|done|>x"),
        ("", ""),
        ("<|us", "er|>"),
        ("<s>", "|done|>"),
    ):
        ids = tokenizer.encode_pieces([(before, True), (typed, False), (after, True)])
        trusted = (before, after) if typed else (before + after,)
        written = [text for part in trusted for text in controls_of(tokenizer, part)]
        assert [named[index] for index in ids if index in named] == written
        if "strips" not in kind and "▁" not in typed:
            told = before + typed + after
            assert tokenizer.decode(ids).replace(" ", "") == told.replace(" ", "")
            # Some put spaces after control tokens; the one after a leading BOS is theirs.
            if kind not in ("llama always", "llama old") and not told.startswith("<s> "):
                assert tokenizer.decode(ids) == told


def test_what_has_no_other_spelling_is_refused(tmp_path: Path) -> None:
    tokens = {"<unk>": 0, "stop": 1, "a": 2}
    library = Library(models.WordLevel(vocab=tokens, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["stop"])
    library.save(str(tmp_path / "tokenizer.json"))
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    told["model"]["vocab"] |= {"▁stop": 3, "stop": 1}
    told["pre_tokenizer"]["prepend_scheme"] = "never"
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_pieces([("stop", True)]) == [1]
    with pytest.raises(Refused, match=r"becomes a control token.*change it: 'stop'"):
        tokenizer.encode_pieces([("stop", False)])


# Where a chat template is found -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_file", "jinja", "found", "told"),
    [
        ({}, None, None, None),
        ({"chat_template": "one"}, None, "one", None),
        ({"chat_template": "one"}, "two\n", "two\n", "overrules chat_template"),
        ({"chat_template": "one"}, "one", "one", None),
        ({}, "two", "two", None),
        (
            {"chat_template": [{"name": n, "template": n[0]} for n in ("tool_use", "default")]},
            *(None, "d", None),
        ),
        (
            {"chat_template": [{"name": "rag", "template": "x"}, 7]},
            *(None, None, "none called default"),
        ),
        ({"chat_template": 7}, None, None, "is no text"),
    ],
)
def test_where_a_chat_template_is_found(
    tmp_path: Path,
    byte_level_json: str,
    settings_file: dict[str, object],
    jinja: str | None,
    found: str | None,
    told: str | None,
) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level_json)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | settings_file))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BrainWarning)
        tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == found
    assert tokenizer.named == {"eos_token": "<|end|>"}
    lines = [str(one.message) for one in caught if "chat_template" in str(one.message)]
    assert len(lines) == (told is not None)
    assert (told or "") in "".join(lines)
    if told is None:  # else transformers reads the folder otherwise, or not at all
        from transformers import AutoTokenizer

        reference = AutoTokenizer.from_pretrained(tmp_path)
        assert found == (reference.get_chat_template() if reference.chat_template else None)
        assert reference.special_tokens_map == tokenizer.named


def test_a_gguf_file_has_its_template_and_names(byte_level_json: str) -> None:
    fields = byte_level_fields(byte_level_json, "gpt-2")
    fields |= {"tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": "hello"}
    tokenizer = gguf_tokenizer(fields, "x.gguf")
    assert tokenizer.chat_template == "hello"
    assert tokenizer.named == {"eos_token": "<|end|>"}
    assert gguf_tokenizer(fields | {"tokenizer.chat_template": 7}, "x.gguf").chat_template is None
