"""``task=inspect``: print what a run remembers, and a captured tick of it, legibly."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from brain.errors import Refused, one_line, printable
from brain.files import (
    RECORD_BYTES,
    SETTINGS_BYTES,
    given_path,
    open_plain,
    read_json,
    read_text,
)
from brain.record.captures import TOP_IN_JSON
from brain.record.heatmap import FILE, Row, in_terminal, page, read_rows, rows_of
from brain.record.lock import is_taken
from brain.record.numbered_saves import NumberedSaves
from brain.record.run_files import TRANSCRIPT
from brain.record.run_folder import CAPTURES
from brain.record.run_record import FAILED, SAVES, SETTINGS
from brain.saves import TENSORS
from brain.terminal import note
from conf.schema import Conf, InspectTask

DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
"""Errors of reading a description that has another shape than ours."""
UNREADABLE = (*DAMAGED, OSError, MemoryError, SafetensorError)

TRACES = (FILE, CAPTURES, TRANSCRIPT, f"{SAVES}/{SETTINGS}")
"""Files in the folder of a run, whenever it was killed."""


def run(conf: Conf, run_dir: Path) -> None:
    """Prints what a run remembers at its end or, if that is newer or asked for, a captured tick and
    what was remembered before its patch; writes ``memory.html``. Raises Refused.
    """
    task = cast(InspectTask, conf.task)
    if task.path is None:
        raise Refused("task.path is missing: give the folder of a run")
    if task.top < 1:
        raise Refused(f"task.top must be at least 1, not {task.top}")
    folder = given_path(task.path)
    captures = _captures(folder)
    if task.tick is None and _ends_later(folder, captures):
        rows, what = read_rows(folder / FILE), f"what {folder} remembers at its end"
    else:
        text, rows, tick = _captured(_capture(folder, captures, task.tick), task.top)
        print("\n".join(printable(line) for line in text.split("\n")))
        what = f"what {folder} remembers before the patch of tick {tick}"
    what = printable(what)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"\n{what}: {len(rows)} rows\n")
    print(in_terminal(rows, colour=colour, width=max(20, shutil.get_terminal_size().columns - 1)))
    picture = run_dir / "memory.html"
    # Half a surrogate pair is not a character: it is shown as a question mark.
    picture.write_text(page(rows, what), "utf-8", "replace")
    of_run = folder.parent if folder.name == CAPTURES else folder
    if not (of_run / FILE).is_file():
        note(f"the run in {printable(str(of_run))} {_why_unended(of_run)}")
    note(f"heat map: {picture}")


def _captures(folder: Path) -> dict[int, Path]:
    """Every capture in a run's folder, or in that of its captures, by its tick, in order."""
    if (folder / CAPTURES).is_dir():
        folder = folder / CAPTURES
    if not folder.is_dir():
        return {}
    named = ((path.stem.removeprefix("tick_"), path) for path in folder.glob("tick_*.json"))
    return dict(sorted((int(n), path) for n, path in named if n.isdecimal() and len(n) < 19))


def _ends_later(folder: Path, captures: dict[int, Path]) -> bool:
    """Whether a run has ended, and with a tick that is newer than every capture."""
    return (folder / FILE).is_file() and (not captures or _last_tick(folder) > max(captures))


def _last_tick(folder: Path) -> int:
    """The tick of the newest save of a run, made before FILE; -1 where no save can be read."""
    saves = NumberedSaves(folder / SAVES)
    try:
        path = saves.save(max(saves.saves())) / TENSORS
        with open_plain(path), safe_open(path, "pt") as file:
            is_number = file.get_slice("cursor.tick").get_shape() == []
            return int(file.get_tensor("cursor.tick")) if is_number else -1
    except UNREADABLE:
        return -1


def _capture(folder: Path, captures: dict[int, Path], tick: int | None) -> Path:
    """The capture of a tick, or the last one. Raises Refused."""
    if not captures:
        raise Refused(_why_empty(folder, tick))
    if tick is None:
        return captures[max(captures)]
    if tick not in captures:
        raise Refused(
            f"task.tick={tick} was not captured: {folder} has {len(captures)} captures, of ticks "
            f"{min(captures)} to {max(captures)}"
        )
    return captures[tick]


def _captured(path: Path, top: int) -> tuple[str, list[Row], Any]:
    """A captured tick as text, what was remembered before its patch, and its number. Raises Refused
    if it is damaged, or keeps fewer rows of its tables than ``top``.
    """
    try:
        described = read_json(path, RECORD_BYTES)
        text = legible(described, _shapes(path.with_suffix(".safetensors")), top)
        rows = rows_of(described["remembered"])
        kept = len(described["1 read"]["returned"]["likeliest"])
    except UNREADABLE as error:
        raise Refused(f"{path} is damaged ({one_line(error)})") from None
    if top > max(kept, TOP_IN_JSON):
        raise Refused(
            f"task.top must be at most {kept}, the rows that {path} keeps of each table, not "
            f"{top}: run brain with capture_top={top} to keep as many"
        )
    return text, rows, described["tick"]


def _why_empty(folder: Path, tick: int | None) -> str:
    """Why there is nothing to show in a folder without captures, and what to do instead."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        return f"{folder} {what}: give task.path=RUN_FOLDER, the folder of a run"
    if not any((folder / trace).exists() for trace in TRACES):
        return f"{folder} is not the folder of a run: it has neither {FILE} nor {CAPTURES}"
    if tick is not None and ((folder / FILE).is_file() or not (folder / CAPTURES).is_dir()):
        return (
            f"task.tick={tick} was not captured: the run in {folder} has no captures; leave out "
            "task.tick, or run brain with capture=true in another folder"
        )
    return f"the run in {folder} {_why_unended(folder)}"


def _why_unended(folder: Path) -> str:
    """What became of a run that has not written what it remembers."""
    try:
        if is_taken(folder):
            return f"is still running: there is no {FILE} yet; wait for its end"
        failure = read_text(folder / FAILED, SETTINGS_BYTES).strip()
    except FileNotFoundError:
        return f"was killed, so there is no {FILE}: give the same command again to go on with it"
    except (Refused, OSError, ValueError):
        return f"has not ended: there is no {FILE} yet"
    return f"has failed ({failure}): there is no {FILE}; to go on, give the same command again"


def _shapes(path: Path) -> dict[str, tuple[str, list[int]]]:
    with open_plain(path), safe_open(path, "pt") as file:
        return {
            name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
        }


def legible(described: dict[str, Any], shapes: dict[str, tuple[str, list[int]]], top: int) -> str:
    """The whole tick as text: each step with what it received and returned."""
    received, returned = described["1 read"]["received"], described["1 read"]["returned"]
    known = "already remembered" if received["already_remembered"] else "not yet remembered"
    lines = [
        f"tick {described['tick']}",
        "",
        f"1 read      token {received['token']} {received['text']!r} at position "
        f"{received['position']} ({known}) against {received['rows']} rows",
        "",
        "            likeliest next            probability",
    ]
    lines += [
        f"            {row['token']:>6} {row['text']!r:<18} {row['probability']:>8.4f}  "
        + _bar(row["probability"])
        for row in returned["likeliest"][:top]
    ]
    lines += [
        "",
        f"            attention: {returned['mass_on_cache']:.4f} on the rows, "
        f"{returned['mass_on_itself']:.4f} on the token itself",
    ]
    lines += [
        f"            {row['position']:>6} {row['text']!r:<18} {row['mass']:>8.4f}  "
        + _bar(row["mass"])
        for row in returned["most_attended"][:top]
    ]
    chosen, patch = described["2 score, 3 decide"], described["4 patch"]
    appended = [
        f"remembers token {row['token']} at position {row['position']} "
        f"(source {row['source']}, surprise {row['surprise']:.3f})"
        for row in patch["appended"]
    ]
    remembers = "; ".join(appended) or "remembers nothing new"
    lines += [
        "",
        f"2, 3        spoke token {chosen['token']} {chosen['text']!r} for position "
        f"{chosen['position']}, surprise {chosen['surprise']:.3f} nats",
        f"            to forget: {chosen['culled'] or 'nothing'}",
        "",
        f"4 patch     {remembers}; {patch['rows_afterwards']} rows afterwards",
        "",
        "tensors",
    ]
    lines += [f"            {name:<34} {kind:<5} {size}" for name, (kind, size) in shapes.items()]
    return "\n".join(lines)


def _bar(share: float) -> str:
    return "█" * round(40 * min(1.0, share))
