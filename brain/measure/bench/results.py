"""From the timings of many runs to the rows of a table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from brain.measure.bench.contestants import MEMORY, PEERS, Contestant

Runs = Mapping[Contestant, Sequence[dict[str, Any]]]
Row = dict[str, Any]


def limit_rows(runs: Runs) -> list[Row]:
    """How fast memory was read, for each precision."""
    rows = []
    for contestant, results in runs.items():
        if contestant.engine == MEMORY and results:
            speeds = [
                run["bytes"] / statistics.median(run["read_seconds"]) / 1e9 for run in results
            ]
            rows.append(
                {
                    "precision": contestant.precision,
                    "bytes": results[0]["bytes"],
                    "operations": sorted({run["operation"] for run in results}),
                    "gb_per_second": statistics.median(speeds),
                    "slowest_run": min(speeds),
                    "fastest_run": max(speeds),
                }
            )
    return rows


def command_rows(runs: Runs) -> list[Row]:
    """Medians over all repetitions, a row for every command that has any. ``engine`` is None for a
    command that is not ours. ``tokens_per_second_ratios`` are to the commands that are not ours.
    """
    rows: list[Row] = []
    for contestant, results in runs.items():
        if results:
            seconds = [run["first_character_seconds"] for run in results]
            rates = [run["tokens_per_second"] for run in results]
            rows.append(
                {
                    "command": contestant.engine,
                    "engine": results[0].get("engine"),
                    "precision": contestant.precision,
                    "first_character_seconds": statistics.median(seconds),
                    "soonest_run": min(seconds),
                    "latest_run": max(seconds),
                    "tokens_per_second": statistics.median(rates),
                    "slowest_run": min(rates),
                    "fastest_run": max(rates),
                }
            )
    for row in rows:
        row["tokens_per_second_ratios"] = {
            peer["command"]: row["tokens_per_second"] / peer["tokens_per_second"]
            for peer in rows
            if peer["engine"] is None
        }
    return rows


def engine_rows(runs: Runs, context: int, prefill: int) -> list[Row]:
    """Medians over all repetitions, a row for every contestant that has any.

    Ratios are to every peer at the same precision. ``gb_per_second`` counts the bytes that a token
    needs, weights and ``context`` remembered rows, in the engine's own formats;
    ``share_of_limit`` is its part of what memory can do.
    """
    limits = {row["precision"]: row["gb_per_second"] for row in limit_rows(runs)}
    rows = []
    for contestant, results in runs.items():
        if contestant.engine == MEMORY or not results:
            continue
        row = _engine_row(contestant, results, context, prefill)
        limit = limits.get(contestant.precision)
        row["share_of_limit"] = row["gb_per_second"] / limit if limit else None
        rows.append(row)
    for row in rows:
        peers = [r for r in rows if r["precision"] == row["precision"] and r["engine"] in PEERS]
        for name in ("tokens_per_second", "prefill_tokens_per_second"):
            row[f"{name}_ratios"] = {peer["engine"]: row[name] / peer[name] for peer in peers}
    return rows


def _engine_row(
    contestant: Contestant, results: Sequence[dict[str, Any]], context: int, prefill: int
) -> Row:
    seconds = [run["token_seconds"][str(context)] for run in results]
    per_run = [1 / statistics.median(of_run) for of_run in seconds]
    rate = 1 / statistics.median(second for of_run in seconds for second in of_run)
    prefills = [second for run in results for second in run["prefill_seconds"]]
    needed = results[0]["weight_bytes"] + context * results[0]["row_bytes"]

    def median(key: str) -> float:
        return statistics.median([float(run[key]) for run in results])

    return {
        "engine": contestant.engine,
        "precision": contestant.precision,
        "tokens_per_second": rate,
        "slowest_run": min(per_run),
        "fastest_run": max(per_run),
        "bytes_per_token": needed,
        "gb_per_second": needed * rate / 1e9,
        "prefill_tokens_per_second": prefill / statistics.median(prefills),
        "peak_mb": max(run["peak_mb"] for run in results),
        "model_mb": max(run["peak_mb"] - run["before_mb"] for run in results),
        "open_seconds": median("open_seconds"),
        "capture_seconds": median("capture_seconds"),
    }


def scaling_rows(runs: Mapping[tuple[str, str, int], Sequence[dict[str, Any]]]) -> list[Row]:
    """Milliseconds of a step for every (engine, precision, capacity) and count of rows."""
    rows = []
    for (engine, precision, capacity), results in runs.items():
        for count in results[0]["token_seconds"] if results else ():
            seconds = [run["token_seconds"][count] for run in results]
            rows.append(
                {
                    "engine": engine,
                    "precision": precision,
                    "capacity": capacity,
                    "count": int(count),
                    "milliseconds": 1e3 * statistics.median(s for run in seconds for s in run),
                    "runs": [1e3 * statistics.median(run) for run in seconds],
                }
            )
    return rows
