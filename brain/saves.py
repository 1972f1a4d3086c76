"""Saving a whole brain into a folder, and loading it back to the exact next token.

A save holds the occupied rows of every state tensor in slot order, the cursor, the counters and
the configuration, as one safetensors and one JSON file, which knows the checksum of the other. It
is written under a temporary name, forced to the disk and renamed, and everything in it is checked
before a brain is made of it.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from brain.brain import Brain
from brain.config.compose import typed
from brain.config.older import add_unsaid
from brain.config.overrides import literal
from brain.errors import Refused, one_line, shown
from brain.files import RECORD_BYTES, given_path, open_plain, read_json
from brain.machine.digest import file_sha256
from brain.mirror import SOURCES
from brain.opening import open_brain
from compiled.state import NOWHERE, Cursor, state_bytes
from conf.schema import Conf, register

FORMAT = 3
TENSORS, DESCRIPTION = "state.safetensors", "brain.json"
MOST_TICKS = 1 << 52
"""No run comes so far, and numbers below it are exact everywhere."""
UNREADABLE = (OSError, MemoryError, RuntimeError, SafetensorError)
"""What becomes of a file that is no safetensors file, or cannot be mapped."""
LONGEST_CHARACTER = 4
"""Bytes of UTF-8."""
MOST_SLOTS = 1 << 40
MOST_BESIDES = 1 << 20
"""Bytes of a save beside its rows: header and cursor."""
_ROW_AXIS = {"keys": 2, "values": 2}


class OtherWeights(Refused):
    """The save is of another model."""


def save(brain: Brain, folder: str | Path, notes: Any = None) -> None:
    """Writes the brain to a folder, replacing a save that is already there. ``notes`` (plain JSON)
    are kept with it, for whoever saves.

    Raises Refused if the folder holds anything else, or cannot be written.
    """
    folder = given_path(folder)
    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise Refused(f"{folder} exists and is not a save: choose another folder")
    slots = torch.nonzero(brain.state.valid)[:, 0]
    tensors = {
        name: tensor.index_select(_ROW_AXIS.get(name, 0), slots).cpu().contiguous()
        for name, tensor in brain.state._asdict().items()
        if name != "valid"
    }
    tensors["slot"] = slots.cpu()
    tensors |= {
        f"cursor.{name}": tensor.cpu().clone() for name, tensor in brain.cursor._asdict().items()
    }
    description = {
        "format": FORMAT,
        "model_sha256": brain.checkpoint.sha256,
        "torch": torch.__version__,
        "high_water": brain.memory.account.high_water,
        "unfinished": brain.unfinished.hex(),
        "conf": plain(dataclasses.asdict(brain.settings.conf)),
        "notes": notes,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(tensors, scratch / TENSORS)
            description["sha256"] = file_sha256(scratch / TENSORS)
            text = json.dumps(sealed(description), indent=2)
            (scratch / DESCRIPTION).write_text(text + "\n", "utf-8")
            for written in (scratch / TENSORS, scratch / DESCRIPTION, scratch):
                to_disk(written)
            if folder.exists():
                replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
                folder.rename(replaced / "old")
                scratch.rename(folder)
                shutil.rmtree(replaced)
            else:
                scratch.rename(folder)
            to_disk(folder.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{folder} cannot be written ({one_line(error)})") from None


def load(folder: str | Path, *, capacity: int | None = None) -> Brain:
    """The brain that was saved there: its next tick is the same token.

    With ``capacity`` its memory gets another size, and the rows other slots where they need them.
    Raises Refused if the save is damaged, is of another model than can be found now, or holds more
    rows than would fit.
    """
    folder = given_path(folder)
    description = _description(folder)
    conf = _conf(description.get("conf"), folder)
    if capacity is not None:
        conf = dataclasses.replace(conf, capacity=capacity)
    brain = open_brain(conf)
    _restore(brain, folder, description)
    return brain


def restore(brain: Brain, folder: Path) -> Any:
    """Makes an open brain the one that was saved, and returns the notes kept with it.

    Its settings stay its own. Raises Refused, with nothing changed, as ``load`` does; OtherWeights
    if that is why.
    """
    description = _description(folder)
    _restore(brain, folder, description)
    return description.get("notes")


def _restore(brain: Brain, folder: Path, description: dict[str, Any]) -> None:
    if description.get("model_sha256") != brain.checkpoint.sha256:
        raise OtherWeights(f"{folder} was saved with other weights of {brain.checkpoint.name}")
    _check_sizes(folder / TENSORS, brain)
    _check_sum(folder / TENSORS, description.get("sha256"))
    rows, cursor = _tensors(folder, brain)
    slot, high_water = rows["slot"], description.get("high_water")
    occupied = int(slot[-1]) + 1 if len(slot) else 0
    if len(slot) > brain.capacity:
        raise Refused(f"{folder} holds {len(slot)} rows but capacity is {brain.capacity}")
    if type(high_water) is not int or high_water < occupied:
        raise Refused(f"{folder}: high_water {shown(high_water)} is below {occupied}")
    pinned, most = int(rows["pinned"].sum()), brain.most_pinned
    if pinned > most:
        raise Refused(
            f"{folder} holds {pinned} pinned rows, but of {brain.capacity} no more than {most} may "
            "be: give a larger capacity"
        )
    if max(high_water, occupied) > brain.capacity:  # of a larger memory
        rows["slot"], high_water = torch.arange(len(slot)), len(slot)
    try:
        unfinished = bytes.fromhex(description["unfinished"])
    except (KeyError, TypeError, ValueError):
        raise Refused(f"{folder}: unfinished is not a string of hex digits") from None
    if len(unfinished) > LONGEST_CHARACTER:
        raise Refused(f"{folder}: unfinished is longer than any character")
    brain.restore(rows, cursor, high_water, unfinished)


def _check_sizes(path: Path, brain: Brain) -> None:
    """Refuses a file that holds more than the memory would, before it is read."""
    try:
        with open_plain(path), safe_open(path, "pt") as file:
            rows = file.get_slice("slot").get_shape()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({one_line(error)})") from None
    except UNREADABLE as error:
        raise Refused(f"{path} is damaged ({one_line(error)})") from None
    if len(rows) != 1:
        raise Refused(f"{path}: tensor slot is missing or malformed")
    if rows[0] > brain.capacity:
        raise Refused(f"{path.parent} holds {rows[0]} rows but capacity is {brain.capacity}")
    most = state_bytes(brain.checkpoint.config, rows[0], brain.state.keys.dtype)
    if path.stat().st_size > most + 8 * rows[0] + MOST_BESIDES:
        raise Refused(f"{path} is larger than {rows[0]} rows can be")


def _check_sum(path: Path, expected: Any) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({one_line(error)})") from None
    if found != expected:
        raise Refused(f"{path} is damaged: its SHA-256 is not the one that was written down")


def to_disk(path: Path) -> None:
    """Waits until a file, or what a folder lists, would survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be synchronised there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _description(folder: Path) -> dict[str, Any]:
    try:
        description = read_json(folder / DESCRIPTION, RECORD_BYTES)
    except (OSError, ValueError) as error:
        raise Refused(f"{folder} is not a save ({one_line(error)})") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise Refused(f"{folder} is not a save of format {FORMAT}")
    try:
        seal = sealed(description)["seal"]
    except (ValueError, RecursionError):
        seal = None
    if seal is None or seal != description.get("seal"):
        raise Refused(f"{folder / DESCRIPTION} is damaged: its seal is not that of its content")
    return description


def sealed(description: dict[str, Any]) -> dict[str, Any]:
    """The description with a checksum of everything else in it."""
    content = {key: value for key, value in description.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def _conf(saved: Any, folder: Path) -> Conf:
    register()
    try:
        if not isinstance(saved, dict):
            raise TypeError("it is none")
        # Text is text: what looks like an interpolation would be given the environment to read.
        told = {str(key): literal(value) for key, value in saved.items()}
        add_unsaid(told)
        task = told.pop("task", None)
        conf = OmegaConf.merge(OmegaConf.structured(Conf), told, {"task": task})
        return typed(conf)  # type: ignore[arg-type]
    except (
        OmegaConfBaseException,
        ValueError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise Refused(f"{folder}: its configuration is damaged ({one_line(error)})") from None


def _tensors(folder: Path, brain: Brain) -> tuple[dict[str, Tensor], Cursor]:
    """The saved rows and cursor, checked against the brain's own tensors."""
    where = folder / TENSORS
    try:
        with safe_open(where, "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        raise Refused(f"{where} is damaged ({one_line(error)})") from None
    slot = saved.pop("slot", None)
    if slot is None or slot.dtype != torch.int64 or slot.dim() != 1:
        raise Refused(f"{where}: tensor slot is missing or malformed")
    if len(slot) and (slot.min() < 0 or slot.max() >= MOST_SLOTS or (slot.diff() <= 0).any()):
        raise Refused(f"{where}: slots do not ascend")
    rows = {"slot": slot}
    for name, held in brain.state._asdict().items():
        if name != "valid":
            shape = list(held.shape)
            shape[_ROW_AXIS.get(name, 0)] = len(slot)
            rows[name] = _checked(saved.pop(name, None), shape, held.dtype, f"{where}: {name}")
    cursor = Cursor(
        *(
            _checked(
                saved.pop(f"cursor.{name}", None), held.shape, held.dtype, f"{where}: cursor.{name}"
            )
            for name, held in brain.cursor._asdict().items()
        )
    )
    if saved:
        raise Refused(f"{where}: unexpected tensor {sorted(saved)[0]}")
    vocab_size = brain.checkpoint.config.vocab_size
    for name, ids in (("token_id", rows["token_id"]), ("cursor.token", cursor.token)):
        if ((ids < 0) | (ids >= vocab_size)).any():
            raise Refused(f"{where}: {name} has ids outside the vocabulary")
    positions = rows["position"]
    if (positions < 0).any() or len(positions.unique()) != len(positions):
        raise Refused(f"{where}: positions are negative or not unique")
    if cursor.position[0] < NOWHERE or (len(slot) and cursor.position[0] == NOWHERE):
        raise Refused(f"{where}: cursor.position is damaged")
    _check_columns(rows, cursor, where)
    return rows, cursor


def _check_columns(rows: dict[str, Tensor], cursor: Cursor, where: Path) -> None:
    """Refuses numbers that no run could have come to: counting on from them would overflow."""
    tick = int(cursor.tick)
    if not 0 <= tick < MOST_TICKS:
        raise Refused(f"{where}: cursor.tick is damaged")
    if int(cursor.uncommitted) not in (0, 1):
        raise Refused(f"{where}: cursor.uncommitted is damaged")
    positions, last = rows["position"], int(cursor.position[0])
    if last >= MOST_TICKS or (positions > last).any():
        raise Refused(f"{where}: positions are past the cursor's")
    for name in ("born", "lit"):
        if ((rows[name] < 0) | (rows[name] > tick)).any():
            raise Refused(f"{where}: {name} is no tick that has been")
    for name, sources in (("source", rows["source"]), ("cursor.source", cursor.source)):
        if (sources >= len(SOURCES)).any():
            raise Refused(f"{where}: {name} is of no known source")
    floats = {name: rows[name] for name in ("brightness", "surprise", "novelty")}
    floats |= {"cursor.surprise": cursor.surprise, "cursor.novelty": cursor.novelty}
    for name, numbers in floats.items():
        if numbers.isnan().any():
            raise Refused(f"{where}: {name} holds what is no number")


def _checked(tensor: Tensor | None, shape: Any, dtype: torch.dtype, what: str) -> Tensor:
    if tensor is None:
        raise Refused(f"{what} is missing")
    if list(tensor.shape) != list(shape) or tensor.dtype != dtype:
        raise Refused(
            f"{what} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
        )
    return tensor


def plain(value: Any) -> Any:
    """Enums as their names, so that JSON can hold the configuration."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value
