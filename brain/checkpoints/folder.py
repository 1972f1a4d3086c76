"""Models in a local Hugging Face folder: config.json, safetensors shards and a tokenizer."""

import os
from collections import Counter
from collections.abc import Container
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.hf_config import CONVERTED_FROM, read_config, read_settings
from brain.checkpoints.packing import load_weights
from brain.checkpoints.safetensors_file import TensorFile
from brain.checkpoints.stored import Stored, model_tensors
from brain.errors import Refused, one_line, shown, warn
from brain.files import TOKENIZER_BYTES, read_json
from brain.machine.integrity import files_sha256
from brain.machine.memory import give_back_freed
from brain.tokens import load_tokenizer
from compiled.llama import LlamaConfig
from conf.schema import WeightFormat

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
EXPLICIT = "transformers_weights"  # in config.json: the weight file, or its index


def open_folder(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    weights: WeightFormat = WeightFormat.model,
    blocks: bool = False,
    name: str | None = None,
) -> Checkpoint:
    """Loads a folder of config.json, safetensors files and a tokenizer. Raises Refused, before
    memory is allocated for weights, where one is missing, malformed or not supported. ``dtype`` is
    float32, bfloat16 or float16, whatever the files hold; ``weights`` and ``blocks`` say what
    becomes of matrices, as in ``load_weights``.
    ``name`` is for people; None: the folder's.
    """
    path = Path(path)
    if not path.is_dir():
        raise Refused(f"{path}: no such folder; give the folder that holds config.json")
    model = stored_model(path)
    tokenizer = load_tokenizer(path)
    give_back_freed()  # before weights are allocated above it
    loaded = load_weights(
        model.config,
        model.tensors,
        dtype=dtype,
        device=torch.device(device),
        weights=weights,
        blocks=blocks,
    )
    return Checkpoint(
        name=name or path.resolve().name,
        config=model.config,
        weights=loaded,
        tokenizer=tokenizer,
        hash_weights=lambda: files_sha256(model.paths, progress=True),
    )


def folder_format(folder: Path) -> str:
    """The number format of the most numbers in a folder's weights: that of the file which they were
    converted from, where config.json says so. Raises Refused where the files cannot be read.
    """
    converted = read_settings(folder / CONFIG).get(CONVERTED_FROM)
    if isinstance(converted, str):
        return converted
    numbers: Counter[str] = Counter()
    for name in weight_files(folder).names:
        for entry in TensorFile(folder / name).entries.values():
            numbers[entry.dtype] += prod(entry.shape)
    return max(numbers, key=numbers.__getitem__, default="F32")


class StoredModel(NamedTuple):
    """A folder's model as it lies in its files: checked, and nothing of it in memory."""

    config: LlamaConfig
    tensors: dict[str, Stored]  # by the names in ``llama_names``
    paths: list[Path]


def stored_model(folder: Path) -> StoredModel:
    """The model of a folder. Raises Refused where it is malformed or not supported."""
    config = read_config(folder / CONFIG)
    if (folder / ADAPTER).exists():
        raise Refused(
            f"{folder / ADAPTER}: an adapter changes the weights that {CONFIG} describes; "
            "merge it into them, or remove it"
        )
    named_by, names, weight_map, unused = weight_files(folder)
    for name in names:
        if not os.path.exists(folder / name):  # also false for an impossible file name
            raise Refused(f"{named_by}: {name} is missing from {folder}; fetch it")
    for name in unused:
        warn(f"{folder}: {name} is overruled by {' and '.join(names)}, as in transformers")
    paths = [folder / name for name in names]
    config, tensors = model_tensors(config, [TensorFile(path) for path in paths], weight_map)
    return StoredModel(config, tensors, paths)


class WeightFiles(NamedTuple):
    """Which files of a folder hold its weights, whether they are there or not."""

    named_by: Path
    names: list[str]
    weight_map: dict[str, str]
    """What the index says about who holds which tensor; empty without one."""
    unused: list[str]
    """Files that name or hold weights too and do not count."""


def weight_files(folder: Path, listed: Container[str] | None = None) -> WeightFiles:
    """The weight files of a folder. ``transformers_weights`` in config.json names a file or an
    index; else the whole file counts, else the index. Raises Refused where there are none, or a
    name is not that of a safetensors file of the folder. ``listed``: what is to be there, where
    only config.json and the index are there so far.
    """

    def is_there(name: str) -> bool:
        return (folder / name).exists() if listed is None else name in listed

    named = read_settings(folder / CONFIG).get(EXPLICIT)
    if named is not None:
        _require_plain(named, (".safetensors", ".safetensors.index.json"), folder / CONFIG)
    there = [name for name in (SINGLE, INDEX) if is_there(name)]
    order = list(dict.fromkeys([named, *there] if named is not None else there))
    if not order:
        raise Refused(f"{folder}: no weights; put {SINGLE} or {INDEX} with its shards there")
    chosen, *unused = order
    if not chosen.endswith(".json") or not is_there(chosen):
        if INDEX in unused and set(_weight_map(folder / INDEX).values()) == {chosen}:
            unused.remove(INDEX)
        named_by = folder if named is None else folder / CONFIG
        return WeightFiles(named_by, [chosen], {}, unused)
    weight_map = _weight_map(folder / chosen)
    return WeightFiles(folder / chosen, sorted(set(weight_map.values())), weight_map, unused)


def _weight_map(index: Path) -> dict[str, str]:
    """Which shard holds which tensor. Raises Refused."""
    try:
        shards = dict(read_json(index, TOKENIZER_BYTES)["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{index}: not a safetensors index ({one_line(error)}); expected a weight_map"
        ) from None
    if not shards:
        raise Refused(f"{index}: weight_map is empty; fetch the index again")
    for name in shards.values():
        _require_plain(name, (".safetensors",), index)
    return shards


def _require_plain(name: object, endings: tuple[str, ...], where: Path) -> None:
    """Refuses what is not the name of such a file in the same folder."""
    plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
    if not plain or not str(name).endswith(endings):
        raise Refused(f"{where}: weight file {shown(name)} is not a plain *{endings[0]} file name")
