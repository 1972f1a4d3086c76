"""Tokenizers in Hugging Face folders that say one thing in two places."""

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from texts import CORPUS, train_sentencepiece

Json = dict[str, Any]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
MARKS = ("<|user|>", "<|done|>", "<tool>", "mid")
ENDS = ("<s>", "</s>", "<|end|>")
SAID = (
    "Hello, in a man of",
    " wife must be",
    "<|user|>\nHello<|done|>\n<|user|> \n a",
    "a <tool> be<tool>of <s>he</s> she",
    "<s>man <|end|> he",
    "<unk>x amidst mid midst 12 345",
    "naïve  café\t漢 🤖",
)


def metaspace(scheme: str) -> Json:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def byte_level(*, prefix: bool = False) -> Json:
    step = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True}
    return step | {"use_regex": True}


def template(*before: tuple[str, int], after: tuple[tuple[str, int], ...] = ()) -> Json:
    """A post-processor that puts these tokens around a text."""

    def pieces(tokens: tuple[tuple[str, int], ...]) -> list[Json]:
        return [{"SpecialToken": {"id": text, "type_id": 0}} for text, _ in tokens]

    single = [*pieces(before), {"Sequence": {"id": "A", "type_id": 0}}, *pieces(after)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            text: {"id": text, "ids": [index], "tokens": [text]}
            for text, index in (*before, *after)
        },
    }


def added(index: int, text: str, **flags: bool) -> Json:
    """An entry of tokenizer.json's added_tokens."""
    common = dict.fromkeys(FLAGS, False) | {"special": True}
    return {"id": index, "content": text} | common | flags


@dataclass
class Specimens:
    """What is trained once."""

    model: bytes = field(default_factory=train_sentencepiece)

    def __post_init__(self) -> None:
        self.models = [
            self.model,
            train_sentencepiece(add_dummy_prefix=False),
            train_sentencepiece(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
            train_sentencepiece(user_defined_symbols=["<tool>"], control_symbols=["<|user|>"]),
            train_sentencepiece(model_type="unigram", vocab_size=300, hard_vocab_limit=False),
        ]
        self.llama_json = llama_json(self.model)
        self.byte_json = byte_json()


def llama_json(model: bytes) -> Json:
    """The tokenizer.json of a SentencePiece BPE model, in the manner of Llama."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    normal = {t: i for t, i in vocab.items() if i > 2 and not processor.is_byte(i)}
    merges = sorted(
        (index, len(text[:cut]), text[:cut], text[cut:])
        for text, index in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    )
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        *({"type": "ByteFallback"}, {"type": "Fuse"}),
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "added_tokens": [added(i, t) for i, t in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": None,
        "pre_tokenizer": metaspace("first"),
        "post_processor": template(("<s>", 1)),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, _, left, right in merges],
        },
    }


def byte_json() -> Json:
    """A byte-level tokenizer.json."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    library.train_from_iterator(CORPUS.split("\n"), trainer)
    told: Json = json.loads(library.to_str())
    return told


def tiktoken_list() -> bytes:
    """A vocabulary for tiktoken, which Llama 3 folders call tokenizer.model."""
    return b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


def write_folder(path: Path, files: dict[str, Json | bytes]) -> Path:
    """Writes files, JSON or as they are, into a folder that it makes."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name).write_bytes(raw)
    return path


class Drawn:
    """A folder whose files are changed at random, so that some contradict each other."""

    def __init__(self, rng: Random, specimens: Specimens, *, alone: bool) -> None:
        """``alone``: whether a tokenizer.model without tokenizer.json may be drawn."""
        self.rng, self.specimens = rng, specimens
        self.llama = rng.random() < 0.6
        base = specimens.llama_json if self.llama else specimens.byte_json
        self.library: Json = json.loads(json.dumps(base))
        self.size = len(self.library["model"]["vocab"])
        self.tokenizer_config: Json = {"add_bos_token": True} if self.llama else {}
        self.config: Json = {"model_type": rng.choice(["llama", "llama", "llama", "mistral"])}
        kind = "LlamaTokenizer" if self.llama else "PreTrainedTokenizerFast"
        self.tokenizer_config["tokenizer_class"] = kind
        self.tokenizer_config |= {"bos_token": "<s>", "eos_token": "</s>"}
        self.others: dict[str, Json | bytes] = {}
        changes = [
            *(self._reader, self._prefix, self._beside, self._bos, self._eos, self._form),
            *(
                self._settings,
                self._normalizer,
                self._library_tokens,
                self._declared,
                self._added,
                self._special_map,
                self._listed,
            ),
        ]
        for change in rng.sample(changes, rng.randint(1, 4)):
            change()
        self.alone = alone and self.llama and rng.random() < 0.25
        if self.alone:
            self.others.setdefault("tokenizer.model", rng.choice(specimens.models))

    def files(self) -> dict[str, Json | bytes]:
        """The files, by name."""
        told: dict[str, Json | bytes] = {
            "tokenizer_config.json": self.tokenizer_config,
            "config.json": self.config,
        }
        if not self.alone:
            told["tokenizer.json"] = self.library
        return told | self.others

    def _token(self, text: str) -> str | Json:
        if self.rng.random() < 0.5:
            return text
        flags = {flag: self.rng.random() < 0.3 for flag in FLAGS}
        return {"__type": "AddedToken", "content": text, **flags}

    def _index(self, text: str, offset: int) -> int:
        vocab: dict[str, int] = self.library["model"]["vocab"]
        wrong = self.rng.choice([0, 0, 0, 1, 7])
        return wrong + vocab.get(text, self.size + offset)

    def _entries(self) -> list[Json]:
        texts = self.rng.sample(MARKS, self.rng.randint(1, 3)) + self.rng.sample(ENDS, 1)
        found = {}
        for offset, text in enumerate(texts):
            flags = {flag: self.rng.random() < 0.3 for flag in FLAGS}
            index = self._index(text, offset)
            found[index] = added(index, text, **flags, special=self.rng.random() < 0.7)
        return list(found.values())

    def _reader(self) -> None:
        names = ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "TokenizersBackend"]
        names += ["PreTrainedTokenizerFast", "PreTrainedTokenizer", "NoSuchTokenizer"]
        self.tokenizer_config["tokenizer_class"] = self.rng.choice(names)
        if self.rng.random() < 0.3:
            del self.tokenizer_config["tokenizer_class"]
        if self.rng.random() < 0.5:
            self.config["tokenizer_class"] = self.rng.choice(names[:-1])

    def _prefix(self) -> None:
        if self.rng.random() < 0.6:
            self.tokenizer_config["add_prefix_space"] = self.rng.choice([True, False, None])
        if self.rng.random() < 0.6:
            self.tokenizer_config["legacy"] = self.rng.choice([True, False, None])
        if not self.llama:
            self.library["pre_tokenizer"] = byte_level(prefix=self.rng.random() < 0.5)
        elif self.rng.random() < 0.7:
            self.library["pre_tokenizer"] = metaspace(self.rng.choice(["first", "always", "never"]))
        else:
            replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            steps = [{"type": "Prepend", "prepend": "▁"}, replaced]
            self.library["normalizer"] = {"type": "Sequence", "normalizers": steps}
            self.library["pre_tokenizer"] = None

    def _beside(self) -> None:
        model = [*self.specimens.models, tiktoken_list(), b"none at all"]
        self.others["tokenizer.model"] = self.rng.choice(model)
        if self.rng.random() < 0.2:
            self.others["vocab.json"] = self.library["model"]["vocab"] | {"new": 900}
            self.others["merges.txt"] = b"#version: 0.2\n"

    def _settings(self) -> None:
        keys = ["split_special_tokens", "add_eos_token", "use_default_system_prompt"]
        self.tokenizer_config[self.rng.choice(keys)] = self.rng.random() < 0.7

    def _normalizer(self) -> None:
        if self.llama:
            self.library["model"]["byte_fallback"] = self.rng.random() < 0.5
        else:
            self.library["normalizer"] = {"type": self.rng.choice(["NFC", "NFKC", "Lowercase"])}

    def _form(self) -> None:
        model = self.library["model"]
        del model["type"]
        model["merges"] = [" ".join(merge) for merge in model["merges"]]

    def _bos(self) -> None:
        if self.rng.random() < 0.5:
            self.tokenizer_config["bos_token"] = self._token(self.rng.choice(ENDS))
        if self.rng.random() < 0.5:
            self.tokenizer_config["add_bos_token"] = self.rng.random() < 0.5
        if self.rng.random() < 0.5:
            self.config["bos_token_id"] = self.rng.randint(0, 4)
        if self.rng.random() < 0.5:
            self.others["generation_config.json"] = {"bos_token_id": self.rng.randint(0, 4)}
        token = ("<s>", self.library["model"]["vocab"]["<s>"])
        end = ("</s>", self.library["model"]["vocab"]["</s>"])
        self.library["post_processor"] = self.rng.choice(
            [None, template(token), template(end), template(), template(token, after=(end,))]
        )

    def _eos(self) -> None:
        self.tokenizer_config["eos_token"] = self._token(self.rng.choice(ENDS))
        if self.rng.random() < 0.5:
            self.config["eos_token_id"] = self.rng.choice([2, 5, [2, 5]])
        if self.rng.random() < 0.5:
            self.others["generation_config.json"] = {"eos_token_id": self.rng.choice([2, [2, 7]])}

    def _library_tokens(self) -> None:
        kept = {entry["content"]: entry for entry in self.library["added_tokens"]}
        kept |= {entry["content"]: entry for entry in self._entries()}
        entries = {entry["id"]: entry for entry in kept.values()}
        vocab = self.library["model"]["vocab"]
        # The library wants them in order and without a gap.
        new = sorted(i for i in entries if entries[i]["content"] not in vocab)
        for rank, index in enumerate(new):
            entries[index]["id"] = self.size + rank
        for entry in entries.values():
            entry["id"] = vocab.get(entry["content"], entry["id"])
        self.library["added_tokens"] = sorted(entries.values(), key=lambda entry: entry["id"])

    def _declared(self) -> None:
        told = {entry["id"]: entry for entry in self._entries()}
        self.tokenizer_config["added_tokens_decoder"] = {
            str(index): {key: value for key, value in entry.items() if key != "id"}
            for index, entry in told.items()
        }

    def _added(self) -> None:
        told = {entry["content"]: entry["id"] for entry in self._entries()}
        self.others["added_tokens.json"] = told

    def _special_map(self) -> None:
        told: Json = {}
        for key in self.rng.sample(["bos_token", "eos_token", "unk_token", "pad_token"], 2):
            token = self._token(self.rng.choice([*ENDS, MARKS[0]]))
            told[key] = token if isinstance(token, str) else token | {"__type": "AddedToken"}
            if isinstance(told[key], dict):
                del told[key]["__type"]
        if self.rng.random() < 0.4:
            key = self.rng.choice(["extra_special_tokens", "additional_special_tokens"])
            told[key] = self.rng.sample(MARKS, 2)
        self.others["special_tokens_map.json"] = told

    def _listed(self) -> None:
        key = self.rng.choice(["extra_special_tokens", "additional_special_tokens"])
        self.tokenizer_config[key] = [self._token(t) for t in self.rng.sample(MARKS, 2)]
        if self.rng.random() < 0.2:
            self.tokenizer_config["extra_special_tokens"] = {"tool_token": "<tool>"}
