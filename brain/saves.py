"""A whole brain as a folder: what is in it, and proof that it is what was written.

A save holds the occupied rows of every state tensor in slot order, the cursor, the counters and
the configuration, as one safetensors file and one JSON file. The JSON holds the SHA-256 of the
other file and of itself. Both are written under a temporary name, forced to the disk and renamed.
Everything is checked before it is returned. This module moves values between memory and disk and
knows no Brain.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from brain.checkpoints import Checkpoint
from brain.errors import Refused, one_line, shown
from brain.files import RECORD_BYTES, given_path, open_plain, read_json
from brain.machine.integrity import file_sha256, to_disk
from brain.mirror import SOURCES
from compiled.state import COLUMNS, NOWHERE, ROW_COLUMNS, Cursor, State, state_bytes
from conf.schema import Conf

FORMAT = 3
TENSORS, DESCRIPTION = "state.safetensors", "brain.json"
MOST_TICKS = 1 << 52  # no run gets this far, and numbers below it are exact in every type used here
UNREADABLE = (OSError, MemoryError, RuntimeError, SafetensorError)
"""Errors of reading a file that is not safetensors or cannot be mapped."""
LONGEST_CHARACTER = 4  # bytes of UTF-8
MOST_SLOTS = 1 << 40
MOST_OVERHEAD = 1 << 20  # bytes of the tensor file that are not rows: header and cursor
_ROW_AXIS = {"keys": 2, "values": 2, **dict.fromkeys(ROW_COLUMNS, 0)}
"""What a save holds of a row, and the axis of slots in it."""


class OtherModel(Refused):
    """The save was made with other weights, or another tokenizer."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a brain is at one moment, on the host.

    ``rows`` are the columns of the state less ``valid``, of the n occupied slots in slot order, and
    ``slot`` [n] int64, ascending.
    """

    model_sha256: str
    rows: dict[str, Tensor]
    cursor: Cursor
    high_water: int  # one more than the highest slot ever occupied
    unfinished: bytes  # of a character that the text has begun
    conf: dict[str, Any]  # the configuration as plain data
    policy_sha256: str | None = None  # of the source of a custom policy
    vocabulary_sha256: str | None = None  # saves from before it have none


def brief(sha256: object) -> str:
    """As much of a hash as a message needs."""
    return "none" if sha256 is None else f"{str(sha256)[:12]}…"


def occupied_rows(state: State) -> dict[str, Tensor]:
    """The rows of a snapshot: copies on the host of the occupied slots of every column."""
    slots = torch.nonzero(state.valid)[:, 0]
    rows = {
        name: getattr(state, name).index_select(axis, slots).cpu().contiguous()
        for name, axis in _ROW_AXIS.items()
    }
    return rows | {"slot": slots.cpu()}


def write(folder: str | Path, snapshot: Snapshot, notes: Any = None) -> None:
    """Writes a save, replacing one that is already there: atomically, and forced to the disk.
    ``notes``: JSON that is kept with it for the caller. Raises Refused if the folder holds anything
    else, or cannot be written.
    """
    folder = given_path(folder)
    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise Refused(f"{folder} exists and is not a save: choose another folder")
    cursor = {f"cursor.{name}": column for name, column in snapshot.cursor._asdict().items()}
    description = {
        "format": FORMAT,
        "model_sha256": snapshot.model_sha256,
        "torch": torch.__version__,
        "high_water": snapshot.high_water,
        "unfinished": snapshot.unfinished.hex(),
        "conf": snapshot.conf,
        "notes": notes,
    }
    if snapshot.policy_sha256 is not None:
        description["policy_sha256"] = snapshot.policy_sha256
    if snapshot.vocabulary_sha256 is not None:
        description["vocabulary_sha256"] = snapshot.vocabulary_sha256
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(snapshot.rows | cursor, scratch / TENSORS)
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


def read(
    folder: str | Path,
    checkpoint: Checkpoint,
    state: State,
    cursor: Cursor,
    most_pinned: int,
    policy_sha256: str | None = None,
) -> tuple[Snapshot, Any]:
    """Reads a save, checked against the model and the memory that it is read for.

    Args:
        folder: Where the save is.
        checkpoint: The model that will go on with it.
        state: The memory that the rows will be put into. Only its shapes and dtypes are looked at.
            Rows of a larger memory get other slots where they need them.
        cursor: The same for the cursor.
        most_pinned: How many rows that memory may have pinned.
        policy_sha256: Of the policy that will go on with it, if that is a custom one.
    Returns:
        The snapshot, and the notes that were written with it.
    Raises:
        OtherModel: It was saved with other weights or another tokenizer.
        Refused: It is damaged, or does not fit into the memory.
    """
    folder = given_path(folder)
    description = read_description(folder)
    if description.get("model_sha256") != checkpoint.sha256:
        saved, found = brief(description.get("model_sha256")), brief(checkpoint.sha256)
        raise OtherModel(
            f"{folder} was saved with other weights than those of {checkpoint.name}: their SHA-256 "
            f"was {saved}, now it is {found}"
        )
    vocabulary = description.get("vocabulary_sha256")
    if vocabulary is not None and vocabulary != checkpoint.vocabulary_sha256:
        raise OtherModel(
            f"{folder} was saved with another tokenizer than that of {checkpoint.name}: the "
            f"SHA-256 of the vocabulary was {brief(vocabulary)}, now it is "
            f"{brief(checkpoint.vocabulary_sha256)}; put the old one back"
        )
    if description.get("policy_sha256") != policy_sha256:
        saved, found = brief(description.get("policy_sha256")), brief(policy_sha256)
        raise Refused(
            f"{folder} was saved with a policy of another source: its SHA-256 was {saved}, now it "
            f"is {found}; give the same one"
        )
    path = folder / TENSORS
    _check_file(path, description.get("sha256"), checkpoint, state)
    rows, saved_cursor = _tensors(path, checkpoint.config.vocab_size, state, cursor)
    slot, high_water = rows["slot"], description.get("high_water")
    occupied = int(slot[-1]) + 1 if len(slot) else 0
    if type(high_water) is not int or high_water < occupied:
        raise Refused(
            f"{folder}: high_water is {shown(high_water)}, expected an integer of at least "
            f"{occupied}"
        )
    pinned = int(rows["pinned"].sum())
    if pinned > most_pinned:
        raise Refused(
            f"{folder} holds {pinned} pinned rows, but of {state.capacity} no more than "
            f"{most_pinned} may be: give a larger capacity"
        )
    if high_water > state.capacity:  # saved from a larger memory
        rows["slot"], high_water = torch.arange(len(slot)), len(slot)
    try:
        unfinished = bytes.fromhex(description["unfinished"])
    except (KeyError, TypeError, ValueError):
        raise Refused(f"{folder}: unfinished is not a string of hex digits") from None
    if len(unfinished) > LONGEST_CHARACTER:
        raise Refused(f"{folder}: unfinished is longer than any character")
    snapshot = Snapshot(
        model_sha256=checkpoint.sha256,
        rows=rows,
        cursor=saved_cursor,
        high_water=high_water,
        unfinished=unfinished,
        conf=description.get("conf", {}),
        policy_sha256=policy_sha256,
        vocabulary_sha256=vocabulary,
    )
    return snapshot, description.get("notes")


def read_description(folder: Path) -> dict[str, Any]:
    """The JSON of a save, whose seal has been checked. Raises Refused if it is damaged."""
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
        raise Refused(f"{folder / DESCRIPTION} is damaged: its seal does not match its content")
    return description


def sealed(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the SHA-256 of everything else in it as its ``seal``."""
    content = {key: value for key, value in description.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def plain(conf: Conf) -> dict[str, Any]:
    """The configuration as data that JSON can hold: enums as their names."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list):
            return [named(item) for item in value]
        return value.name if isinstance(value, Enum) else value

    return named(asdict(conf))  # type: ignore[no-any-return]


def _check_file(path: Path, sha256: Any, checkpoint: Checkpoint, state: State) -> None:
    """Refuses, before it is read into memory, a file that holds more than the memory can or is not
    the one that was written.
    """
    try:
        with open_plain(path), safe_open(path, "pt") as file:
            shape = file.get_slice("slot").get_shape()
        if len(shape) != 1:
            raise Refused(f"{path}: tensor slot is missing or malformed")
        (count,) = shape
        if count > state.capacity:
            raise Refused(f"{path.parent} holds {count} rows but capacity is {state.capacity}")
        most = state_bytes(checkpoint.config, count, state.keys.dtype) + 8 * count + MOST_OVERHEAD
        if path.stat().st_size > most:
            raise Refused(f"{path} is larger than {count} rows can be")
        if file_sha256(path) != sha256:
            raise Refused(f"{path} is damaged: its SHA-256 is not the one in {DESCRIPTION}")
    except OSError as error:
        raise Refused(f"{path} cannot be read ({one_line(error)})") from None
    except UNREADABLE as error:
        raise Refused(f"{path} is damaged ({one_line(error)})") from None


def _tensors(
    path: Path, vocab_size: int, state: State, cursor: Cursor
) -> tuple[dict[str, Tensor], Cursor]:
    """The saved rows and cursor, checked against the shapes and dtypes of a memory."""
    try:
        with safe_open(path, "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        raise Refused(f"{path} is damaged ({one_line(error)})") from None
    slot = saved.pop("slot", None)
    if slot is None or slot.dtype != torch.int64 or slot.dim() != 1:
        raise Refused(f"{path}: tensor slot is missing or malformed")
    if len(slot) and (slot.min() < 0 or slot.max() >= MOST_SLOTS or (slot.diff() <= 0).any()):
        raise Refused(f"{path}: slots are not ascending")

    def take(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        tensor: Tensor | None = saved.pop(name, None)
        if tensor is None:
            raise Refused(f"{path}: {name} is missing")
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise Refused(f"{path}: {name} is {found}, expected {dtype} {shape}")
        return tensor

    rows = {"slot": slot}
    for name, axis in _ROW_AXIS.items():
        column = getattr(state, name)
        shape = list(column.shape)
        shape[axis] = len(slot)
        older = COLUMNS[name].older if name in COLUMNS else None
        if older is not None:  # the save may be from before the column
            saved.setdefault(name, torch.full(shape, older, dtype=column.dtype))
        rows[name] = take(name, shape, column.dtype)
    columns = cursor._asdict().items()
    found = Cursor(*(take(f"cursor.{name}", list(c.shape), c.dtype) for name, c in columns))
    if saved:
        raise Refused(f"{path}: unexpected tensor {sorted(saved)[0]}")
    for name, ids in (("token_id", rows["token_id"]), ("cursor.token", found.token)):
        if ((ids < 0) | (ids >= vocab_size)).any():
            raise Refused(f"{path}: {name} has ids outside the vocabulary")
    positions = rows["position"]
    if (positions < 0).any() or len(positions.unique()) != len(positions):
        raise Refused(f"{path}: positions are negative or not unique")
    if found.position[0] < NOWHERE or (len(slot) and found.position[0] == NOWHERE):
        raise Refused(f"{path}: cursor.position is damaged")
    _check_values(rows, found, path)
    return rows, found


def _check_values(rows: dict[str, Tensor], cursor: Cursor, path: Path) -> None:
    """Refuses numbers that no run can reach: counting on from them would overflow."""
    tick = int(cursor.tick)
    if not 0 <= tick < MOST_TICKS:
        raise Refused(f"{path}: cursor.tick is {tick}, expected 0 to {MOST_TICKS - 1}")
    if int(cursor.uncommitted) not in (0, 1):
        raise Refused(f"{path}: cursor.uncommitted is neither 0 nor 1")
    positions, last = rows["position"], int(cursor.position[0])
    if last >= MOST_TICKS or (positions > last).any():
        raise Refused(f"{path}: positions are past the cursor's")
    for name in (name for name in ROW_COLUMNS if COLUMNS[name].ticks):
        ticks = rows[name]
        if (ticks < 0).any():
            raise Refused(f"{path}: {name} has a negative tick")
        if (ticks > tick).any():
            raise Refused(f"{path}: {name}: tick {int(ticks.max())} has not happened yet")
    for name, sources in (("source", rows["source"]), ("cursor.source", cursor.source)):
        if (sources >= len(SOURCES)).any():
            raise Refused(f"{path}: {name} has an unknown source")
    floats = {name: rows[name] for name in ROW_COLUMNS if COLUMNS[name].dtype.is_floating_point}
    floats |= {"cursor.surprise": cursor.surprise, "cursor.novelty": cursor.novelty}
    for name, numbers in floats.items():
        if numbers.isnan().any():
            raise Refused(f"{path}: {name} holds NaN")
    for name in ("keys", "values"):  # which a program may have saved that did not look at them
        if not rows[name].isfinite().all():
            raise Refused(f"{path}: {name} hold NaN or infinity: use an earlier save")
