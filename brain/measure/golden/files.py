"""The golden file: NAME.safetensors with the numbers, NAME.json with what they are of."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from brain.errors import Refused, one_line, shown
from brain.files import RECORD_BYTES, open_plain, read_json
from brain.measure.golden.judge import Distance, Expected
from brain.measure.golden.script import Script, from_json, to_json

FORMAT = 1
MOST_BYTES = 1 << 30
MOST_ROWS = 1 << 32
_DTYPES = {"top_ids": torch.int32, "full_rows": torch.int32}


@dataclass(frozen=True)
class MemoryShape:
    """The memory a script needs, and the widths of reads it is run with in turn (eager only: a
    compiled engine has the widths it was given).
    """

    capacity: int
    smallest_bucket: int
    widths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Golden:
    """A script and what the reference makes of it."""

    name: str
    description: str
    model: str  # its name
    model_sha256: str
    script: Script
    memory: MemoryShape
    expected: Expected
    noise: dict[str, Distance]  # of the reference, by dtype
    provenance: dict[str, Any]


def golden_names(folder: Path) -> list[str]:
    """The goldens in a folder. Raises Refused where there are none."""
    if not folder.is_dir():
        raise Refused(
            f"{folder}: no such folder; set task.folder to the one with golden files (a clone of "
            "the repository has them in tests/golden)"
        )
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    if not names:
        raise Refused(f"{folder}: no golden files; task.write=true makes them")
    return names


def save_golden(golden: Golden, folder: Path) -> None:
    """Writes both files. Raises Refused where they cannot be written."""
    described = {
        "format": FORMAT,
        "description": golden.description,
        "model": {"name": golden.model, "sha256": golden.model_sha256},
        "made": golden.provenance,
        "noise": {name: noise.to_json() for name, noise in golden.noise.items()},
        "memory": vars(golden.memory),
        "script": to_json(golden.script),
    }
    tensors = {name: tensor.contiguous() for name, tensor in golden.expected._asdict().items()}
    try:
        save_file(tensors, folder / f"{golden.name}.safetensors")
        (folder / f"{golden.name}.json").write_text(_readable(described), "utf-8")
    except (OSError, SafetensorError) as error:
        raise Refused(f"{folder}: golden files cannot be written ({one_line(error)})") from None


def load_golden(folder: Path, name: str) -> Golden:
    """Reads both files. Raises Refused where they are missing, malformed or do not fit."""
    path = folder / f"{name}.json"
    try:
        described = read_json(path, RECORD_BYTES)
        if described["format"] != FORMAT:
            raise Refused(
                f"{path}: format {shown(described['format'])}, this program reads {FORMAT}"
            )
        tensors = _tensors(folder / f"{name}.safetensors")
        memory = described["memory"]
        golden = Golden(
            name=name,
            description=str(described["description"]),
            model=str(described["model"]["name"]),
            model_sha256=str(described["model"]["sha256"]),
            script=from_json(described["script"], str(path)),
            memory=MemoryShape(
                _count(memory["capacity"]),
                _count(memory["smallest_bucket"]),
                tuple(tuple(map(_count, widths)) for widths in memory["widths"]),
            ),
            expected=Expected(**tensors),
            noise={key: _distance(noise) for key, noise in described["noise"].items()},
            provenance=dict(described["made"]),
        )
    except Refused:
        raise
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError),
        *(MemoryError, RuntimeError, SafetensorError),
    ) as error:
        raise Refused(f"{path}: not a golden file ({one_line(error)}); write it again") from None
    _check_shapes(golden.expected, path)
    return golden


def _tensors(path: Path) -> dict[str, Tensor]:
    """What the file with the numbers holds. Raises OSError for one that is too large."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise OSError(f"{path.name} has {size} bytes, more than {MOST_BYTES}")
        return load_file(path)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value <= MOST_ROWS:
        raise ValueError(f"memory: {shown(value)} is not a number of rows")
    return value


def _distance(described: Any) -> Distance:
    if not all(type(number) in (int, float) for number in described.values()):
        raise TypeError("noise holds something else than numbers")
    return Distance(**described)


def _check_shapes(expected: Expected, path: Path) -> None:
    for name, tensor in expected._asdict().items():
        if tensor.dim() != (2 if name in ("top_ids", "top_logits", "full_logits") else 1):
            raise Refused(
                f"{path.with_suffix('.safetensors')}: {name} has {tensor.dim()} axes; "
                "write it again"
            )
    rows, full = len(expected.top_ids), len(expected.full_rows)
    shapes = {
        "top_ids": (rows, expected.top_ids.shape[-1]),
        "top_logits": (rows, expected.top_ids.shape[-1]),
        "logsumexp": (rows,),
        "full_rows": (full,),
        "full_logits": (full, expected.full_logits.shape[-1]),
        "surprises": (len(expected.surprises),),
    }
    for name, tensor in expected._asdict().items():
        wanted = _DTYPES.get(name, torch.float32)
        if tensor.shape != shapes[name] or tensor.dtype != wanted:
            raise Refused(
                f"{path.with_suffix('.safetensors')}: {name} is {tensor.dtype} "
                f"{list(tensor.shape)}, expected {wanted} {list(shapes[name])}; write it again"
            )
    indices = (
        ("top_ids", expected.top_ids, expected.full_logits.shape[-1]),
        ("full_rows", expected.full_rows, rows),
    )
    for name, numbers, end in indices:
        if ((numbers < 0) | (numbers >= end)).any():
            raise Refused(f"{path.with_suffix('.safetensors')}: {name} has an index out of range")


def _readable(described: dict[str, Any]) -> str:
    """JSON with a line for every key and every step of the script, and no line for every number."""

    def lines(value: Any, indent: str) -> str:
        if not isinstance(value, dict | list) or not any(
            isinstance(inner, dict | list) for inner in _values(value)
        ):
            return json.dumps(value, ensure_ascii=False)
        deeper = indent + "  "
        if isinstance(value, dict) and "do" not in value:
            items = [f"{json.dumps(key)}: {lines(inner, deeper)}" for key, inner in value.items()]
            return "{\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}}}"
        if isinstance(value, list) and isinstance(value[0], dict):
            return "[\n" + ",\n".join(deeper + lines(i, deeper) for i in value) + f"\n{indent}]"
        return json.dumps(value, ensure_ascii=False)

    return lines(described, "") + "\n"


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)
