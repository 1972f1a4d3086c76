"""Named ranges of time, nested as the calls were that they stand for, and the table of a tick.

Times are in microseconds from any beginning. A profiler's report becomes ranges in ``trace.py``
(PyTorch's) or ``profiles/nsight_report.py`` (Nsight Systems').
"""

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from brain.loop import TICK
from compiled.graphs import WARM_UP

BETWEEN = "between the steps"
"""What a tick takes outside of its steps: the host's work."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: when the host started it, and how long the device was at it if that is known."""

    started: float
    microseconds: float | None = None


@dataclass(frozen=True)
class Range:
    """One range, and the kernels that were started in it: None where nobody counted."""

    name: str
    start: float
    end: float
    kernels: int | None = None
    device: float | None = None  # microseconds that those kernels took on a device

    @property
    def microseconds(self) -> float:
        """How long it was."""
        return self.end - self.start


@dataclass(frozen=True)
class Row:
    """One line of the table of a tick. Numbers are medians over the ticks in which it occurs."""

    name: str
    depth: int  # 0 for the tick, 1 for its steps, 2 for their graphs
    ticks: int  # in how many it occurs
    microseconds: float
    share: float  # of the time of all ticks
    kernels: float | None
    device_microseconds: float | None


def with_kernels(ranges: Iterable[Range], kernels: Iterable[Kernel]) -> list[Range]:
    """The same ranges, each with the kernels that were started while it was open."""
    known = sorted(kernels, key=lambda kernel: kernel.started)
    starts = [kernel.started for kernel in known]
    timed = all(kernel.microseconds is not None for kernel in known)
    spent = list(accumulate((kernel.microseconds or 0.0 for kernel in known), initial=0.0))
    told = []
    for r in ranges:
        first, last = bisect_left(starts, r.start), bisect_left(starts, r.end)
        device = spent[last] - spent[first] if known and timed else None
        told.append(Range(r.name, r.start, r.end, last - first, device))
    return told


def nested(ranges: Iterable[Range]) -> list[tuple[tuple[str, ...], Range]]:
    """Every range with the names of those around it, outermost first, and its own."""
    told: list[tuple[tuple[str, ...], Range]] = []
    around: list[Range] = []
    for r in sorted(ranges, key=lambda r: (r.start, -r.end)):
        while around and around[-1].end <= r.start:
            around.pop()
        around.append(r)
        told.append((tuple(outer.name for outer in around), r))
    return told


def ticks_of(ranges: Iterable[Range]) -> list[list[tuple[tuple[str, ...], Range]]]:
    """The ranges of each tick, as ``nested`` from the tick inwards; the tick itself is first."""
    ticks: list[list[tuple[tuple[str, ...], Range]]] = []
    for path, r in nested(ranges):
        if TICK in path:
            inner = path[path.index(TICK) :]
            if len(inner) == 1:
                ticks.append([])
            ticks[-1].append((inner, r))
    return ticks


def table(ranges: Iterable[Range]) -> list[Row]:
    """The steps of a tick and their graphs, in the order in which they run. Empty if there are no
    ticks.
    """
    ticks = ticks_of(ranges)
    sums: dict[tuple[str, ...], list[Range]] = {}
    for tick in ticks:
        own: dict[tuple[str, ...], Range] = {}
        for path, r in tick:
            own[path] = _added(own[path], r) if path in own else r
        steps = [r for path, r in own.items() if len(path) == 2]
        if steps:
            own[(TICK, BETWEEN)] = _rest(own[(TICK,)], steps)
        for path, r in own.items():
            sums.setdefault(path, []).append(r)
    seen = {path: number for number, path in enumerate(sums)}
    # What first occurs in a later tick still stands with its own step.
    order = sorted(sums, key=lambda path: [seen[path[: n + 1]] for n in range(len(path))])
    whole = sum(r.microseconds for r in sums.get((TICK,), []))
    return [_row(path, sums[path], whole) for path in order]


def _row(path: tuple[str, ...], ranges: Sequence[Range], whole: float) -> Row:
    microseconds = [r.microseconds for r in ranges]
    return Row(
        name=path[-1],
        depth=len(path) - 1,
        ticks=len(ranges),
        microseconds=round(statistics.median(microseconds), 1),
        share=round(sum(microseconds) / whole, 4) if whole else 0.0,
        kernels=_median([r.kernels for r in ranges]),
        device_microseconds=_median([r.device for r in ranges]),
    )


def _median(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return round(statistics.median(known), 1) if known else None


def _added(one: Range, other: Range) -> Range:
    """One range as long as both, for what happens twice in a tick."""
    end = one.end + other.microseconds
    return Range(
        one.name, one.start, end, _sum(one.kernels, other.kernels), _sum(one.device, other.device)
    )


def _rest(whole: Range, parts: Sequence[Range]) -> Range:
    end = whole.start + whole.microseconds - sum(r.microseconds for r in parts)
    kernels, device = whole.kernels, whole.device
    for part in parts:
        kernels = None if kernels is None or part.kernels is None else kernels - part.kernels
        device = None if device is None or part.device is None else device - part.device
    return Range(BETWEEN, whole.start, end, kernels, device)


def _sum(one: Any, other: Any) -> Any:
    return None if one is None or other is None else one + other


def warm_up_of(ranges: Iterable[Range]) -> list[dict[str, Any]]:
    """Seconds that the first call of each graph took, its compilation included, in order."""
    seconds: dict[str, float] = {}
    for path, r in nested(ranges):
        if len(path) > 1 and path[0] == WARM_UP:
            seconds.setdefault(path[-1], round(r.microseconds / 1e6, 3))
    return [{"name": name, "seconds": taken} for name, taken in seconds.items()]


def legible(rows: Sequence[Row]) -> str:
    """The table as text."""
    on_device = any(row.device_microseconds is not None for row in rows)
    lines = [f"{'':<34} {'µs':>10} {'share':>7} {'kernels':>8}" + " device µs" * on_device]
    for row in rows:
        kernels = "" if row.kernels is None else f"{row.kernels:g}"
        line = f"{'  ' * row.depth + row.name:<34} {row.microseconds:>10.1f} {row.share:>7.1%} "
        line += f"{kernels:>8}"
        if on_device and row.device_microseconds is not None:
            line += f" {row.device_microseconds:>9.1f}"
        lines.append(line)
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table for a JSON file: without what nobody counted."""
    return [{key: value for key, value in asdict(row).items() if value is not None} for row in rows]
