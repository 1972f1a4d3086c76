"""Results as text."""

from collections.abc import Sequence

from brain.measure.bench.contestants import COMPILED, DYNAMIC, LLAMA_CPP, STATIC
from brain.measure.bench.results import Row

SHORT = {LLAMA_CPP: "llama", DYNAMIC: "hf-dyn", STATIC: "hf-stat"}
"""What the peers are called in the heading of a column of ratios."""

FLAT = 1.1
"""Wanted: the most that a tick may cost with the largest capacity, in ticks with the smallest."""


def decode_table(rows: Sequence[Row], limits: Sequence[Row]) -> str:
    """One line for every engine at every precision, beside the limit of memory.

    ``×`` columns are ratios to the peers of that precision: of decoding, then of prefill.
    """
    present = {row["engine"] for row in rows}
    peers = [peer for peer in SHORT if peer in present]
    ratios = "".join(f" {'×' + SHORT[peer]:>8}" for peer in peers)
    lines = [
        f"{'engine':<28} {'precision':<9} {'tok/s':>7} {'(runs)':>13}{ratios} {'GB/s':>6} "
        f"{'limit':>6} {'prefill':>8}{ratios} {'MB':>6} {'ready s':>7}"
    ]
    for precision in dict.fromkeys(row["precision"] for row in [*limits, *rows]):
        lines += [_limit_line(r, len(peers)) for r in limits if r["precision"] == precision]
        lines += [_engine_line(r, peers) for r in rows if r["precision"] == precision]
    return "\n".join(lines)


def command_table(rows: Sequence[Row]) -> str:
    """One line for the default command, saying what it chose, and one for what is beside it."""
    lines = [
        f"{'command':<28} {'engine':<9} {'precision':<9} {'first character':>15} {'(runs)':>11} "
        f"{'tok/s':>7} {'(runs)':>13}"
    ]
    for row in rows:
        lines.append(
            f"{row['command']:<28} {row['engine'] or '–':<9} {row['precision']:<9} "
            f"{row['first_character_seconds']:>13.1f} s "
            f"{_spread(row['soonest_run'], row['latest_run']):>11} "
            f"{row['tokens_per_second']:>7.1f} "
            f"{_spread(row['slowest_run'], row['fastest_run']):>13}"
        )
    for row in rows:
        lines += [
            f"{row['command']} says {ratio:.2f} times the tokens per second of {peer}"
            for peer, ratio in row["tokens_per_second_ratios"].items()
            if row["engine"] is not None
        ]
    return "\n".join(lines)


def _limit_line(row: Row, peers: int) -> str:
    speed, size = row["gb_per_second"], row["bytes"]
    spread = _spread(1e9 * row["slowest_run"] / size, 1e9 * row["fastest_run"] / size)
    return (
        f"{'(reading memory)':<28} {row['precision']:<9} {1e9 * speed / size:>7.1f} {spread:>13}"
        f"{' ' * 9 * peers} {speed:>6.1f} {'100%':>6}"
    )


def _engine_line(row: Row, peers: Sequence[str]) -> str:
    def ratios(name: str) -> str:
        found = row[f"{name}_ratios"]
        return "".join(f" {found[p]:>8.2f}" if p in found else f" {'–':>8}" for p in peers)

    share = "–" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%}"
    return (
        f"{row['engine']:<28} {row['precision']:<9} {row['tokens_per_second']:>7.1f} "
        f"{_spread(row['slowest_run'], row['fastest_run']):>13}{ratios('tokens_per_second')} "
        f"{row['gb_per_second']:>6.1f} {share:>6} {row['prefill_tokens_per_second']:>8.0f}"
        f"{ratios('prefill_tokens_per_second')} {row['model_mb']:>6.0f} "
        f"{row['open_seconds'] + row['capture_seconds']:>7.1f}"
    )


def _spread(least: float, most: float) -> str:
    return f"{least:.1f}–{most:.1f}"


def scaling_table(rows: Sequence[Row], counts: Sequence[int], held: int) -> str:
    """Milliseconds of a step against the count of rows at the largest capacity, then against the
    capacity with ``held`` rows remembered; a column for each engine and precision.
    """
    columns = list(dict.fromkeys((row["engine"], row["precision"]) for row in rows))
    cells = {
        (row["engine"], row["precision"], row["capacity"], row["count"]): row["milliseconds"]
        for row in rows
    }
    capacities = sorted({row["capacity"] for row in rows})
    heading = "".join(f" {engine + ' ' + precision:>24}" for engine, precision in columns)

    def lines(title: str, points: Sequence[tuple[int, int]], shown: int) -> list[str]:
        found = [f"{title:>28}{heading}"]
        for point in points:
            times = [cells.get((*column, *point)) for column in columns]
            told = "".join(f" {'–':>24}" if t is None else f" {t:>24.2f}" for t in times)
            found.append(f"{point[shown]:>28}{told}")
        return found

    largest = capacities[-1]
    by_count = [(largest, count) for count in counts]
    by_capacity = [(capacity, held) for capacity in capacities]
    return "\n".join(
        [
            *lines(f"rows of {largest} remembered", by_count, 1),
            "",
            *lines(f"capacity, {held} rows in it", by_capacity, 0),
        ]
    )


def flatness(rows: Sequence[Row], held: int) -> list[str]:
    """What capacity alone costs: a line for each precision in which it can be told."""
    lines = []
    ours = [row for row in rows if row["engine"] == COMPILED and row["count"] == held]
    for precision in dict.fromkeys(row["precision"] for row in ours):
        at = {r["capacity"]: r["milliseconds"] for r in ours if r["precision"] == precision}
        small, large = min(at), max(at)
        if small < large:
            lines.append(
                f"{precision}: with {held} rows remembered a tick at capacity {large} costs "
                f"{at[large] / at[small]:.3f} of one at capacity {small} (wanted: at most {FLAT})"
            )
    return lines
