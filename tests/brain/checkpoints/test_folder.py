"""Model folders: what loads, where it lies in memory, and what is refused."""

import json
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from brain.checkpoints import open_folder
from brain.checkpoints.llama_names import packed_parts
from brain.checkpoints.safetensors_file import TensorFile, write_safetensors
from brain.errors import BrainWarning, Refused
from compiled.llama import Weights, weight_shapes
from compiled.matrix import dequantize
from conf.schema import WeightFormat

SaveLlama = Callable[..., dict[str, Tensor]]
EditJson = Callable[[Path, dict[str, Any]], None]


def assert_same(weights: Weights, state: dict[str, Tensor], folder: Path) -> None:
    """Every packed tensor holds the transformers model's tensors, shape and all."""
    config = open_folder(folder, dtype=torch.float32).config
    shapes = weight_shapes(config)
    fields = packed_parts(config)
    assert {field for field, tensor in weights._asdict().items() if tensor is not None} == {*shapes}
    for field, shape in shapes.items():
        tensor = getattr(weights, field)
        assert tensor.shape == shape
        if field in fields:
            parts = [state[name].reshape(-1) for name, _ in fields[field]]
            assert torch.equal(tensor.float().reshape(-1), torch.cat(parts)), field


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal_of(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(Refused) as refusal:
        open_folder(folder, dtype=dtype)
    message = str(refusal.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def said_of(folder: Path) -> list[str]:
    """What opening a folder warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_folder(folder, dtype=torch.float32)
    return [str(warning.message) for warning in caught]


# What loads ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"max_shard_size": "20KB"},
        {"max_shard_size": "20KB", "tie_word_embeddings": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=str,
)
def test_folder_equals_transformers(
    save_llama: SaveLlama, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    state = save_llama(tmp_path, **settings)
    assert ("max_shard_size" in settings) == (len(list(tmp_path.glob("*.safetensors"))) > 1)
    checkpoint = open_folder(tmp_path, dtype=torch.float32)
    assert checkpoint.name == tmp_path.name
    assert_same(checkpoint.weights, state, tmp_path)
    weights = checkpoint.weights
    tied = settings.get("tie_word_embeddings", False)
    assert (weights.head is weights.embedding) == checkpoint.config.tie_word_embeddings == tied
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    frequencies = reference.model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(weights.inverse_frequencies[0], frequencies, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_is_as_asked(
    save_llama: SaveLlama, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    state = save_llama(tmp_path, dtype=stored)
    weights = open_folder(tmp_path, dtype=dtype).weights
    assert {t.dtype for t in weights.tensors()[:-1]} == {dtype}
    assert weights.inverse_frequencies.dtype == torch.float64
    assert_same(weights, {name: t.to(dtype).float() for name, t in state.items()}, tmp_path)


def test_tied_head_may_be_stored_too(save_llama: SaveLlama, tmp_path: Path) -> None:
    save_llama(tmp_path, tie_word_embeddings=True)
    rewrite(
        tmp_path / "model.safetensors",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    weights = open_folder(tmp_path, dtype=torch.float32).weights
    assert weights.head is weights.embedding


def test_old_config_keys(save_llama: SaveLlama, tmp_path: Path, edit_json: EditJson) -> None:
    save_llama(tmp_path)
    old = {"rope_parameters": None, "rope_theta": 7000.0, "head_dim": None}
    edit_json(tmp_path / "config.json", old)
    config = open_folder(tmp_path, dtype=torch.float32).config
    assert (config.rope_theta, config.rope_scaling, config.head_dim) == (7000.0, None, 8)
    for key in ("type", "rope_type"):
        scaled = {"rope_scaling": {key: "linear", "factor": 2}}
        edit_json(tmp_path / "config.json", scaled)
        config = open_folder(tmp_path, dtype=torch.float32).config
        assert config.rope_theta == 7000.0
        assert config.rope_scaling is not None
        assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 2.0)


def test_mistral_without_sliding_window(
    save_llama: SaveLlama, tmp_path: Path, edit_json: EditJson
) -> None:
    state = save_llama(tmp_path)
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    edit_json(tmp_path / "config.json", mistral)
    assert "sliding_window" in refusal_of(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)


@pytest.mark.parametrize(("base", "agrees"), [(10000.0, True), (500.0, False)])
def test_rotary_buffers_of_old_checkpoints_are_not_used(
    save_llama: SaveLlama, tmp_path: Path, base: float, agrees: bool
) -> None:
    state = save_llama(tmp_path)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    buffer = (base ** -(torch.arange(0, 8, 2) / 8)).to(torch.bfloat16)
    buffers = {name: buffer.clone() for name in names}
    rewrite(tmp_path / "model.safetensors", lambda t: t.update(buffers))
    said = said_of(tmp_path)
    if agrees:
        assert said == []
    else:
        (line,) = said
        assert all(part in line for part in (names[0], "rope_theta", "(and 2 more like this)"))
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)


def test_hash_identifies_the_stored_weights(save_llama: SaveLlama, tmp_path: Path) -> None:
    save_llama(tmp_path / "a", max_shard_size="20KB")
    save_llama(tmp_path / "b", max_shard_size="20KB")
    a, b = (
        open_folder(tmp_path / n, dtype=d) for n, d in (("a", torch.float32), ("b", torch.half))
    )
    assert a.sha256 == b.sha256
    assert len(a.sha256) == 64
    shard = sorted((tmp_path / "b").glob("*.safetensors"))[0]
    rewrite(shard, lambda t: next(iter(t.values())).add_(1.0))
    assert open_folder(tmp_path / "b", dtype=torch.float32).sha256 != a.sha256


# Where it lies in memory -----------------------------------------------------------------------


def in_packed_order(folder: Path) -> None:
    """Rewrites a folder's only weight file with our writer, in the order of the packed tensors."""
    config = open_folder(folder, dtype=torch.float32).config
    stored = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in stored.items()}
    parts = [part for field in packed_parts(config).values() for part in field]
    write_safetensors(
        folder / "model.safetensors",
        [(name, shape, lambda name=name: tensors[name]) for name, shape in parts],  # type: ignore[misc]
        torch.float32,
    )


def mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is a file's."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if start <= address < end:
            return len(fields) == 6 and fields[5].endswith(".safetensors")
    raise AssertionError("address is not mapped")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_packed_order_is_mapped_and_any_other_copied(save_llama: SaveLlama, tmp_path: Path) -> None:
    state = save_llama(tmp_path, hidden_size=64, intermediate_size=64)
    weights = open_folder(tmp_path, dtype=torch.float32).weights
    assert not mapped(dequantize(weights.qkv))
    in_packed_order(tmp_path)
    weights = open_folder(tmp_path, dtype=torch.float32).weights
    assert all(mapped(tensor) for tensor in weights.tensors()[:-1])
    assert_same(weights, state, tmp_path)
    lower = open_folder(tmp_path, dtype=torch.bfloat16).weights
    assert not any(mapped(tensor) for tensor in lower.tensors())


def test_mapped_weights_cannot_change_the_file(save_llama: SaveLlama, tmp_path: Path) -> None:
    save_llama(tmp_path)
    in_packed_order(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    dequantize(open_folder(tmp_path, dtype=torch.float32).weights.qkv).zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_written_file_is_standard_and_page_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7)}
    write_safetensors(
        path,
        [(n, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()],  # type: ignore[misc]
        torch.float32,
    )
    read = load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    file = TensorFile(path)
    assert [file.entries["b"].start, file.entries["a"].start] == [4096, 4096 + 60]
    file.release("b")
    assert torch.equal(file.tensor("b"), tensors["b"])
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(path, [("a", (2,), lambda: torch.ones(3))], torch.float32)


MEASURE = """
import resource, sys, torch
from pathlib import Path
from brain.checkpoints import open_folder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = open_folder(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2])).weights
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 40), ("bfloat16", 64 + 40)])
def test_loading_never_holds_a_second_copy(
    save_llama: SaveLlama, tmp_path: Path, dtype: str, limit: int
) -> None:
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    save_llama(tmp_path, **size)  # 128 MB in float32, 64 in bfloat16
    in_packed_order(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )
    assert float(done.stdout) < limit


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": [3]}, "architectures [3]"),
        ({"is_causal": False}, "is_causal False"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"transformers_weights": "../x.safetensors"}, "not a plain"),
        ({"transformers_weights": "x.safetensors"}, "config.json: x.safetensors is missing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"mlp_bias": 1}, "mlp_bias 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 64}, "sliding_window 64"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"vocab_size": None}, "vocab_size None"),
        ({"vocab_size": 301}, "config.json implies [301, 32] by vocab_size"),
        ({"hidden_size": "32"}, "hidden_size '32'"),
        ({"hidden_size": 32.0}, "hidden_size 32.0"),
        ({"intermediate_size": 0}, "intermediate_size 0"),
        ({"num_hidden_layers": -3}, "num_hidden_layers -3"),
        ({"num_hidden_layers": True}, "num_hidden_layers True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 2}, "more than config.json's 2 layers"),
        ({"hidden_size": 2**23, "head_dim": 8}, "config.json implies [300, 8388608]"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "hidden_size 32"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
        ({"rope_parameters": "long"}, "rope_parameters 'long'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor None"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "rope_parameters.rope_theta 0.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of RoPE"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "type 'dynamic'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "low_freq_factor 4.0",
        ),
    ],
    ids=str,
)
def test_unusable_configs_are_refused(
    save_llama: SaveLlama, tmp_path: Path, edit: dict[str, Any], message: str
) -> None:
    save_llama(tmp_path, edit=edit)
    assert message in refusal_of(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100000, "\ufeff{}"])
def test_malformed_configs_are_refused(save_llama: SaveLlama, tmp_path: Path, content: str) -> None:
    save_llama(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in refusal_of(tmp_path)


def test_missing_files_are_refused(save_llama: SaveLlama, tmp_path: Path) -> None:
    assert "no such folder" in refusal_of(tmp_path / "nowhere")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        save_llama(folder)
        (folder / name).unlink()
        assert "no " in refusal_of(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", None, "model.norm.weight is missing"),
        ("lm_head.weight", None, "lm_head.weight is missing"),
        (
            "model.norm.weight",
            torch.ones(33),
            "model.norm.weight has shape [33], config.json implies [32]",
        ),
        ("model.norm.weight", torch.ones(32, dtype=torch.float64), "has dtype F64"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int8), "has dtype I8"),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(32), "no such bias is supported"),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(8), "unexpected tensor"),
    ],
)
def test_unusable_tensors_are_refused(
    save_llama: SaveLlama, tmp_path: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    save_llama(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    rewrite(tmp_path / "model.safetensors", change)
    found = refusal_of(tmp_path)
    assert message in found
    assert "model.safetensors" in found


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files_are_refused(save_llama: SaveLlama, tmp_path: Path, keep: int) -> None:
    save_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a complete safetensors file" in refusal_of(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_git_puts_in_the_place_of_a_large_file_is_told(
    save_llama: SaveLlama, tmp_path: Path, name: str
) -> None:
    save_llama(tmp_path)
    told = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    (tmp_path / name).write_text(told)
    found = refusal_of(tmp_path)
    assert f"{name}" in found
    assert "it is a pointer of Git LFS: run 'git lfs pull'" in found


def test_a_header_that_lies_is_refused(save_llama: SaveLlama, tmp_path: Path) -> None:
    save_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    assert "not a complete safetensors file" in refusal_of(tmp_path)


def test_unusable_dtypes_are_refused(save_llama: SaveLlama, tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(Refused, match=r"torch\.float64"):
        open_folder(tmp_path, dtype=torch.float64)


@pytest.mark.parametrize(
    "name",
    ["../model-00001.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "", "weights.bin"],
)
def test_shard_names_that_leave_the_folder_are_refused(
    save_llama: SaveLlama, tmp_path: Path, name: str
) -> None:
    save_llama(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "not a plain" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": []}}'],
)
def test_malformed_indexes_are_refused(save_llama: SaveLlama, tmp_path: Path, content: str) -> None:
    save_llama(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "index" in refusal_of(tmp_path)


def test_missing_shards_are_refused(save_llama: SaveLlama, tmp_path: Path) -> None:
    save_llama(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    assert f"{first.name} is missing" in refusal_of(tmp_path)
    shutil.copy(second, first)
    assert f"the index puts it in {first.name}" in refusal_of(tmp_path)


def test_adapters_are_refused(save_llama: SaveLlama, tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "config.json describes; merge it" in refusal_of(tmp_path)


# What says the same thing twice ------------------------------------------------------------------


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 64, "rope_theta": 10000.0},
}


@pytest.mark.parametrize(
    ("edit", "counts", "overruled"),
    [
        ({"rope_scaling": LINEAR}, "rope_scaling {", "rope_parameters {"),
        ({"rope_theta": 5.0}, "rope_parameters.rope_theta 10000.0", "rope_theta 5.0"),
        ({"rope_parameters": {**LINEAR, "type": "llama3"}}, "rope_type 'linear'", "type 'llama3'"),
        (
            {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
            "original_max_position_embeddings 32",
            "rope_parameters.original_max_position_embeddings 64",
        ),
        ({"architectures": ["LlamaModel"]}, "model_type 'llama'", "architectures ['LlamaModel']"),
        ({"auto_map": {"AutoModel": "a.B"}}, "model_type 'llama'", "auto_map {"),
    ],
    ids=str,
)
def test_what_config_json_overrules_is_said(
    save_llama: SaveLlama, tmp_path: Path, edit: dict[str, Any], counts: str, overruled: str
) -> None:
    save_llama(tmp_path, edit=edit)
    (line,) = said_of(tmp_path)
    assert line.startswith(f"{tmp_path}/config.json: ")
    assert line.index(counts) < line.index(overruled)
    assert line.endswith("is overruled, as in transformers")


@pytest.mark.parametrize(
    "edit",
    [
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {**LINEAR, "rope_theta": 10000}, "rope_scaling": LINEAR},
        {"rope_theta": 10000},
        {"rope_parameters": {**LINEAR, "type": "linear"}},
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
        {"partial_rotary_factor": 1.0},
        {"architectures": ["LLaMAForCausalLM"]},
        {"architectures": ["LlamaModel", "LlamaForCausalLM"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": None},
        {"layer_types": ["full_attention"] * 3},
        {"transformers_weights": "model.safetensors"},
    ],
    ids=str,
)
def test_what_agrees_is_silent(save_llama: SaveLlama, tmp_path: Path, edit: dict[str, Any]) -> None:
    save_llama(tmp_path, edit=edit)
    assert said_of(tmp_path) == []


def test_a_whole_file_counts_before_an_index(save_llama: SaveLlama, tmp_path: Path) -> None:
    state = save_llama(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "model.safetensors")}))
    assert said_of(tmp_path) == []
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "a.safetensors")}))
    (line,) = said_of(tmp_path)
    assert f"{index.name} is overruled by model.safetensors" in line
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)


def test_config_json_may_name_the_weights(
    save_llama: SaveLlama, tmp_path: Path, edit_json: EditJson
) -> None:
    state = save_llama(tmp_path)
    whole = tmp_path / "model.safetensors"
    shutil.copy(whole, tmp_path / "mine.safetensors")
    rewrite(whole, lambda t: t["model.norm.weight"].add_(1))
    edit_json(tmp_path / "config.json", {"transformers_weights": "mine.safetensors"})
    (line,) = said_of(tmp_path)
    assert "model.safetensors is overruled by mine.safetensors" in line
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)
    index = {"weight_map": dict.fromkeys(state, "mine.safetensors")}
    (tmp_path / "mine.safetensors.index.json").write_text(json.dumps(index))
    edit_json(tmp_path / "config.json", {"transformers_weights": "mine.safetensors.index.json"})
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)


def test_of_a_tensor_in_two_shards_the_last_counts(save_llama: SaveLlama, tmp_path: Path) -> None:
    state = save_llama(tmp_path, max_shard_size="20KB")
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    name = "model.norm.weight"
    assert name in load_file(last)
    rewrite(first, lambda t: t.update({name: state[name].clone()}))
    assert said_of(tmp_path) == []
    rewrite(first, lambda t: t.update({name: state[name] + 1}))
    (line,) = said_of(tmp_path)
    assert all(part in line for part in (str(last), name, first.name, "the last shard counts"))
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)


def test_a_tensor_may_lie_where_the_index_does_not_say(
    save_llama: SaveLlama, tmp_path: Path
) -> None:
    state = save_llama(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, *_, last = sorted(set(weight_map.values()))
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.norm.weight": first}}))
    (line,) = said_of(tmp_path)
    assert line.startswith(f"{tmp_path / last}: tensor model.norm.weight is here, and used")
    assert line.endswith(f"the index says {first}")
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)


def test_names_may_begin_with_model_or_not(save_llama: SaveLlama, tmp_path: Path) -> None:
    state = save_llama(tmp_path)
    whole, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"

    def respell(tensors: dict[str, Tensor]) -> None:
        for full in list(tensors):
            spelling = full.removeprefix("model.") if full in state else full
            tensors[spelling if full != "lm_head.weight" else f"model.{full}"] = tensors.pop(full)

    rewrite(whole, respell)
    assert said_of(tmp_path) == []
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)
    rewrite(whole, lambda t: t.update({name: state[name] + 1}))
    (line,) = said_of(tmp_path)
    assert line.index(f"tensor {name[6:]} counts") < line.index(name)
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)


@pytest.mark.parametrize("int8", [False, True])
def test_a_stored_head_of_its_own_counts(save_llama: SaveLlama, tmp_path: Path, int8: bool) -> None:
    state = save_llama(tmp_path, tie_word_embeddings=True)
    head = torch.randn_like(state["lm_head.weight"])
    rewrite(tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": head.clone()}))
    with pytest.warns(BrainWarning, match=r"lm_head.weight is stored .* tie_word_embeddings true"):
        checkpoint = open_folder(
            tmp_path, dtype=torch.float32, weights=WeightFormat.int8 if int8 else WeightFormat.model
        )
    assert not checkpoint.config.tie_word_embeddings
    tolerance = 0.02 if int8 else 0.0
    torch.testing.assert_close(dequantize(checkpoint.weights.head), head, rtol=0, atol=tolerance)


@pytest.mark.parametrize("where", ["a shard", "half as wide", "under model."])
def test_a_head_of_its_own_counts_wherever_it_is_stored(
    save_llama: SaveLlama, tmp_path: Path, where: str
) -> None:
    save_llama(tmp_path, tie_word_embeddings=True)
    whole = tmp_path / "model.safetensors"
    name = "model.lm_head.weight" if where == "under model." else "lm_head.weight"
    head = torch.randn(300, 32, generator=torch.Generator().manual_seed(9))
    if where == "half as wide":
        head = head.bfloat16()
    tensors = load_file(whole)
    if where == "a shard":
        save_file({name: head}, tmp_path / "z.safetensors")
        save_file(tensors, tmp_path / "a.safetensors")
        whole.unlink()
        weight_map = {name: "z.safetensors"} | dict.fromkeys(tensors, "a.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file({**tensors, name: head}, whole, {"format": "pt"})
    with pytest.warns(BrainWarning, match=r"lm_head.weight is stored .* tie_word_embeddings true"):
        checkpoint = open_folder(tmp_path, dtype=torch.float32)
    assert torch.equal(dequantize(checkpoint.weights.head), head.float())


def test_a_tied_matrix_may_be_stored_as_the_head(save_llama: SaveLlama, tmp_path: Path) -> None:
    state = save_llama(tmp_path, tie_word_embeddings=True)
    whole = tmp_path / "model.safetensors"
    rewrite(whole, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert said_of(tmp_path) == []
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)


def test_other_heads_are_not_used(save_llama: SaveLlama, tmp_path: Path) -> None:
    state = save_llama(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda t: t.update({"score.weight": torch.ones(2)}))
    (line,) = said_of(tmp_path)
    assert "tensor score.weight is no part of the model in config.json" in line
    assert_same(open_folder(tmp_path, dtype=torch.float32).weights, state, tmp_path)
