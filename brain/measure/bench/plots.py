"""Results as pictures that can be read at a glance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brain.measure.bench.contestants import COMPILED, DYNAMIC, EAGER, LLAMA_CPP, NATIVE, STATIC
from brain.measure.bench.results import Row
from brain.measure.bench.tables import FLAT
from brain.measure.evaluation.plots import pyplot, save

COLOURS = {
    NATIVE: "#9c2740",
    COMPILED: "#d1495b",
    EAGER: "#edae49",
    LLAMA_CPP: "#30638e",
    DYNAMIC: "#8aa1b1",
    STATIC: "#5d7584",
}
MARKERS = ("o", "s", "^", "D")


def plot_decode(rows: Sequence[Row], limits: Sequence[Row], title: str, path: Path) -> None:
    """Tokens per second, a group of bars for each precision, below what memory allows there."""
    plt = pyplot()
    precisions = list(dict.fromkeys(row["precision"] for row in [*limits, *rows]))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure, panel = plt.subplots(figsize=(2.0 + 0.75 * len(precisions) * (len(engines) + 1), 4.6))
    width = 0.84 / max(1, len(engines))
    for number, engine in enumerate(engines):
        bars = [row for row in rows if row["engine"] == engine]
        heights = [bar["tokens_per_second"] for bar in bars]
        drawn = panel.bar(
            [precisions.index(bar["precision"]) - 0.42 + (number + 0.5) * width for bar in bars],
            heights,
            width,
            yerr=[
                [max(0.0, h - bar["slowest_run"]) for h, bar in zip(heights, bars, strict=True)],
                [max(0.0, bar["fastest_run"] - h) for h, bar in zip(heights, bars, strict=True)],
            ],
            capsize=3,
            label=engine,
            color=COLOURS.get(engine),
        )
        panel.bar_label(drawn, [f"{height:.0f}" for height in heights], padding=3, fontsize=9)
    for number, limit in enumerate(limits):
        rate = 1e9 * limit["gb_per_second"] / limit["bytes"]
        at = precisions.index(limit["precision"])
        label = "all that memory can do" if number == 0 else None
        panel.hlines(rate, at - 0.46, at + 0.46, colors="black", linestyles="--", label=label)
        panel.annotate(
            f"{limit['gb_per_second']:.1f} GB/s", (at + 0.46, rate), ha="right", va="bottom"
        )
    panel.set_xticks(range(len(precisions)), precisions)
    panel.set_ylabel("tokens per second")
    panel.set_title(title, fontsize=10)
    panel.margins(y=0.12)
    panel.grid(axis="y", alpha=0.3)
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save(figure, path)


def plot_scaling(rows: Sequence[Row], held: int, title: str, path: Path) -> None:
    """Milliseconds of a step against the count of rows at the largest capacity, and against the
    capacity with ``held`` rows remembered.
    """
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    largest = max(row["capacity"] for row in rows)
    by_count = [row for row in rows if row["capacity"] == largest]
    by_capacity = [row for row in rows if row["count"] == held]
    _lines(panels[0], by_count, "count")
    _lines(panels[1], by_capacity, "capacity")
    panels[0].set_xlabel(f"rows remembered, capacity {largest}")
    panels[1].set_xlabel(f"capacity, {held} rows remembered")
    panels[0].set_ylabel("milliseconds per token")
    panels[0].set_ylim(bottom=0)
    for number, (_, line) in enumerate(_by_engine(by_capacity, "capacity")):
        first, last = line[0], line[-1]
        if first["engine"] == COMPILED and first is not last:
            allowed = FLAT * first["milliseconds"]
            label = f"{FLAT} × capacity {first['capacity']}" if number == 0 else None
            panels[1].axhline(allowed, color="black", linestyle=":", linewidth=1, label=label)
            panels[1].annotate(
                f"× {last['milliseconds'] / first['milliseconds']:.2f}",
                (last["capacity"], last["milliseconds"]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="right",
            )
    panels[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _lines(panel: Any, rows: Sequence[Row], axis: str) -> None:
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    for (engine, precision), line in _by_engine(rows, axis):
        times = [row["milliseconds"] for row in line]
        low = [max(0.0, row["milliseconds"] - min(row["runs"])) for row in line]
        high = [max(0.0, max(row["runs"]) - row["milliseconds"]) for row in line]
        panel.errorbar(
            [row[axis] for row in line],
            times,
            [low, high],
            capsize=2,
            marker=MARKERS[precisions.index(precision) % len(MARKERS)],
            color=COLOURS.get(engine),
            label=f"{engine} {precision}",
        )
    ticks = sorted({row[axis] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _by_engine(rows: Sequence[Row], axis: str) -> list[tuple[tuple[str, str], list[Row]]]:
    """The rows of every engine and precision, in order of the axis."""
    keys = dict.fromkeys((row["engine"], row["precision"]) for row in rows)
    return [
        (
            key,
            sorted(
                (row for row in rows if (row["engine"], row["precision"]) == key),
                key=lambda row: int(row[axis]),
            ),
        )
        for key in keys
    ]
