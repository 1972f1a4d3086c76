"""The memory as a picture: every token with its brightness, in the terminal and in HTML.

Both can be read without colour: the terminal draws a bar below every character, the page a line
below every token, as high as the token is bright.
"""

import bisect
import html
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from brain.brain import Brain
from brain.errors import Refused, one_line, shown
from brain.files import RECORD_BYTES, read_json
from brain.mirror import SOURCES

BARS = "▁▂▃▄▅▆▇█"
GAP = " … "
FILE = "memory.json"  # what a run leaves in its folder
MOST_LIKELY = 1 << 63  # the largest number that a row may have


@dataclass(frozen=True)
class Row:
    """One remembered token. ``age`` and ``dark`` in ticks: since birth, and since it last drew more
    attention than the average row.
    """

    position: int
    token: int
    text: str
    brightness: float
    surprise: float
    novelty: float
    source: str
    age: int
    dark: int
    pinned: bool


def remembered(brain: Brain) -> list[Row]:
    """Every row, in text order."""
    mirror = brain.mirror
    return [
        Row(
            position=int(mirror.position[index]),
            token=int(mirror.token_id[index]),
            text=brain.tokenizer.decode([int(mirror.token_id[index])], at_start=False),
            brightness=round(float(mirror.brightness[index]), 3),
            surprise=round(float(mirror.surprise[index]), 3),
            novelty=round(float(mirror.novelty[index]), 3),
            source=SOURCES[int(mirror.source[index])],
            age=brain.ticks - int(mirror.born[index]),
            dark=brain.ticks - int(mirror.lit[index]),
            pinned=bool(mirror.pinned[index]),
        )
        for index in range(len(mirror))
    ]


def write_rows(rows: list[Row], path: Path) -> None:
    """Writes them as JSON, one row a line."""
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n" if rows else "[]\n", "utf-8")


def read_rows(path: Path) -> list[Row]:
    """Reads what ``write_rows`` wrote. Raises Refused if it is anything else."""
    try:
        return rows_of(read_json(path, RECORD_BYTES))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Refused(f"{path} is damaged ({one_line(error)})") from None


def rows_of(described: Any) -> list[Row]:
    """Rows from JSON. Raises ValueError or TypeError for anything else."""
    if not isinstance(described, list):
        raise TypeError("not a list of rows")
    return [_row(row) for row in described]


def _row(row: Any) -> Row:
    kinds: dict[str, Any] = Row.__annotations__
    if not isinstance(row, dict) or set(row) != set(kinds):
        raise ValueError("not a row of a memory")
    numbers = {"brightness", "surprise", "novelty"}
    for name, kind in kinds.items():
        if type(row[name]) not in ((float, int) if name in numbers else (kind,)):
            raise TypeError(f"{name} is {shown(row[name])}")
    if any(abs(row[name]) > MOST_LIKELY for name in kinds if kinds[name] in (int, float)):
        raise ValueError("a number is too large")
    if any(math.isnan(row[name]) for name in numbers):
        raise ValueError("a number is NaN")
    return Row(**row)


def levels(rows: list[Row]) -> list[int]:
    """How bright each row is among all, 0 to 7: eight parts of equal number, so that one glaring
    row does not make all others look alike; equally bright rows are of one level.
    """
    order = sorted(row.brightness for row in rows)
    return [bisect.bisect_left(order, row.brightness) * len(BARS) // len(rows) for row in rows]


def in_terminal(rows: list[Row], *, colour: bool, width: int = 96) -> str:
    """The text with a bar below every character, ``^`` below those of pinned tokens. With
    ``colour`` the text is shaded as well.
    """
    cells: list[tuple[str, int | None, bool]] = []  # character, level or none for a gap, pinned
    before: Row | None = None
    for row, level in zip(rows, levels(rows), strict=True):
        if before is not None and row.position > before.position + 1:
            cells += [(character, None, False) for character in GAP]
        shown = "".join("⏎" if c == "\n" else c if c.isprintable() else "·" for c in row.text)
        cells += [(character, level, row.pinned) for character in shown]
        before = row
    lines = []
    for start in range(0, len(cells), width):
        part = cells[start : start + width]
        text = "".join(_shaded(c, level) if colour else c for c, level, _ in part)
        bars = "".join(" " if lv is None else "^" if pin else BARS[lv] for _, lv, pin in part)
        lines += [text, bars]
    return "\n".join(lines)


def _shaded(character: str, level: int | None) -> str:
    if level is None:
        return f"\033[2m{character}\033[0m"
    grey = 236 + 2 * level  # of the 256-colour palette: dark to bright
    ink = 16 if level > 4 else 255
    return f"\033[48;5;{grey}m\033[38;5;{ink}m{character}\033[0m"


def page(rows: list[Row], title: str) -> str:
    """A standalone HTML page; pointing at a token shows its columns."""
    spans = []
    before: Row | None = None
    for row, level in zip(rows, levels(rows), strict=True):
        if before is not None and row.position > before.position + 1:
            gone = row.position - before.position - 1
            spans.append(f'<i title="{gone} positions forgotten">{GAP}</i>')
        columns = (
            f"position {row.position}, token {row.token}, {row.source}, brightness "
            f"{row.brightness:g}, surprise {row.surprise:g}, novelty {row.novelty:g} nats, "
            f"{row.age} ticks old, last lit {row.dark} ticks ago" + (", pinned" * row.pinned)
        )
        kind = f"b{level}" + (" pinned" if row.pinned else "")
        text = html.escape(row.text).replace("\n", "⏎<br>")
        spans.append(f'<span class="{kind}" title="{html.escape(columns)}">{text}</span>')
        before = row
    shades = "\n".join(
        f".b{level} {{ background: rgba(255, 170, 0, {0.08 + 0.1 * level:.2f}); "
        f"border-bottom: {1 + level}px solid #b36b00; }}"
        for level in range(len(BARS))
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{html.escape(title)}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; font: 16px/2.1 Georgia, serif; color: #222; }}
h1 {{ font-size: 1.2rem; }}
.legend {{ font-size: 0.85rem; }}
i {{ color: #888; }}
.pinned {{ outline: 2px solid #0057b7; }}
{shades}
</style>
<h1>{html.escape(title)}</h1>
<p class="legend">{len(rows)} rows remembered. The thicker the line and the deeper the shade, the
brighter: <span class="b0">dim</span> <span class="b3">middling</span>
<span class="b7">bright</span> <span class="b3 pinned">pinned</span>.
… marks what was forgotten. Point at a token for more.</p>
<p>{"".join(spans)}</p>
</html>
"""
