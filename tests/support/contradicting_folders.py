"""Model folders that say one thing in two places, with different values, from seeds.

``python tests/support/contradicting_folders.py --folders 2000`` tries as many and prints every one
whose logits are not those of transformers though no line names both places.
"""

import argparse
import importlib
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from brain.checkpoints.folder import stored_model
from brain.checkpoints.packing import load_weights
from brain.errors import Refused
from compiled.read import read
from compiled.state import allocate_state

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
IDS = torch.tensor([5, 60, 7, 33, 9, 12, 41, 5, 60, 2, 28, 17] * 4)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
Tensors = dict[str, Tensor]


@cache
def weights() -> Tensors:
    """The tensors of a model like ``CONFIG``."""
    generator = torch.Generator().manual_seed(0)
    tensors = {EMBEDDING: (64, 32), HEAD: (64, 32), NORM: (32,)}
    for layer in range(2):
        for name, shape in {
            **{"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32)},
            **{"self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32)},
            **{"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)},
            **{"input_layernorm": (32,), "post_attention_layernorm": (32,)},
        }.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = shape
    return {name: 0.4 * torch.randn(at, generator=generator) for name, at in tensors.items()}


@dataclass
class Folder:
    """A model folder before it is written."""

    draw: random.Random
    config: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(CONFIG)))
    files: dict[str, Tensors] = field(default_factory=lambda: {WHOLE: dict(weights())})
    weight_map: dict[str, str] | None = None
    others: dict[str, str] = field(default_factory=dict)
    told: list[tuple[str, str]] = field(default_factory=list)
    """The two places of every contradiction: words that a line about it has."""

    def holder(self, name: str) -> Tensors | None:
        """The tensors of the file that has this one."""
        return next((tensors for tensors in self.files.values() if name in tensors), None)

    def another(self, like: str) -> Tensor:
        """Other numbers in the shape of a tensor."""
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 30))
        return 0.4 * torch.randn(weights()[like].shape, generator=generator)

    def write(self, path: Path) -> None:
        """Writes it into an empty folder."""
        (path / "config.json").write_text(json.dumps(self.config))
        for name, tensors in self.files.items():
            copied = {key: tensor.clone() for key, tensor in tensors.items()}
            save_file(copied, path / name, metadata={"format": "pt"})
        if self.weight_map is not None:
            index = {"metadata": {}, "weight_map": self.weight_map}
            (path / INDEX).write_text(json.dumps(index))
        for name, text in self.others.items():
            (path / name).write_text(text)


# What two places may disagree on ---------------------------------------------------------------


def classes(folder: Folder) -> tuple[str, str]:
    folder.config["architectures"] = folder.draw.choice(
        [["LlamaForSequenceClassification"], ["LlamaModel"], ["Qwen2ForCausalLM"], "MistralModel"]
    )
    return "architectures", "model_type"


def code(folder: Folder) -> tuple[str, str]:
    folder.config["auto_map"] = {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}
    return "auto_map", "model_type"


def other_family(folder: Folder) -> tuple[str, str]:
    folder.config["model_type"] = folder.draw.choice(["mistral", "qwen2"])
    if folder.draw.random() < 0.7:
        folder.config["sliding_window"] = None
    return "model_type", ""


def table(draw: random.Random) -> dict[str, Any]:
    """RoPE parameters."""
    kind = draw.choice(["default", "linear", "linear", "llama3", "llama3", "yarn", "dynamic"])
    made: dict[str, Any] = {draw.choice(["rope_type", "type"]): kind}
    if kind != "default":
        made["factor"] = draw.choice([2.0, 4, 8.0])
    if kind == "llama3":
        made |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("llama3", "yarn") and draw.random() < 0.7:
        made["original_max_position_embeddings"] = draw.choice([16, 64, 128])
    if draw.random() < 0.5:
        made["rope_theta"] = draw.choice([500.0, 10000.0, 1e6])
    return made


def the_table(folder: Folder) -> tuple[str, dict[str, Any]]:
    """A table of RoPE parameters in the config, made if there is none, and its key."""
    for key in ("rope_scaling", "rope_parameters"):
        if folder.config.get(key):
            return key, folder.config[key]
    key = folder.draw.choice(["rope_scaling", "rope_parameters"])
    folder.config[key] = table(folder.draw)
    return key, folder.config[key]


def rope_tables(folder: Folder) -> tuple[str, str]:
    one = other = table(folder.draw)
    while list(other.values()) == list(one.values()):  # their keys may be spelt differently
        other = table(folder.draw)
    folder.config |= {"rope_scaling": one, "rope_parameters": other}
    return "rope_scaling", "rope_parameters"


def rope_bases(folder: Folder) -> tuple[str, str]:
    key, inner = the_table(folder)
    inner["rope_theta"], folder.config["rope_theta"] = folder.draw.sample([500.0, 1e4, 1e6], 2)
    return f"{key}.rope_theta", "; rope_theta"


def rope_kinds(folder: Folder) -> tuple[str, str]:
    key, inner = the_table(folder)
    inner |= {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    inner["rope_type"], inner["type"] = folder.draw.sample(["default", "linear", "llama3"], 2)
    return f"{key}.rope_type", f"{key}.type"


def trained_lengths(folder: Folder) -> tuple[str, str]:
    key, inner = the_table(folder)
    inner.pop("type", None)
    inner |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    name = "original_max_position_embeddings"
    inner[name], folder.config[name] = folder.draw.sample([16, 32, 64, 128], 2)
    return f"{key}.{name}", f"{name} {folder.config[name]} counts"


def rotated_parts(folder: Folder) -> tuple[str, str]:
    key, inner = the_table(folder)
    name = "partial_rotary_factor"
    inner[name], folder.config[name] = folder.draw.sample([0.25, 0.5, 1.0], 2)
    return f"{key}.{name}", f"; {name}"


def frequencies(folder: Folder) -> tuple[str, str]:
    name = f"model.layers.{folder.draw.randrange(2)}.self_attn.rotary_emb.inv_freq"
    base = folder.draw.choice([10000.0, 300.0])
    next(iter(folder.files.values()))[name] = base ** -(torch.arange(0, 8, 2) / 8)
    return "inv_freq", "rope_theta"


def other_head(folder: Folder) -> tuple[str, str]:
    folder.config["tie_word_embeddings"] = True
    (folder.holder(HEAD) or next(iter(folder.files.values())))[HEAD] = folder.another(HEAD)
    return "tie_word_embeddings", HEAD


def head_alone(folder: Folder) -> tuple[str, str]:
    holder = folder.holder(EMBEDDING)
    if holder is not None:
        head = holder.pop(EMBEDDING)
        (folder.holder(HEAD) or holder)[HEAD] = head
    folder.config["tie_word_embeddings"] = folder.draw.random() < 0.8
    return ".weight", "config.json"


def no_head(folder: Folder) -> tuple[str, str]:
    holder = folder.holder(HEAD)
    if holder is not None:
        del holder[HEAD]
    folder.config["tie_word_embeddings"] = folder.draw.random() < 0.5
    return HEAD, "tie_word_embeddings"


def tie_said_twice(folder: Folder) -> tuple[str, str]:
    folder.config["tie_word_embeddings"] = not folder.config["tie_word_embeddings"]
    return HEAD, "tie_word_embeddings"


def whole_and_index(folder: Folder) -> tuple[str, str]:
    merged = {name: tensor for tensors in folder.files.values() for name, tensor in tensors.items()}
    shard(folder)
    folder.files[WHOLE] = {**merged, NORM: folder.another(NORM)}
    return WHOLE, INDEX


def named_file(folder: Folder) -> tuple[str, str]:
    merged = {name: tensor for tensors in folder.files.values() for name, tensor in tensors.items()}
    folder.files["chosen.safetensors"] = {**merged, NORM: folder.another(NORM)}
    folder.config["transformers_weights"] = "chosen.safetensors"
    return "chosen.safetensors", INDEX if WHOLE not in folder.files else WHOLE


def two_shards(folder: Folder) -> tuple[str, str]:
    shard(folder)
    name = folder.draw.choice(sorted(folder.weight_map or {}))
    like = name if name in weights() else f"model.{name}"
    if like not in weights():
        name = like = NORM
    for tensors in folder.files.values():
        tensors[name] = folder.another(like)
    return min(folder.files), max(folder.files)


def wrong_shard(folder: Folder) -> tuple[str, str]:
    shard(folder)
    assert folder.weight_map is not None
    name = folder.draw.choice(sorted(folder.weight_map))
    shards = sorted(set(folder.weight_map.values()) - {folder.weight_map[name]})
    if shards:
        folder.weight_map[name] = folder.draw.choice(shards)
    return name, "index"


def spellings(folder: Folder) -> tuple[str, str]:
    name = folder.draw.choice(sorted(set(weights()) - {HEAD}))
    other = name.removeprefix("model.") if folder.draw.random() < 0.6 else f"model.{name}"
    next(iter(folder.files.values()))[other] = folder.another(name)
    return name, other


def layers(folder: Folder) -> tuple[str, str]:
    folder.config["num_hidden_layers"] = folder.draw.choice([1, 3])
    return "layers.", "config.json"


def shapes(folder: Folder) -> tuple[str, str]:
    key, value = folder.draw.choice(
        [
            *(("num_key_value_heads", 4), ("num_key_value_heads", 1), ("head_dim", 16)),
            *(("vocab_size", 63), ("vocab_size", 65), ("intermediate_size", 40)),
            *(("hidden_size", 64), ("num_attention_heads", 8), ("num_key_value_heads", None)),
        ]
    )
    folder.config[key] = value
    return "tensor ", "head_dim" if key == "num_attention_heads" else key


def biases(folder: Folder) -> tuple[str, str]:
    folder.config["attention_bias"] = folder.draw.random() < 0.5
    name = "model.layers.0.self_attn.q_proj.bias"
    (folder.holder(NORM) or next(iter(folder.files.values())))[name] = torch.ones(32)
    return "bias", "config.json"


def third_head(folder: Folder) -> tuple[str, str]:
    name = folder.draw.choice(["score.weight", "v_head.summary.weight", "qa_outputs.bias"])
    next(iter(folder.files.values()))[name] = torch.ones(3)
    return name, "config.json"


def adapter(folder: Folder) -> tuple[str, str]:
    folder.others["adapter_config.json"] = '{"base_model_name_or_path": "a/b", "peft_type": "LORA"}'
    return "adapter_config.json", "config.json"


def unlike_layers(folder: Folder) -> tuple[str, str]:
    key, value = folder.draw.choice(
        [
            ("per_layer_config", {"0": {"rms_norm_eps": 2.0}}),
            ("layer_types", ["sliding_attention", "full_attention"]),
            ("layer_types", ["full_attention", "full_attention"]),
            ("is_causal", False),
            ("sliding_window", 8),
            ("hidden_act", "gelu"),
            ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ]
    )
    folder.config[key] = value
    return key, "config.json"


def formats(folder: Folder) -> tuple[str, str]:
    folder.config["torch_dtype"] = folder.draw.choice(["float16", "bfloat16"])
    holder = folder.holder(NORM)
    if holder is not None:
        holder[NORM] = holder[NORM].to(folder.draw.choice([torch.bfloat16, torch.float16]))
    return "dtype", "config.json"


CONTRADICTIONS: list[Callable[[Folder], tuple[str, str]]] = [
    *(classes, code, other_family, rope_tables, rope_tables, rope_bases, rope_kinds),
    *(trained_lengths, rotated_parts, frequencies, other_head, head_alone, no_head),
    *(tie_said_twice, whole_and_index, named_file, two_shards, wrong_shard, spellings, layers),
    *(shapes, biases, third_head, adapter, unlike_layers, formats),
]


# What a folder may be like before that -----------------------------------------------------------


def shard(folder: Folder) -> None:
    """Cuts the whole file into shards of any name, with an index."""
    if folder.weight_map is not None or WHOLE not in folder.files:
        return
    tensors = folder.files.pop(WHOLE)
    names = folder.draw.sample(["a", "b.1", "model-00001-of-00002", "pytorch_model-2", "Z"], 3)
    folder.weight_map = {name: f"{folder.draw.choice(names)}.safetensors" for name in tensors}
    for name, file in folder.weight_map.items():
        folder.files.setdefault(file, {})[name] = tensors[name]


def folder_of(seed: int) -> Folder:
    """A folder with one contradiction, or two."""
    draw = random.Random(seed)
    folder = Folder(draw)
    if draw.random() < 0.3:
        folder.config["tie_word_embeddings"] = True
        del folder.files[WHOLE][HEAD]
    if draw.random() < 0.3:  # as transformers wrote it before version 5
        folder.config["rope_theta"] = folder.config.pop("rope_parameters")["rope_theta"]
    if draw.random() < 0.2:  # as a model without a head is written
        plain = {name.removeprefix("model."): at for name, at in folder.files[WHOLE].items()}
        folder.files[WHOLE] = plain
    if draw.random() < 0.3:
        shard(folder)
    first = CONTRADICTIONS[seed % len(CONTRADICTIONS)]
    chosen = [first, *draw.sample(CONTRADICTIONS, draw.choice([0, 0, 1]))]
    folder.told = [contradict(folder) for contradict in chosen]
    return folder


# What becomes of it ----------------------------------------------------------------------------


def our_logits(path: Path) -> tuple[Tensor | None, list[str]]:
    """[T, vocab], or None where it is refused; and the lines that were said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refusal, logits = [], None
        try:
            config, tensors, _ = stored_model(path)
            cpu = torch.device("cpu")
            loaded = load_weights(config, tensors, dtype=torch.float32, device=cpu)
            state = allocate_state(config, 1, torch.float32, cpu)
            count = torch.tensor(len(IDS))
            positions = torch.arange(len(IDS))
            logits = read(config, loaded, state, IDS, positions, count, bucket=1).logits
        except Refused as error:
            refusal = [str(error)]
    return logits, [str(warning.message) for warning in caught] + refusal


def their_logits(path: Path) -> Tensor | None:
    """[T, vocab] of transformers, or None where it raises."""
    library: Any = importlib.import_module("transformers")
    chatter = library.utils.logging
    chatter.set_verbosity(chatter.CRITICAL)
    chatter.disable_progress_bar()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            logits: Tensor = model.eval()(IDS[None]).logits[0]
            return logits
    except Exception:
        return None


SAME, REFUSED, THEIRS_FAILS = "same logits", "refused", "loads where transformers does not"


def outcome(folder: Folder, path: Path) -> str:
    """How a folder is read: one of the words above, or else what is wrong. Writes it."""
    folder.write(path)
    (ours, lines), theirs = our_logits(path), their_logits(path)
    named = any(all(place in line for place in places) for line in lines for places in folder.told)
    if ours is not None and theirs is not None:
        off = (ours - theirs).abs().max().item()
        return SAME if off < 2e-3 else f"logits off by {off:.2g}, said: {lines}"
    if not named:
        return f"ours {'is refused' if ours is None else 'loads'}, no line names both: {lines}"
    return REFUSED if ours is None else THEIRS_FAILS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    for seed in range(arguments.first, arguments.first + arguments.folders):
        folder, path = folder_of(seed), Path(tempfile.mkdtemp(prefix="contradiction-"))
        result = outcome(folder, path)
        shutil.rmtree(path)
        if result in (SAME, REFUSED, THEIRS_FAILS):
            outcomes[result] += 1
        else:
            outcomes["wrong"] += 1
            print(f"{seed} {folder.told}: {result}", flush=True)
    print(dict(outcomes))
    return 1 if outcomes["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
