"""Tokenizers of folders that contradict themselves: the ids of transformers, or a line about it.

``PYTHONPATH=tests/support python tests/brain/tokenizers/test_folder.py --folders 1000`` draws more
of them; where protobuf is installed, which transformers needs for that, also folders that have only
a tokenizer.model.
"""

import argparse
import importlib.util
import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sentencepiece

from brain.errors import BrainWarning, Refused
from brain.files import TOKENIZER_BYTES
from brain.tokenizers.tokenizer_json import QWEN2_PATTERN
from brain.tokens import load_tokenizer
from texts import TEXTS
from tokenizer_folders import (
    SAID,
    Drawn,
    Json,
    Specimens,
    added,
    byte_level,
    metaspace,
    tiktoken_list,
    write_folder,
)

DRAWN = 40
PROTOBUF = (
    importlib.util.find_spec("google.protobuf") if importlib.util.find_spec("google") else None
)
PLACES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "generation_config.json", "config.json", "transformers", "settings"),
)
KEPT = "keeps it; transformers"  # a space that begins a text
OTHER_IDS = (
    "counts as written; transformers",  # the same, and after special tokens, of tokenizer.model
    "by the order of transformers after",  # ids that a folder states and it renumbers; normalized
    "would merge its pieces",  # a tokenizer.model that LlamaTokenizer reads as what it is not
    "split_special_tokens in tokenizer_config.json is not followed",
)
"""The lines that tell of ids that are not those of transformers."""
OLD_LLAMA = {
    "pre_tokenizer": None,
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
}
SPACED = {"content": "</s>", "rstrip": True}
OTHER_BEGINNING = ("transformers puts none", "only BOS is put there", OTHER_IDS[1])


@pytest.fixture(scope="module")
def specimens() -> Specimens:
    return Specimens()


def reference(folder: Path) -> Any:
    """The tokenizer of transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def faults(folder: Path, seen: Counter[str]) -> list[str]:
    """Where this folder's tokenizer differs from that of transformers, and no line tells of it."""
    try:
        theirs = reference(folder)
        expected = [theirs(text, add_special_tokens=False).input_ids for text in SAID]
        begun = [theirs(text).input_ids for text in SAID]
    except Exception:
        seen["transformers fails"] += 1
        return []  # there is nothing to compare with
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BrainWarning)
        try:
            ours = load_tokenizer(folder)
            found = [ours.encode(text) for text in SAID]
        except Refused as refusal:
            seen["refused"] += 1
            named = [place for place in PLACES if place in str(refusal)]
            return [] if len(named) > 1 else [f"refused: {refusal}"]
    lines = [str(w.message) for w in caught]
    told = [line for line in lines if sum(place in line for place in PLACES) > 1]
    seen["told" if told else "not a word"] += 1

    def excused(excuses: Sequence[str]) -> bool:
        given = [excuse for excuse in excuses for line in told if excuse in line]
        seen.update(given)
        return bool(given)

    wrong = []
    prefix = ours.initial_prompt("x")[: -len(ours.encode("x"))]
    for text, ids, right, full in zip(SAID, found, expected, begun, strict=True):
        if ids != right and not excused([*OTHER_IDS, *([KEPT] if text[0] == " " else [])]):
            wrong.append(f"{text!r}: {ids}, not {right}")
        count = next((n for n in range(len(full)) if full[n : n + len(right)] == right), 0)
        if prefix != full[:count] and not excused(OTHER_BEGINNING):
            wrong.append(f"{text!r} begins with {prefix}, not {full[:count]}")
    stops: Json = json.loads((folder / "config.json").read_text())
    if (folder / "generation_config.json").exists():
        stops |= json.loads((folder / "generation_config.json").read_text())
    stop = stops.get("eos_token_id", theirs.eos_token_id)
    ends = {*(stop if isinstance(stop, list) else [stop])}
    if ours.eos_ids != ends and not excused(["each of them ends a text"]):
        wrong.append(f"EOS {sorted(ours.eos_ids)}, not {stop}")
    return [f"{fault}; said: {lines}" for fault in wrong]


def draw(
    seed: int, specimens: Specimens, folder: Path, seen: Counter[str] | None = None
) -> list[str]:
    drawn = Drawn(Random(seed), specimens, alone=PROTOBUF is not None)
    path = write_folder(folder / str(seed), drawn.files())
    return faults(path, Counter() if seen is None else seen)


@pytest.mark.parametrize("seed", range(DRAWN))
def test_contradictions_are_settled_as_by_transformers_or_told(
    seed: int, specimens: Specimens, tmp_path: Path
) -> None:
    assert draw(seed, specimens, tmp_path) == []


def llama_folder(path: Path, specimens: Specimens, **files: Json | bytes | None) -> Path:
    """A Llama folder that agrees with itself, but for these files: none, or with these keys."""
    told: dict[str, Json | bytes] = {
        "config.json": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2},
        "tokenizer_config.json": {
            **{"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False},
            **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        },
        "tokenizer.json": specimens.llama_json,
        "tokenizer.model": specimens.model,
    }
    for key, change in files.items():
        name = key.replace("_json", ".json").replace("_model", ".model")
        before = told.get(name, {})
        if change is None:
            del told[name]
        else:
            told[name] = {**before, **change} if isinstance(change, dict) else change  # type: ignore[dict-item]
    return write_folder(path, told)


def ids_of(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer.encode(text) for text in SAID if text[0] != " "]


def reference_ids(folder: Path) -> list[list[int]]:
    theirs = reference(folder)
    return [theirs(text, add_special_tokens=False).input_ids for text in SAID if text[0] != " "]


def byte_level_folder(path: Path, specimens: Specimens, **library: Any) -> Path:
    return write_folder(
        path,
        {
            "config.json": {"model_type": "llama"},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
            "tokenizer.json": specimens.byte_json | library,
        },
    )


@pytest.mark.filterwarnings("error::brain.errors.BrainWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer_json": None},
        {"tokenizer_json": OLD_LLAMA},
        {"tokenizer_json": OLD_LLAMA, "tokenizer_config_json": {"legacy": True}},
    ],
    ids=["json", "model", "Llama 2", "Llama 2 legacy"],
)
def test_folders_that_agree_with_themselves_raise_no_line(
    specimens: Specimens, tmp_path: Path, changes: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer(llama_folder(tmp_path, specimens, **changes))
    assert tokenizer.encode("a man of") == pieces_of(specimens, "a man of")
    assert (tokenizer.bos_id, tokenizer.wants_bos) == (1, True)
    assert tokenizer.eos_ids == {2}


def pieces_of(specimens: Specimens, text: str) -> list[int]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=specimens.model)
    return list(processor.encode(text))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tokenizer_model": b"none of SentencePiece's"}, None),
        ({"tokenizer_model": tiktoken_list()}, None),
        ({"tokenizer_config_json": {"legacy": True}}, None),
        ({"tokenizer_config_json": {"add_prefix_space": False}}, "which overrules tokenizer.json"),
        (
            {"tokenizer_json": {"pre_tokenizer": metaspace("never")}},
            "which overrules tokenizer.jso",
        ),
        ({"tokenizer_json": {"normalizer": {"type": "NFKC"}}}, "which overrules tokenizer.json"),
        ({"tokenizer_json": OLD_LLAMA}, None),
        ({"tokenizer_json": OLD_LLAMA, "tokenizer_config_json": {"legacy": True}}, None),
        ({"tokenizer_config_json": {"tokenizer_class": "TokenizersBackend"}}, None),
        ({"config_json": {"model_type": "mistral"}}, None),
        (
            {"config_json": {"tokenizer_class": "GPT2Tokenizer"}},
            "overrules GPT2Tokenizer in config",
        ),
        ({"tokenizer_config_json": {"extra_special_tokens": ["<tool>"]}}, None),
        ({"added_tokens_json": {"<tool>": 350}}, None),
        (
            {"special_tokens_map_json": {"pad_token": {"content": "<|user|>", "rstrip": True}}},
            None,
        ),
        (
            {"special_tokens_map_json": {"eos_token": {"content": "</s>", "lstrip": True}}},
            "'</s>': lstrip is True in special_tokens_map.json, but False with tokenizer.json",
        ),
        ({"tokenizer_config_json": {"add_bos_token": False}}, "overrules add_bos_token in tokeni"),
        ({"tokenizer_config_json": {"bos_token": "</s>"}}, "overrules 2 in tokenizer_config.json"),
        ({"special_tokens_map_json": {"bos_token": "</s>"}}, "overrules 2 in special_tokens_map"),
        ({"config_json": {"bos_token_id": 7}}, "overrules 7 in config.json"),
        ({"generation_config_json": {"eos_token_id": [2, 7]}}, None),
        ({"generation_config_json": {"eos_token_id": 7}}, "EOS is .7. by generation_config.json"),
        (
            {"tokenizer_config_json": {"split_special_tokens": True}},
            "split_special_tokens in token",
        ),
    ],
    ids=range(22),
)
def test_what_is_overruled_is_told(
    specimens: Specimens, tmp_path: Path, changes: dict[str, Any], line: str | None
) -> None:
    folder = llama_folder(tmp_path, specimens, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BrainWarning)
        tokenizer = load_tokenizer(folder)
    lines = [str(w.message) for w in caught]
    assert any(re.search(line, told) for told in lines) if line else not lines
    theirs = reference(folder)
    if not theirs.split_special_tokens:
        assert ids_of(folder) == reference_ids(folder)
    assert tokenizer.initial_prompt("a man") == theirs("a man").input_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_json": None, "tokenizer_model": tiktoken_list()}, "put tokenizer.json there"),
        ({"tokenizer_config_json": {"tokenizer_class": "GPT2Tokenizer"}}, "GPT2Tokenizer"),
        ({"tokenizer_json": {"model": {"type": "Unigram", "vocab": []}}}, "LlamaTokenizer"),
        (
            {"tokenizer_config_json": {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}},
            "fast_tokenizer_files .* tokenizer.json",
        ),
        ({"tokenizer_config_json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder"),
        ({"tokenizer_config_json": {"extra_special_tokens": 1}}, "extra_special_tokens"),
        ({"tokenizer_config_json": {"add_bos_token": "yes"}}, "add_bos_token"),
        ({"special_tokens_map_json": {"eos_token": {"content": "</s>", "lstrip": 3}}}, "flag"),
        (
            {"added_tokens_json": {"<tool>": 360}},
            "its id is 360 in added_tokens.json, but 350 with tokenizer.json",
        ),
        (
            {"tokenizer_config_json": {"added_tokens_decoder": {"2": SPACED}}},
            "rstrip is False in tokenizer.json, but True with tokenizer_config.json",
        ),
        (
            {
                "tokenizer_config_json": {"extra_special_tokens": ["<tool>"]},
                "special_tokens_map_json": {"extra_special_tokens": ["<tool>", "mid"]},
            },
            "extra_special_tokens in tokenizer_config.json is not what",
        ),
        (
            {"tokenizer_json": None, "tokenizer_config_json": {"pad_token": "<pad>"}},
            "'<pad>', which has no id in tokenizer.model",
        ),
        ({"tokenizer_config_json": {"additional_special_tokens": [["a"]]}}, "is no text; use one"),
        ({"tokenizer_config_json": {"extra_special_tokens": [{"content": {}}]}}, "is no text"),
    ],
    ids=range(14),
)
def test_what_nobody_can_settle_is_refused(
    specimens: Specimens, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        load_tokenizer(llama_folder(tmp_path, specimens, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": byte_level(prefix=True)},
        {"decoder": None},
        {"decoder": {"type": "Sequence", "decoders": [byte_level(), {"type": "Fuse"}]}},
        {"added_tokens": [added(2, "</s>", lstrip=True, rstrip=True), added(320, "mid")]},
        {"added_tokens": [added(320, "mid", single_word=True, normalized=True, special=False)]},
    ],
    ids=["NFC", "prefix", "no decoder", "decoders", "strip", "single word"],
)
def test_what_the_library_reads_is_read(
    specimens: Specimens, tmp_path: Path, changes: Json
) -> None:
    folder = byte_level_folder(tmp_path, specimens, **changes)
    assert ids_of(folder) == reference_ids(folder)
    tokenizer = load_tokenizer(folder)
    for text in (" a  man", "café 漢 🤖", "a\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "kind", ["typeless", "unigram", "words", "typeless unigram", "typeless words"]
)
def test_models_of_other_kinds(specimens: Specimens, tmp_path: Path, kind: str) -> None:
    told = specimens.llama_json
    vocab: dict[str, int] = told["model"]["vocab"]
    if kind == "typeless":  # as GPT-2's own file, of the library's early days
        told = specimens.byte_json
        model = {key: value for key, value in told["model"].items() if key != "type"}
        model["merges"] = [" ".join(merge) for merge in model["merges"]]
    elif kind.endswith("unigram"):
        scored = [[token, -float(index)] for token, index in vocab.items()]
        model = {"type": "Unigram", "unk_id": 0, "vocab": scored, "byte_fallback": True}
    else:
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    if kind.startswith("typeless"):
        model.pop("type", None)
    folder = write_folder(
        tmp_path,
        {"config.json": {"model_type": "llama"}, "tokenizer.json": told | {"model": model}},
    )
    assert ids_of(folder) == reference_ids(folder)


@pytest.mark.filterwarnings("ignore::brain.errors.BrainWarning")
def test_a_file_that_cannot_split_is_no_matter_where_a_class_overrules_it(
    specimens: Specimens, tmp_path: Path
) -> None:
    model = {**specimens.llama_json["model"], "unk_token": "<nope>", "byte_fallback": False}
    folder = llama_folder(tmp_path, specimens, tokenizer_json={"model": model})
    assert load_tokenizer(folder).encode("a man of") == pieces_of(specimens, "a man of")


def qwen_json(specimens: Specimens, *patterns: str, normalizer: Json | None) -> Json:
    """A byte-level tokenizer.json that normalizes and cuts like this, with a turn's markers."""
    ways = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in patterns
    ]
    letters = byte_level() | {"use_regex": not ways}
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    marks = [added(320 + n, text) for n, text in enumerate(names)]
    thought = added(323, "<think>") | {"special": False}
    return specimens.byte_json | {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*ways, letters]},
        "added_tokens": [*specimens.byte_json["added_tokens"], *marks, thought],
    }


NFC = {"type": "NFC"}
R1 = (r"\p{N}{1,3}", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+")
HOSTILE = (
    *SAID,
    *(text for text in TEXTS if text),
    "<|im_start|>user\n<|im_end|><|endoftext|> <think>ab</think>",
    "cafe\u0301 \u1e9b\u0323 \ufb01 Å Å 1234567 ٣٤٥ ㎏\r\n\r\n  \u00a0\u3000x\u200b\ufeff",
    "\x00\x7f\ufffd\U0010ffff \U000e0001 I'Ll they'RE",
)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("model_type", "declared", "patterns", "line"),
    [
        ("qwen2", "Qwen2Tokenizer", [QWEN2_PATTERN], None),
        ("qwen2", None, [QWEN2_PATTERN], None),
        ("qwen2", "LlamaTokenizerFast", R1, "model_type qwen2 in config.json overrules LlamaTok"),
        ("qwen2", "PreTrainedTokenizerFast", R1, "overrules PreTrainedTokenizer in tokenizer_conf"),
        ("qwen3", "Qwen2Tokenizer", [QWEN2_PATTERN], None),
        ("qwen3", "Qwen2TokenizerFast", R1, "Qwen2Tokenizer of the settings, which overrules tok"),
        ("qwen3", None, [QWEN2_PATTERN], None),
        ("qwen3", "PreTrainedTokenizerFast", R1, None),
        ("smollm3", "PreTrainedTokenizerFast", R1, None),
        ("smollm3", None, [], None),
        ("granite", "GPT2Tokenizer", R1, None),
        ("granite", "GPT2TokenizerFast", [], None),
        ("granite", None, [], None),
    ],
)
def test_each_family_s_tokenizer_is_read_as_transformers_reads_it(
    specimens: Specimens,
    tmp_path: Path,
    model_type: str,
    declared: str | None,
    patterns: Sequence[str],
    line: str | None,
    special: bool,
) -> None:
    """Ids of hostile texts, with special tokens and with what looks like them."""
    library = qwen_json(
        specimens, *patterns, normalizer=NFC if model_type.startswith("qwen") else None
    )
    files: dict[str, Json | bytes] = {
        "config.json": {"model_type": model_type, "eos_token_id": 322},
        "tokenizer.json": library,
        "tokenizer_config.json": {"eos_token": "<|im_end|>"}
        | ({} if declared is None else {"tokenizer_class": declared}),
    }
    folder = write_folder(tmp_path, files)
    theirs = reference(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BrainWarning)
        ours = load_tokenizer(folder)
        found = [ours.encode(text, special=special) for text in HOSTILE]
    asked = {"add_special_tokens": False, "split_special_tokens": not special}
    assert found == [theirs(text, **asked).input_ids for text in HOSTILE]
    assert 322 in ours.eos_ids
    lines = [told for w in caught if "alters this text" not in (told := str(w.message))]
    assert any(line in told for told in lines) if line else not lines


def test_loose_files_of_gpt2_are_refused_with_the_remedy(tmp_path: Path) -> None:
    files: dict[str, Json | bytes] = {
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
        "vocab.json": {"a": 0},
        "merges.txt": b"#version: 0.2\n",
    }
    with pytest.raises(Refused, match=r"no tokenizer; .*from vocab.json and merges.txt"):
        load_tokenizer(write_folder(tmp_path, files))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
UNREADABLE = {
    "empty": b"",
    "pointer": POINTER,
    "page": b"<!DOCTYPE html><html></html>",
    "bytes": bytes(range(256)),
    "tiktoken": tiktoken_list(),
    "large": b"\0" * (TOKENIZER_BYTES + 1),
}


@pytest.mark.parametrize("kind", [*UNREADABLE, "cut", "folder", "pipe", "lost"])
def test_a_tokenizer_model_that_cannot_be_read_is_nothing_beside_a_tokenizer_json(
    specimens: Specimens, tmp_path: Path, recwarn: pytest.WarningsRecorder, kind: str
) -> None:
    folder = byte_level_folder(tmp_path, specimens)
    model = folder / "tokenizer.model"
    if kind == "folder":
        model.mkdir()
    elif kind == "pipe":
        os.mkfifo(model)
    elif kind == "lost":
        model.symlink_to("nowhere")
    else:
        half = specimens.model[: len(specimens.model) // 2]
        model.write_bytes(UNREADABLE.get(kind, half))
    found = ids_of(folder)
    assert not [warning for warning in recwarn if issubclass(warning.category, BrainWarning)]
    assert found == reference_ids(folder)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_tokenizer_json_that_cannot_be_read_is_refused_beside_a_tokenizer_model(
    specimens: Specimens, tmp_path: Path, kind: str
) -> None:
    folder = llama_folder(tmp_path, specimens)
    (folder / "tokenizer.json").write_bytes(UNREADABLE[kind])
    with pytest.raises(Refused, match=r"tokenizer\.json" if kind != "bytes" else "utf-8"):
        load_tokenizer(folder)


def test_a_space_that_begins_a_text_is_kept(specimens: Specimens, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama_folder(tmp_path, specimens))
    with pytest.warns(BrainWarning, match="keeps it; transformers"):
        assert tokenizer.encode(" a man") == pieces_of(specimens, " a man")
    assert tokenizer.decode(tokenizer.encode(" a man")) == " a man"


def test_flags_of_tokens_added_to_a_sentencepiece_model(
    specimens: Specimens, tmp_path: Path
) -> None:
    declared = {str(350 + i): {"content": t, "rstrip": True} for i, t in enumerate(("<u>", "<d>"))}
    folder = llama_folder(
        tmp_path,
        specimens,
        tokenizer_json=None,
        tokenizer_config_json={"added_tokens_decoder": declared},
    )
    a_man = pieces_of(specimens, "a man")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<u>\n <d>\n<u>") == [350, 351, 350]
    assert tokenizer.encode("a man<u>") == [*a_man, 350]
    assert tokenizer.encode("a man<u>", special=False)[: len(a_man)] == a_man


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given, trained, bad = parser.parse_args(), Specimens(), 0
    tally: Counter[str] = Counter()
    for number in range(given.first, given.first + given.folders):
        with tempfile.TemporaryDirectory() as place:
            for fault in draw(number, trained, Path(place), tally):
                bad += 1
                print(f"{number}: {fault}", flush=True)
    print(f"{given.folders} folders, {bad} faults; {dict(tally)}")
    raise SystemExit(bool(bad))
