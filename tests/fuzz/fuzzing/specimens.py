"""Valid files of every kind, as small as can be, made once for each process."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

import brain
from brain.brain import Brain
from brain.checkpoints.gguf_file import RENAMED, RENAMED_IN_LAYER
from brain.checkpoints.hf_config import parse_config
from brain.checkpoints.llama_names import Part, packed_parts
from brain.checkpoints.safetensors_file import write_safetensors
from brain.measure.golden.files import Golden, MemoryShape, save_golden
from brain.measure.golden.judge import Distance, expected_of
from brain.measure.golden.replay import replay
from brain.measure.golden.script import Cull, Feed, Prime, Read
from brain.record.captures import CaptureWriter
from brain.record.commands import send
from brain.record.heatmap import remembered, write_rows
from brain.record.run_record import RunRecord
from fuzzing.formats import gguf_marks

TEXT = "he said hello, all a bell "
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": [0],
}
INDEX = "model.safetensors.index.json"
NAMED = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(250))


class Specimens:
    """Where each kind lies. ``folder`` is a model in two shards, ``single`` in one file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder, self.single = root / "model", root / "single"
        self.sentencepiece = root / "tokenizer.model"
        self.llama_json = root / "llama" / "tokenizer.json"
        self.gguf = root / "model.gguf"
        self.save, self.run = root / "save", root / "run"
        self.golden, self.record = root / "golden", root / "record"
        self._models()
        self._tokenizers()
        self.ggufs = (self.gguf, root / "pieces.gguf")
        self._gguf(self.gguf, self._byte_level(), factors=False)
        self._gguf(self.ggufs[1], _pieces(), factors=True)
        self.gguf_marks = {path: gguf_marks(path.read_bytes()) for path in self.ggufs}
        self.brain = self.open()
        self._runs()
        self._golden()

    def open(self, **overrides: Any) -> Brain:
        """The toy model, with a memory of 32 rows."""
        settings = {"capacity": 32, "cull.recent": 4, "device": "cpu", **overrides}
        return brain.open("folder", **{"model.path": str(self.single), **settings})

    def _models(self) -> None:
        config = parse_config(CONFIG, "specimen")
        parts = [part for field in packed_parts(config).values() for part in field]
        for folder, shards in ((self.single, [parts]), (self.folder, [parts[:9], parts[9:]])):
            folder.mkdir()
            names = ["model.safetensors"]
            if len(shards) > 1:
                names = [f"model-{n + 1}-of-{len(shards)}.safetensors" for n in range(len(shards))]
                index = {
                    part[0]: n for n, shard in zip(names, shards, strict=True) for part in shard
                }
                (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
            for name, shard in zip(names, shards, strict=True):
                write_safetensors(
                    folder / name, [(*part, _maker(part)) for part in shard], torch.float32
                )
            (folder / "config.json").write_text(json.dumps(CONFIG))
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
            (folder / "tokenizer_config.json").write_text(
                json.dumps({"bos_token": {"content": "<|end|>"}, "add_bos_token": True})
            )
            (folder / "tokenizer.json").write_text(_byte_level_json())

    def _tokenizers(self) -> None:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter([TEXT * 9, "bells yell hello", "a cello said so"]),
            model_writer=out,
            vocab_size=290,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        self.sentencepiece.write_bytes(out.getvalue())
        self.llama_json.parent.mkdir()
        self.llama_json.write_text(_llama_json())

    def _byte_level(self) -> dict[str, Any]:
        """The metadata of the vocabulary in a ``tokenizer.json``."""
        spec = json.loads((self.single / "tokenizer.json").read_text())["model"]
        tokens = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
        return {
            "model": "gpt2",
            "pre": "smollm",
            "tokens": tokens,
            "token_type": [3] + [1] * (len(tokens) - 1),
            "merges": [" ".join(m) for m in spec["merges"]],
        }

    def _gguf(self, path: Path, vocabulary: dict[str, Any], *, factors: bool) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in {
            "block_count": 2,
            "context_length": 128,
            "embedding_length": 16,
            "feed_forward_length": 24,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "rope.dimension_count": 4,
        }.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        for key, value in vocabulary.items():
            put = writer.add_string if isinstance(value, str) else writer.add_array
            put(f"tokenizer.ggml.{key}", value)
        writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
        writer.add_bool("tokenizer.ggml.add_bos_token", False)
        if factors:
            writer.add_tensor("rope_freqs.weight", np.ones(2, np.float32))
        size = {"vocab_size": len(vocabulary["tokens"]), "rope_scaling": None}
        config = parse_config({**CONFIG, **size}, "specimen")
        for name, shape in (part for field in packed_parts(config).values() for part in field):
            if name in RENAMED:
                told = RENAMED[name]
            else:
                _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
                told = f"blk.{layer}.{RENAMED_IN_LAYER[inner]}.weight"
            writer.add_tensor(told, np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _runs(self) -> None:
        mind = self.brain
        mind.prime(TEXT)
        self.run.mkdir()
        mind.observer = CaptureWriter(self.run / "captures", mind, 5)
        for _ in mind.stream(ticks=2):
            pass
        mind.observer = None
        mind.save(self.save)
        write_rows(remembered(mind), self.run / "memory.json")
        self.record.mkdir()
        run_record = RunRecord(self.record, mind, mind.settings.conf)
        run_record.begin(lambda: mind.prime(TEXT))
        for number in range(6):
            run_record.record_ticks(mind.tick())
            if number == 2:
                run_record.save()
            if number == 4:
                send(self.record, '{"do": "inject", "text": " a", "source": "tool"}')
                run_record.inbox.poll()
        run_record.close()

    def _golden(self) -> None:
        self.golden.mkdir()
        mind = self.open(cull="none")
        script = (Prime((1, 2, 3, 4)), Read(), Feed((5, 6)), Cull((1,)), Read((7, 8), (6, 7)))
        observed = replay(mind, script)
        golden = Golden(
            name="toy",
            description="a toy",
            model=mind.checkpoint.name,
            model_sha256=mind.checkpoint.sha256,
            script=script,
            memory=MemoryShape(16, 8, ((1,), (1, 4))),
            expected=expected_of(observed, 1),
            noise={"bfloat16": Distance(0.1, 0.1, 0.1, 0.1, 0.1)},
            provenance={},
        )
        # Read with the widths that eager brains take.
        memory = dataclasses.replace(golden.memory, widths=((1, 4),))
        save_golden(dataclasses.replace(golden, memory=memory), self.golden)

    def copy(self, kind: Path, target: Path) -> Path:
        """A fresh copy of a specimen."""
        if kind.is_dir():
            shutil.copytree(kind, target)
        else:
            shutil.copyfile(kind, target)
        return target


def _pieces() -> dict[str, Any]:
    """The metadata of a SentencePiece vocabulary."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz,.", "▁h", "el", "▁hel", "lo"]
    every = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*NAMED, *every, *letters]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * (len(tokens) - 4) + [-1.0, -2.0, -3.0, -4.0],
        "token_type": [2, 3, 3, *[6] * len(every), *[1] * len(letters)],
    }


def _maker(part: Part) -> Any:
    generator = torch.Generator().manual_seed(len(part[0]))
    return lambda: 0.3 * torch.randn(part[1], generator=generator)


def _byte_level_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *alphabet, "he", "ll", "Ġa"]
    vocab = {token: index for index, token in enumerate(tokens)}
    library = Library(models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l"), ("Ġ", "a")]))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|end|>"])
    return str(library.to_str())


def _llama_json() -> str:
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for i, text in enumerate(NAMED)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"\s+(?!\S)|\s+|\p{L}+"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {
                token: index for index, token in enumerate((*NAMED, *BYTES, *"▁helo", "he", "ll"))
            },
            "merges": ["h e", "l l"],
        },
    }
    return json.dumps(spec)
