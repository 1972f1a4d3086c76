"""Models in a local Hugging Face folder: config.json, safetensors shards and a tokenizer."""

import os
from pathlib import Path

import torch

from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.hf_config import read_config
from brain.checkpoints.packing import load_weights
from brain.checkpoints.safetensors_file import TensorFile
from brain.errors import Refused, one_line, shown
from brain.files import TOKENIZER_BYTES, read_json
from brain.machine.integrity import files_sha256
from brain.machine.memory import give_back_freed
from brain.tokens import load_tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_folder(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    int8: bool = False,
    name: str | None = None,
) -> Checkpoint:
    """Loads a folder of config.json, safetensors files and a tokenizer. Raises Refused, before
    memory is allocated for weights, where one is missing, malformed or not supported. ``dtype`` is
    float32, bfloat16 or float16, whatever the files hold. ``int8`` rounds matrices to eight bits.
    ``name`` is for people; None: the folder's.
    """
    path = Path(path)
    if not path.is_dir():
        raise Refused(f"{path}: no such folder; give the folder that holds config.json")
    config = read_config(path / "config.json")
    tokenizer = load_tokenizer(path)
    give_back_freed()  # before weights are allocated above it
    paths = weight_files(path)
    files = [TensorFile(file) for file in paths]
    weights = load_weights(config, files, dtype=dtype, device=torch.device(device), int8=int8)
    return Checkpoint(
        name=name or path.resolve().name,
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        hash_weights=lambda: files_sha256(paths, progress=True),
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, from its index where it has one. Raises Refused where
    there are none, or the index names anything but files of the folder.
    """
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        raise Refused(f"{folder}: no weights; put {SINGLE} or {INDEX} with its shards there")
    try:
        names = set(read_json(index, TOKENIZER_BYTES)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{index}: not a safetensors index ({one_line(error)}); expected a weight_map"
        ) from None
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise Refused(
                f"{index}: shard name {shown(name)} is not a plain *.safetensors file name"
            )
        if not os.path.exists(folder / name):  # also false for an impossible file name
            raise Refused(f"{index}: shard {name} is missing from {folder}; fetch it")
    if not names:
        raise Refused(f"{index}: weight_map is empty; fetch the index again")
    return [folder / name for name in sorted(names)]
