"""The memory at work, as a picture: ``python profiles/memory_at_work.py [OUT.png]``.

Feeds SmolLM2 the passage of tests/golden with a note planted in it, once with a window of the
newest rows (``sink_recent``) and once with the default policy, ``novelty``. A line in the picture
is a remembered row, from the tick in which it came to the one in which it was forgotten; the
darker, the brighter the row. How often such notes can still be told is what ``task=eval`` measures.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from tqdm import tqdm

import brain
from brain.measure.evaluation.facts import KINDS
from brain.measure.evaluation.plots import pyplot
from compiled.choose import Look

HERE = Path(__file__).parent
ROWS, EVERY, BRIGHT = 256, 4, 60.0
"""Capacity; ticks between two looks; a brightness that is shown in full, an average row's being 50.
"""
PRIMED, LENGTH = 256, 1024
"""Tokens before the note, which fill the memory, and tokens after it: four times as many."""
NOTE = next(kind for kind in KINDS if kind.name == "note")
POLICIES = {"sink_recent": "a window of the newest rows", "novelty": "the default policy"}
BLUES, ORANGES, REDS = (
    LinearSegmentedColormap.from_list(name, [pale, full])
    for name, pale, full in (
        ("plain", "#d5e0ec", "#16324f"),
        ("novel", "#f6d9ae", "#d9730d"),
        ("note", "#f2a0a0", "#b00020"),
    )
)


@dataclass
class Life:
    """What one policy remembered at every look."""

    ticks: list[int]
    positions: list[Any]
    brightness: list[Any]
    novel: list[Any]
    note: range


def life(policy: str, passage: str) -> Life:
    """Feeds the passage with its note under one policy."""
    b = brain.open("smollm2", capacity=ROWS, dtype="bfloat16", engine="compiled", cull=policy)
    text = b.encode(passage)
    note = b.encode(NOTE.statement.format(name="Rosalind", answer="harbour"))
    b.prime(text[:PRIMED])
    found = Life([], [], [], [], range(PRIMED, PRIMED + len(note)))
    _look(b, found)
    fed = [*note, *text[PRIMED : PRIMED + LENGTH]]
    for start in tqdm(range(0, len(fed), EVERY), desc=policy, unit_scale=EVERY):
        b.feed(fed[start : start + EVERY])
        _look(b, found)
    return found


def _look(b: brain.Brain, found: Life) -> None:
    """Adds what is remembered now; novel is what the policy rates above its brightness."""
    mirror, state = b.mirror, b.state
    nobody = torch.zeros_like(state.brightness)
    look = Look(nobody, b.cursor.position[0], torch.tensor(0), b.cursor.tick)
    scores = b.settings.graphs.eviction.keep_score(state, look).numpy()[mirror.slot]
    found.ticks.append(b.ticks)
    found.positions.append(mirror.position)
    found.brightness.append(mirror.brightness)
    found.novel.append(scores > mirror.brightness + 1)


def draw(lives: dict[str, Life], path: Path) -> None:
    """Writes the picture."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(lives), figsize=(10.4, 4.2), sharey=True)
    for panel, (policy, found) in zip(panels, lives.items(), strict=True):
        lasts = (*found.ticks[1:], found.ticks[-1] + EVERY)
        for kind, (shades, width) in enumerate(((BLUES, 0.7), (ORANGES, 1.1), (REDS, 1.6))):
            lines, bright = [], []
            for look, (tick, last) in enumerate(zip(found.ticks, lasts, strict=True)):
                positions = found.positions[look]
                kinds = np.where(np.isin(positions, found.note), 2, found.novel[look] * 1)
                if policy == "sink_recent":  # its scores are positions
                    kinds = np.where(kinds == 2, 2, 0)
                shown = kinds == kind
                lines += [((tick, p), (last, p)) for p in positions[shown]]
                bright += found.brightness[look][shown].tolist()
            panel.add_collection(
                LineCollection(
                    lines,
                    colors=_colours(shades, bright),
                    linewidths=width,
                    capstyle="butt",
                    rasterized=True,
                )
            )
        panel.set_xlim(0, found.ticks[-1] + EVERY)
        panel.set_ylim(PRIMED + found.ticks[-1] + 10, -10)
        panel.set_xlabel("tick")
        panel.set_title(f"cull={policy}: {POLICIES[policy]}", fontsize=10)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylabel("position in the text")
    handles = [
        plt.Line2D([], [], color=shades(0.8), linewidth=3, label=label)
        for shades, label in (
            (BLUES, "a remembered row (darker: brighter)"),
            (ORANGES, "kept because it was novel"),
            (REDS, "the note"),
        )
    ]
    figure.legend(handles=handles, loc="lower center", ncol=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _colours(shades: Colormap, bright: list[float]) -> Any:
    return ScalarMappable(Normalize(0, BRIGHT), shades).to_rgba(np.array(bright))


def main() -> None:
    """Makes the picture."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / "memory.png"
    passage = (HERE.parent / "tests" / "golden" / "passage.txt").read_text("utf-8")
    lives = {policy: life(policy, passage) for policy in POLICIES}
    draw(lives, path)


if __name__ == "__main__":
    main()
