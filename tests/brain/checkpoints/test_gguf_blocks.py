"""A GGUF file whose blocks stay where they lie: the same numbers, mapped and not copied.

The numbers are asked of the gguf package, logits of llama.cpp where it is installed. Blocks are of
random bits and random scales.
"""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from random_blocks import random_rows, reference
from torch import Tensor

import brain
from brain.actions import Cull, Redact
from brain.checkpoints.families import FAMILIES
from brain.checkpoints.folder import open_folder
from brain.checkpoints.gguf_file import gguf_name, open_gguf
from brain.checkpoints.llama_names import packed_parts
from brain.config.compose import compose_conf
from brain.config.settings import keeps_blocks
from brain.errors import BrainWarning, NotFinite, Refused
from brain.measure.bench.job import Job
from brain.measure.bench.llama_cpp_peer import LlamaCpp
from compiled.blocks import KINDS, Blocks
from compiled.matrix import dequantize, part
from conf.schema import WeightFormat
from fixture_types import SaveLlama
from gguf_files import Fields, Tensors, byte_level_fields, write_gguf
from small_families import NEW, save_as_gguf, save_family

WHOLE = [kind for kind, (_, weights, _) in KINDS.items() if weights > 1]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 288}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MATRICES = ("embedding", "qkv", "attention_out", "gate_up", "down", "head")
FIELDS = (*MATRICES, "attention_norm", "mlp_norm", "final_norm", "inverse_frequencies")
IDS = [3, 7, 1, 9, 4, 250, 33, 8]


@pytest.fixture
def file_of(save_llama: SaveLlama, tmp_path: Path, byte_level_json: str) -> Any:
    """``file_of(kinds)`` writes a model whose matrices are of these kinds, one after another."""

    def write(kinds: list[str], **settings: Any) -> Path:
        state = save_llama(tmp_path / "hf", **{**SIZES, **HEADS, **settings})
        if settings.get("tie_word_embeddings"):
            state.pop("lm_head.weight", None)
        fields = byte_level_fields(byte_level_json, "smollm")
        missing = range(len(fields["tokenizer.ggml.tokens"]), SIZES["vocab_size"])
        fields["tokenizer.ggml.tokens"] += [f"[PAD{index}]" for index in missing]
        fields["tokenizer.ggml.token_type"] += [5 for _ in missing]

        def in_blocks(_: Fields, tensors: Tensors) -> None:
            matrices = [name for name, data in tensors.items() if data.ndim > 1]
            for index, name in enumerate(matrices):
                kind = kinds[index % len(kinds)]
                height, width = tensors[name].shape
                rows = random_rows(kind, height, width, index)
                tensors[name] = (rows.bytes.numpy(), gguf.GGMLQuantizationType[kind])

        write_gguf(tmp_path / "x.gguf", state, fields, in_blocks)
        return tmp_path / "x.gguf"

    return write


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """What lies in a folder, and when each was last changed."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def as_plain(weights: Any, field: str) -> Tensor:
    """A field of weights in float32, as it is without blocks."""
    matrix = getattr(weights, field)
    if not isinstance(matrix, Blocks):
        return matrix  # type: ignore[no-any-return]
    each = [dequantize(part(matrix, layer)) for layer in range(len(matrix.layers))]
    return each[0] if field in ("embedding", "head") else torch.stack(each)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kinds", [*([kind] for kind in WHOLE), ["Q4_K", "F16", "Q6_K", "Q8_0"]])
def test_blocks_say_what_they_say_dequantized(file_of: Any, kinds: list[str], tied: bool) -> None:
    """Bit for bit, in Hugging Face's order of rows, and nothing is converted."""
    path = file_of(kinds, tie_word_embeddings=tied)
    before = contents(path.parent)
    ours = open_gguf(path, dtype=torch.float32, blocks=True)
    with pytest.warns(BrainWarning, match="MB of float32 in memory"):
        plain = open_gguf(path, dtype=torch.float32)
    assert ours.config == plain.config
    for field in FIELDS:
        assert torch.equal(as_plain(ours.weights, field), getattr(plain.weights, field)), field
    assert (ours.weights.head is ours.weights.embedding) == tied
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for field, parts in packed_parts(ours.config).items():
        matrix = getattr(ours.weights, field)
        if not isinstance(matrix, Blocks):
            continue
        found = [rows for layer in matrix.layers for rows in layer]
        for (name, _), rows in zip(parts, found, strict=True):
            theirs = stored[gguf_name(name)]
            assert rows.kind == theirs.tensor_type.name
            assert np.array_equal(
                rows.bytes.numpy(), theirs.data.view(np.uint8).reshape(len(rows.bytes), -1)
            )
    assert contents(path.parent) == before


def test_the_numbers_are_the_reference_s(file_of: Any) -> None:
    """Through all that is between a file and a matrix, of a tensor whose rows keep their order."""
    for kind in WHOLE:
        weights = open_gguf(file_of([kind]), dtype=torch.float32, blocks=True).weights
        down = part(weights.down, 1)
        assert isinstance(down, Blocks)
        assert torch.equal(dequantize(down), reference(down.layers[0][0]))


MEASURE = """
import sys, torch
from pathlib import Path
from brain.checkpoints.gguf_file import open_gguf
from compiled.matrix import dequantize, part

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

open_gguf(Path(sys.argv[1]), dtype=torch.float32, blocks=True)  # what is loaded once, is loaded
before = anonymous()
weights = open_gguf(Path(sys.argv[1]), dtype=torch.float32, blocks=True).weights
touched = max(rows.bytes.amax() for field in weights if hasattr(field, "layers")
              for layer in field.layers for rows in layer)
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_holds_nothing_of_the_file_but_its_pages(file_of: Any) -> None:
    """Private memory grows by less than 0.15 of the file, all of which has been read."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    path = file_of(["Q4_K", "Q6_K"], **wide)
    size = path.stat().st_size / 2**20
    assert size > 70
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.15 * size


def open_brain(path: Path, engine: str, **options: Any) -> brain.Brain:
    return brain.open(
        path, engine=engine, dtype="float32", device="cpu", capacity=64, cull="none", **options
    )


@pytest.mark.parametrize(
    "kinds", [["Q4_K", "Q6_K"], ["Q4_1", "Q5_0", "BF16"], ["Q8_0"], ["Q4_0", "TQ2_0", "Q8_0"]]
)
def test_every_engine_reads_the_same_model(file_of: Any, kinds: list[str]) -> None:
    """The native and the captured engine keep the blocks, the eager one makes float32 of them. As
    a prompt, token by token, and with rows forgotten.
    """
    path = file_of(kinds)
    with pytest.warns(BrainWarning, match="of float32 in memory"):
        eager = open_brain(path, "eager")
    engines = {"eager": eager, "native": open_brain(path, "native")}
    assert isinstance(engines["native"].memory.checkpoint.weights.qkv, Blocks)
    assert isinstance(eager.memory.checkpoint.weights.qkv, Tensor)
    found = {}
    for name, b in engines.items():
        b.prime(IDS)
        told = [b.read([5, 6], [8, 9]).logits, b.read([5], [8]).logits]
        b.patch([Cull([2, 3])])
        told.append(b.read([5], [8]).logits)
        found[name] = torch.cat(told)
    size = found["eager"].abs().amax()
    most = 2e-2 if "TQ2_0" in kinds else 1e-3  # whose numbers become bfloat16
    assert (found["native"] - found["eager"]).abs().amax() < most * size


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1"])
def test_families_in_blocks(tmp_path: Path, byte_level_json: str, name: str, kind: str) -> None:
    """A bias, head norms, layers that do not rotate, scalars; rows of queries and keys in either
    order.
    """
    state = save_family(tmp_path, name, byte_level_json, intermediate_size=64)
    path = tmp_path / "x.gguf"
    save_as_gguf(tmp_path, path, state, byte_level_json, gguf.GGMLQuantizationType[kind])
    native = open_brain(path, "native")
    weights = native.memory.checkpoint.weights
    assert isinstance(weights.qkv, Blocks)
    assert bool(weights.qkv.neighbour_heads) == FAMILIES[name].permuted
    with pytest.warns(BrainWarning, match="of float32 in memory"):
        eager = open_brain(path, "eager")
    found = []
    for b in (native, eager):
        told = [b.read(IDS, range(len(IDS))).logits]
        b.prime(IDS)
        found.append(torch.cat([*told, *(b.read([token], [8]).logits for token in range(6))]))
    assert (found[0] - found[1]).abs().amax() < 1e-3 * found[1].abs().amax()


def test_a_captured_run_keeps_the_blocks(file_of: Any) -> None:
    """The same tokens as the native engine's, whose operator it calls."""
    path = file_of(["Q4_K", "Q6_K"])
    said = {}
    for engine in ("native", "compiled"):
        b = open_brain(path, engine)
        b.prime(IDS)
        said[engine] = [b.tick().token for _ in range(12)]
        assert isinstance(b.memory.checkpoint.weights.qkv, Blocks)
    assert said["native"] == said["compiled"]


def test_auto_keeps_the_blocks_and_float32(file_of: Any) -> None:
    b = brain.open(file_of(["Q4_K"]), device="cpu", capacity=64)
    assert isinstance(b.memory.checkpoint.weights.head, Blocks)
    assert b.memory.checkpoint.weights.dtype == torch.float32


def test_what_cannot_be_multiplied_becomes_bfloat16_and_is_told(file_of: Any) -> None:
    """Where most of the file can."""
    path = file_of(["Q4_0", "Q4_0", "Q4_0", "TQ2_0"])
    with pytest.warns(BrainWarning, match=r"mostly Q4_0, are [\d,]+ MB of bfloat16 in memory"):
        weights = open_gguf(path, dtype=torch.float32, blocks=True).weights
    kinds = {
        rows.kind
        for field in weights
        if isinstance(field, Blocks)
        for layer in field.layers
        for rows in layer
    }
    assert kinds == {"Q4_0", "BF16"}
    plain = open_gguf(path, dtype=torch.float32).weights
    for field in ("qkv", "down", "head"):
        ours, theirs = as_plain(weights, field), getattr(plain, field)
        assert ((ours - theirs).abs() <= 2**-8 * theirs.abs()).all()


def test_a_scale_that_is_not_finite_is_named(file_of: Any) -> None:
    path = file_of(["Q4_K"])
    name = "blk.1.ffn_down.weight"
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(np.float16(np.inf).tobytes())
    with pytest.raises(NotFinite, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        open_brain(path, "native").prime(IDS)


def test_a_folder_in_four_bits(save_llama: SaveLlama, tmp_path: Path) -> None:
    """Blocks where the operator multiplies them, else the same numbers in the model's dtype."""
    save_llama(tmp_path, **SIZES, **HEADS, std=0.3)
    four = WeightFormat.int4
    ours = open_folder(tmp_path, dtype=torch.float32, weights=four, blocks=True).weights
    plain = open_folder(tmp_path, dtype=torch.float32, weights=four).weights
    exact = open_folder(tmp_path, dtype=torch.float32).weights
    for field in FIELDS:
        found = as_plain(ours, field)
        assert torch.equal(found, getattr(plain, field)), field
        error = (found - getattr(exact, field)).norm() / getattr(exact, field).norm()
        assert (error > 0) == (field in MATRICES), field
        assert error < 0.1  # of noise: half a step of fifteen


def test_a_folder_in_four_bits_as_a_brain(save_llama: SaveLlama, tmp_path: Path) -> None:
    """Kept so by the native engine; the eager one says that it does not, and reads the same."""
    save_llama(tmp_path, **SIZES, **HEADS, std=0.3)
    native = open_brain(tmp_path, "native", weights="int4")
    assert isinstance(native.memory.checkpoint.weights.down, Blocks)
    with pytest.warns(BrainWarning, match="engine=eager on cpu reads matrices in float32, rounded"):
        eager = open_brain(tmp_path, "eager", weights="int4")
    found = [b.read(IDS, range(len(IDS))).logits for b in (native, eager)]
    assert (found[0] - found[1]).abs().amax() < 1e-3 * found[1].abs().amax()


def test_rows_that_are_no_whole_blocks_become_bfloat16(
    save_llama: SaveLlama, tmp_path: Path
) -> None:
    """In blocks or not: the same numbers."""
    save_llama(tmp_path, **{**SIZES, "intermediate_size": 72}, **HEADS)
    four = WeightFormat.int4
    weights = open_folder(tmp_path, dtype=torch.float32, weights=four, blocks=True).weights
    plain = open_folder(tmp_path, dtype=torch.float32, weights=four).weights
    for field in FIELDS:
        assert torch.equal(as_plain(weights, field), getattr(plain, field)), field
    kinds = {field: getattr(weights, field).layers[0][0].kind for field in ("qkv", "down")}
    assert kinds == {"qkv": "Q4_1", "down": "BF16"}


def test_room_for_four_bits_is_asked_for(
    save_llama: SaveLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of it lies in place as it is."""
    save_llama(tmp_path, **SIZES, **HEADS)
    monkeypatch.setattr("brain.checkpoints.packing.free_bytes", lambda device: 1000)
    for blocks in (False, True):
        with pytest.raises(Refused, match="of memory but"):
            open_folder(tmp_path, dtype=torch.float32, weights=WeightFormat.int4, blocks=blocks)


@pytest.mark.parametrize("weights", ["model", "int4"])
def test_float16_has_no_operator_and_keeps_no_blocks(file_of: Any, weights: str) -> None:
    conf = compose_conf(["engine=compiled", "dtype=float16", f"weights={weights}"])
    assert not keeps_blocks(conf, torch.device("cpu"))
    path = file_of(["Q8_0"])
    with pytest.warns(BrainWarning):
        b = brain.open(
            path, engine="eager", dtype="float16", device="cpu", capacity=64, weights=weights
        )
    assert isinstance(b.memory.checkpoint.weights.qkv, Tensor)
    b.prime(IDS)
    assert b.read().logits.isfinite().all()


def test_a_redaction_may_name_more_rows_than_are_read_at_a_time(file_of: Any) -> None:
    b = brain.open(file_of(["Q8_0"]), engine="native", dtype="float32", device="cpu", capacity=300)
    b.prime([index % 250 for index in range(280)])
    b.patch([Redact(list(range(20, 220)))])
    assert len(b) == 80


LLAMA_CPP = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_M": 15, "Q5_K_M": 17}
LLAMA_CPP["Q6_K"] = 18


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_llama_cpp_has_the_same_logits(file_of: Any, tmp_path: Path, kind: str) -> None:
    """On files that it has made. Its vectors have eight bits where ours have sixteen."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path, made = file_of(["F32"]), tmp_path / f"{kind}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = LLAMA_CPP[kind], 1
    names = (str(name).encode() for name in (path, made))
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(params)) == 0
    ours = open_brain(made, "native")
    assert isinstance(ours.memory.checkpoint.weights.qkv, Blocks)
    with pytest.warns(BrainWarning, match="of float32 in memory"):
        exact = open_brain(made, "eager")
    job = Job("llama-cpp", "float32", str(tmp_path / "hf"), "cpu", 1, 64, gguf=str(made))
    theirs = LlamaCpp(job, cache_type=0)
    theirs.prime(IDS)
    told = torch.from_numpy(theirs.logits().copy())
    found = [b.read(IDS, range(len(IDS))).logits[-1] for b in (ours, exact)]
    size = found[1].abs().amax()
    assert (found[0] - found[1]).abs().amax() < 1e-3 * size
    assert (told - found[1]).abs().amax() < 0.05 * size
