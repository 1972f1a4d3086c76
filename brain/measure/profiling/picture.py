"""A few ticks as a picture: time to the right, what contains what downwards."""

from collections.abc import Sequence
from pathlib import Path

from brain.loop import PATCH, STEP
from brain.measure.profiling.ranges import Range, ticks_of
from compiled.graphs import CHOOSE

COLOURS = {STEP: "#4878a8", CHOOSE: "#d9973f", PATCH: "#6a9f58"}
"""Of a step of the loop, and of what is another within it."""
SHOWN = 3
"""Ticks in a picture, from the middle of a session."""


def draw_timeline(ranges: Sequence[Range], path: Path, title: str) -> None:
    """Writes a PNG. ``ranges`` must hold at least one tick."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ticks = ticks_of(ranges)
    first = max(0, (len(ticks) - SHOWN) // 2)
    ticks = ticks[first : first + SHOWN]
    start = ticks[0][0][1].start
    span = ticks[-1][0][1].end - start
    figure = Figure(figsize=(11, 2.6))
    panel = figure.add_subplot()
    for number, tick in enumerate(ticks):
        for names, r in tick:
            depth = len(names) - 1
            colour = next((COLOURS[n] for n in reversed(names) if n in COLOURS), "0.85")
            left, width = (r.start - start) / 1e3, r.microseconds / 1e3
            panel.barh(
                -depth,
                width,
                left=left,
                height=0.9,
                color=colour,
                alpha=0.65 if depth > 1 else 1.0,
                edgecolor="white",
                linewidth=0.6,
            )
            label = r.name if depth else f"tick {first + number + 1} of the session"
            if r.microseconds > span * 0.011 * len(label):  # it fits
                panel.text(left + width / 2, -depth, label, ha="center", va="center", fontsize=8)
    seen = {name for tick in ticks for names, _ in tick for name in names}
    deepest = max(len(names) for tick in ticks for names, _ in tick)
    panel.set_yticks([-depth for depth in range(deepest)], ["tick", "step", "within"][:deepest])
    panel.set_xlabel("milliseconds")
    panel.set_title(title, fontsize=10)
    panel.legend(
        handles=[
            Patch(color=colour, label=step) for step, colour in COLOURS.items() if step in seen
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.28),
        ncols=3,
        frameon=False,
    )
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
