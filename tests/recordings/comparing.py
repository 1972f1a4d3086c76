"""What differs between two recordings, and where."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contents import CONTINUED, STAGES, part_of

MANIFEST = "manifest.json"


def compare(a: Path, b: Path, only: Sequence[str]) -> bool:
    """Prints what differs between two recordings; returns whether nothing does."""
    manifests = [json.loads((folder / MANIFEST).read_text("utf-8")) for folder in (a, b)]
    for folder, manifest in zip((a, b), manifests, strict=True):
        dirty = " with uncommitted changes" if manifest["uncommitted"] else ""
        print(f"{folder}: {manifest['kind']}, revision {manifest['revision'][:12]}{dirty}")
    for key in ("format", "versions", "machine"):
        if manifests[0][key] != manifests[1][key]:
            print(f"note: {key} differ: {manifests[0][key]} and {manifests[1][key]}")
    either = "continue" in (manifests[0]["kind"], manifests[1]["kind"])
    stages = (CONTINUED,) if either else STAGES
    equal = True
    sorted_out = [_by_scenario(manifest["items"], stages, only) for manifest in manifests]
    names = list(dict.fromkeys([*sorted_out[0], *sorted_out[1]]))
    for name in names:
        held = [found.get(name, {}) for found in sorted_out]
        if not held[0] or not held[1]:
            print(f"DIFFERENT {name}: only in {a if held[0] else b}")
            equal = False
            continue
        differing = [
            item
            for item in dict.fromkeys([*held[0], *held[1]])
            if held[0].get(item) != held[1].get(item)
        ]
        if not differing:
            print(f"equal     {name} ({len(held[0])} items)")
            continue
        equal = False
        print(f"DIFFERENT {name}: {len(differing)} of {len(held[0])} items")
        for item in differing:
            if item in held[0] and item in held[1]:
                print(f"    {item}: {_difference(part_of(a, item), part_of(b, item))}")
            else:
                print(f"    {item}: only in {a if item in held[0] else b}")
    if not names:
        print("nothing to compare")
    print("everything is equal" if equal and names else "there are differences")
    return equal and bool(names)


def _by_scenario(
    found: Mapping[str, str], stages: Sequence[str], only: Sequence[str]
) -> dict[str, dict[str, str]]:
    """The items of some stages, by ``stage/scenario``."""
    sorted_out: dict[str, dict[str, str]] = {}
    for item, checksum in found.items():
        stage, name, _ = item.split("/", 2)
        if stage in stages and (not only or name in only):
            sorted_out.setdefault(f"{stage}/{name}", {})[item] = checksum
    return sorted_out


def _difference(a: bytes, b: bytes) -> str:
    """Where two contents begin to differ, in one line."""
    lines = a.split(b"\n"), b.split(b"\n")
    tensor = re.compile(rb"([A-Z]+[0-9]*) (\[[0-9, ]*\])")
    if tensor.fullmatch(lines[0][0]) and tensor.fullmatch(lines[1][0]):
        if lines[0][0] != lines[1][0]:
            return f"{lines[0][0].decode()} and {lines[1][0].decode()}"
        return _tensor_difference(lines[0][0].decode(), a, b)
    for number, (one, other) in enumerate(zip(*lines, strict=False), start=1):
        if one != other:
            return f"line {number}: {_shown(one, other)} and {_shown(other, one)}"
    return f"{len(lines[0])} and {len(lines[1])} lines, equal as far as both go"


def _shown(line: bytes, other: bytes) -> str:
    """A line around the place where it begins to differ from another one."""
    both = zip(line, other, strict=False)
    same = next((place for place, (one, two) in enumerate(both) if one != two), 0)
    begin = max(0, same - 40)
    return repr(line[begin : begin + 100].decode("utf-8", "replace"))


def _tensor_difference(told: str, a: bytes, b: bytes) -> str:
    """How many numbers of two tensors differ, and the first that does."""
    kind, _, shape = told.partition(" ")
    both = [_numbers(kind, content[len(told) + 1 :]) for content in (a, b)]
    raw = [content.view(f"u{content.itemsize}") for content in both]
    where = np.flatnonzero(raw[0] != raw[1])
    first = np.unravel_index(int(where[0]), json.loads(shape) or (1,))
    values = " and ".join(str(content[where[0]]) for content in both)
    index = [int(axis) for axis in first]
    return f"{told}: {len(where)} of {len(raw[0])} numbers, first at {index}: {values}"


def _numbers(kind: str, content: bytes) -> np.ndarray[Any, Any]:
    """The numbers of a tensor, flat. Those of bfloat16 are widened."""
    if kind == "BF16":
        wide = np.frombuffer(content, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32)
    names = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2"}
    return np.frombuffer(content, names.get(kind, "u1"))
