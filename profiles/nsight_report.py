"""What Nsight Systems saw: ``python profiles/nsight_report.py REPORT.sqlite [FOLDER]``.

REPORT.sqlite is what ``profiles/nsys.sh`` leaves, or ``nsys export --type sqlite``. Prints the
table of a tick, and writes it to FOLDER (default: beside the report) as ``nsight.json``, with the
version but nothing of the machine, and as a picture, ``nsight.png``.
"""

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from brain.errors import Refused
from brain.loop import TICK
from brain.measure.profiling.picture import draw_timeline
from brain.measure.profiling.ranges import (
    Kernel,
    Range,
    legible,
    summary,
    table,
    ticks_of,
    warm_up_of,
    with_kernels,
)

PUSH_POP = 59
"""``ENUM_NSYS_EVENT_TYPE``: a range that was pushed and popped on one thread."""

NO_RANGES = (
    "no NVTX ranges in it: was the session started with nvtx=true? The package nvtx from 0.2.17 on "
    "leaves none in Nsight Systems 2022.4: put nvtx==0.2.10 first on the PYTHONPATH, or take a "
    "newer nsys"
)


def read_report(path: Path) -> tuple[str, list[Range]]:
    """The version of Nsight Systems, and the ranges of the thread that ticks. Raises Refused."""
    if not path.is_file():
        raise Refused(f"{path} is not there: profiles/nsys.sh makes it")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as report:
        try:
            tables = {name for (name,) in report.execute("SELECT name FROM sqlite_master")}
            if "StringIds" not in tables:
                raise Refused(f"{path} is no export of Nsight Systems")
            if "NVTX_EVENTS" not in tables:
                raise Refused(f"{path}: {NO_RANGES}")
            return _version(report, tables), _ranges(report, tables, path)
        except sqlite3.DatabaseError as error:
            raise Refused(f"{path} is no export of Nsight Systems ({error})") from None


def _version(report: sqlite3.Connection, tables: set[str]) -> str:
    for name in ("EXPORT_META_DATA", "META_DATA_EXPORT"):  # the latter in newer versions
        if name in tables:
            query = f"SELECT value FROM {name} WHERE name = 'EXPORT_PRODUCT_VERSION'"
            for (version,) in report.execute(query):
                return str(version)
    return "unknown"


def _ranges(report: sqlite3.Connection, tables: set[str], path: Path) -> list[Range]:
    named = report.execute(
        "SELECT coalesce(text, value), start, end, globalTid FROM NVTX_EVENTS "
        "LEFT JOIN StringIds ON textId = id WHERE eventType = ? AND end IS NOT NULL",
        (PUSH_POP,),
    ).fetchall()
    threads = {thread for name, _, _, thread in named if name == TICK}
    if not named:
        raise Refused(f"{path}: {NO_RANGES}")
    if not threads:
        raise Refused(f"{path} has ranges, but no tick: the session must be one of task=profile")
    ranges = [Range(n, s / 1e3, e / 1e3) for n, s, e, thread in named if thread in threads]
    if not {"CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"} <= tables:
        return ranges  # on a CPU nothing here counts kernels
    launched = report.execute(
        "SELECT call.start, kernel.end - kernel.start FROM CUPTI_ACTIVITY_KIND_KERNEL AS kernel "
        "JOIN CUPTI_ACTIVITY_KIND_RUNTIME AS call USING (correlationId)"
    )
    return with_kernels(ranges, [Kernel(s / 1e3, taken / 1e3) for s, taken in launched])


def main() -> int:
    """Returns the exit status."""
    if len(sys.argv) not in (2, 3):
        print("usage: python profiles/nsight_report.py REPORT.sqlite [FOLDER]", file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else path.parent
    try:
        version, ranges = read_report(path)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    rows, warm_up = table(ranges), warm_up_of(ranges)
    told = legible(rows)
    print(told)
    for graph in warm_up:
        print(f"warm-up: {graph['name']:<25} {graph['seconds']:>8.2f} s")
    result: dict[str, Any] = {
        "profiler": f"Nsight Systems {version}",
        "ticks": len(ticks_of(ranges)),
        "tick": summary(rows),
        "warm_up": warm_up,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nsight.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw_timeline(ranges, folder / "nsight.png", f"Nsight Systems {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
