"""What of a recording is compared: the parts of its files, without times, versions and paths."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

STAGES = RECORDED, CONTINUED = "recorded", "continued"
"""The folders of a recording: what was played, and what went on from there."""

BLANKED = {
    "run.json": ("seconds", "seconds_until_ready", "seconds_speaking", "torch", "python"),
    "brain.json": ("torch", "seal"),
    "graphs.json": ("seconds", "nodes"),
    "eval.json": ("ticks_per_second", "resident_mb", "torch"),
    "endurance.json": ("ticks_per_second", "resident_mb"),
}
"""Keys whose values depend on the time, the versions or the machine, by the name of their file."""
NAME_ONLY = ("hydra.yaml", "multirun.yaml", "endurance.png")
"""Files with paths or times in them, of which only the name is compared."""
_ROW_OF_GRAPHS = re.compile(rb"(?m)^(\S.*?\S +\d+) +[\d.]+ +\d+$")


def parts(path: Path) -> dict[str, bytes]:
    """What is compared of a file: its bytes, or several named parts of it."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return {f":{name}": part for name, part in _tensors(content).items()}
    if path.name in NAME_ONLY:
        return {"": b""}
    if path.name in BLANKED:
        keys = "|".join(BLANKED[path.name])
        content = re.sub(rf'("(?:{keys})": )[^\n,]+'.encode(), rb"\1*", content)
    if path.match("graphs/said/*.stdout"):
        content = _ROW_OF_GRAPHS.sub(rb"\1", content)
    return {"": content}


def _tensors(content: bytes) -> dict[str, bytes]:
    """Every tensor of a safetensors file: a line with its type and shape, and its bytes."""
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    found = {"metadata": json.dumps(header.pop("__metadata__", None), sort_keys=True).encode()}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        told = f"{entry['dtype']} {entry['shape']}\n".encode()
        found[f"tensor {name}"] = told + content[begin:end]
    return found


def items(out: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Everything that is compared of the scenarios of these names, by its own name."""
    for folder in (out / stage / name for name in names for stage in STAGES):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                for within, part in parts(path).items():
                    yield f"{path.relative_to(out)}{within}", part


def part_of(out: Path, item: str) -> bytes:
    """An item's content. A part of a file is named behind a colon."""
    if (out / item).is_file():
        return parts(out / item)[""]
    path, _, name = item.partition(".safetensors:")
    return parts(out / f"{path}.safetensors")[f":{name}"]
