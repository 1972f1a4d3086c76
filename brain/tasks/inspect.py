"""``task=inspect``: print what a run remembers, and a captured tick of it, legibly."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from brain.errors import Refused, one_line, printable
from brain.heatmap import FILE, in_terminal, page, read_rows, rows_of
from brain.paths import given_path
from brain.reading import RECORD_BYTES, open_plain, read_json
from brain.terminal import note
from conf.schema import Conf, InspectTask

DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
"""What a description of another shape than ours leads to."""


def run(conf: Conf, run_dir: Path) -> None:
    """Prints what is remembered, and a captured tick if there is one; writes ``memory.html``.

    Raises Refused if the folder holds neither.
    """
    task = cast(InspectTask, conf.task)
    if task.path is None:
        raise Refused("task.path is missing: give the folder of a run")
    if task.top < 1:
        raise Refused(f"task.top must be at least 1, not {task.top}")
    folder = given_path(task.path)
    if task.tick is None and not _captures(folder) and (folder / FILE).is_file():
        rows, what = read_rows(folder / FILE), f"what {folder} remembers at its end"
    else:
        path = _capture(folder, task.tick)
        try:
            described = read_json(path, RECORD_BYTES)
            shapes = _shapes(path.with_suffix(".safetensors"))
            told = legible(described, shapes, task.top)
            rows = rows_of(described["remembered"])
        except (*DAMAGED, OSError, MemoryError, SafetensorError) as error:
            raise Refused(f"{path} is damaged ({one_line(error)})") from None
        print("\n".join(printable(line) for line in told.split("\n")))
        what = f"what {folder} remembers before the patch of tick {described['tick']}"
    what = printable(what)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"\n{what}: {len(rows)} rows\n")
    print(in_terminal(rows, colour=colour, width=max(20, shutil.get_terminal_size().columns - 1)))
    picture = run_dir / "memory.html"
    # Half a surrogate pair is no character: it is shown as a question mark.
    picture.write_text(page(rows, what), "utf-8", "replace")
    note(f"heat map: {picture}")


def _captures(folder: Path) -> list[Path]:
    if (folder / "captures").is_dir():
        folder = folder / "captures"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("tick_*.json") if _number(path) is not None)


def _number(path: Path) -> int | None:
    """The tick of a capture, by its name."""
    digits = path.stem.removeprefix("tick_")
    return int(digits) if digits.isdecimal() and len(digits) < 19 else None


def _capture(folder: Path, tick: int | None) -> Path:
    found = _captures(folder)
    if not found:
        raise Refused(f"{folder} holds no captures: run brain with capture=true first")
    if tick is None:
        return found[-1]
    path = found[0].with_name(f"tick_{tick:06d}.json")
    if path not in found:
        numbers = [_number(p) for p in found]
        raise Refused(
            f"task.tick={tick} was not captured: {folder} has ticks {numbers[0]} to {numbers[-1]}"
        )
    return path


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
    lines += [
        "",
        f"2, 3        spoke token {chosen['token']} {chosen['text']!r} for position "
        f"{chosen['position']}, surprise {chosen['surprise']:.3f} nats",
        f"            to forget: {chosen['culled'] or 'nothing'}",
        "",
        "4 patch     "
        + (
            "; ".join(
                f"remembers token {row['token']} at position {row['position']} "
                f"(source {row['source']}, surprise {row['surprise']:.3f})"
                for row in patch["appended"]
            )
            or "remembers nothing new"
        )
        + f"; {patch['rows_afterwards']} rows afterwards",
        "",
        "tensors",
    ]
    lines += [f"            {name:<34} {kind:<5} {size}" for name, (kind, size) in shapes.items()]
    return "\n".join(lines)


def _bar(share: float) -> str:
    return "█" * round(40 * min(1.0, share))
