"""What reading by chunks costs, beside single ticks: ``python profiles/chunk_loss.py TEXT``.

The same facts are planted in the same excerpts, and every chunk size reads them with the default
model and engine. Printed are nats per token and the share of facts whose answer ranks first of ten,
by distance in memory sizes; then the difference to single ticks with the half-width of its 95%
interval, paired by blocks of 64 tokens and by facts; then one JSON line.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import brain
from brain import Brain
from brain.measure.evaluation import retrieval
from brain.measure.evaluation.facts import KINDS, Fact
from brain.measure.evaluation.fluency import BLOCK
from brain.measure.evaluation.measures import plant
from brain.measure.evaluation.retrieval import Course
from brain.measure.evaluation.texts import excerpts, read_text
from conf.schema import EvalTask

DISTANCES = (1.0, 2.0, 4.0, 8.0)
SPACING = 4.0


def lived(
    b: Brain, ids: Sequence[int], facts: Sequence[Fact], course: Course, bar: Any
) -> tuple[list[float], list[tuple[int, bool]]]:
    """Nats of a stream from the first fact on, and of every question its distance and whether the
    right answer ranked first.
    """
    b.prime(ids[: course.starts[0]])
    at, nats, found = course.starts[0], [], []
    for index, number, distance in course.questions():
        for part in b.feed_in_chunks(ids[at : index + 1]) if at <= index else ():
            nats += part
            at += len(part)
            bar.update(len(part))
        fact = facts[number]
        asked = [int(b.cursor.token), *fact.question]
        first = int(b.cursor.position)
        told = b.read(asked, range(first, first + len(asked))).logits[-1]
        scores = told[list(fact.options)]
        found.append((distance, bool(scores[0] > scores[1:].max())))
    return nats, found


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval."""
    spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), 1.96 * spread / math.sqrt(len(differences))


def blocks(nats: Sequence[float]) -> list[float]:
    """Means of blocks: neighbours are alike."""
    return [statistics.fmean(nats[i : i + BLOCK]) for i in range(0, len(nats) - BLOCK + 1, BLOCK)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32], help="beside 1")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--facts", type=int, default=3, help="of each stream")
    parser.add_argument("--cull", default="novelty")
    given = parser.parse_args()
    common = {"capacity": given.rows, "cull": given.cull}
    brains = {c: brain.open("smollm2", **common, **{"cull.chunk": c}) for c in (1, *given.chunks)}
    b = brains[1]
    ids = b.encode(read_text(given.text))
    task = EvalTask(streams=given.streams, facts=given.facts, budgets=[given.rows])
    task.distances, task.spacing = list(DISTANCES), SPACING
    facts, courses = plant(b.checkpoint, task, KINDS, seed=0)
    course = courses[given.rows]
    texts = excerpts(ids, given.streams, course.length, str(given.text))
    planted = retrieval.planted(texts, facts, course).tolist()
    nats: dict[int, list[float]] = {chunk: [] for chunk in brains}
    found: dict[int, list[tuple[int, bool]]] = {chunk: [] for chunk in brains}
    total = len(brains) * given.streams * (course.length - course.starts[0])
    with tqdm(total=total, unit="token", disable=None) as bar:
        for stream, of_stream in zip(planted, facts, strict=True):
            for chunk, reader in brains.items():
                told, answers = lived(reader, stream, of_stream, course, bar)
                nats[chunk] += blocks(told)
                found[chunk] += answers
    print(f"{'chunk':>5} {'nats':>8} {'difference':>18}  recall at {DISTANCES} memories")
    rows = []
    for chunk in brains:
        shares = [
            statistics.fmean(right for distance, right in found[chunk] if distance == wanted)
            for wanted in course.distances
        ]
        worse = interval([a - b for a, b in zip(nats[chunk], nats[1], strict=True)])
        lost = interval(
            [float(b[1]) - float(a[1]) for a, b in zip(found[chunk], found[1], strict=True)]
        )
        mean = statistics.fmean(nats[chunk])
        print(
            f"{chunk:>5} {mean:>8.4f} {worse[0]:>+9.4f} ± {worse[1]:.4f}  "
            + " ".join(f"{share:.3f}" for share in shares)
            + f"  lost {100 * lost[0]:+.1f} ± {100 * lost[1]:.1f} points"
        )
        rows.append({"chunk": chunk, "nats": mean, "worse": worse, "recall": shares, "lost": lost})
    settings = {name: value for name, value in vars(given).items() if name != "text"}
    print(json.dumps({"settings": settings, "distances": course.distances, "rows": rows}))


if __name__ == "__main__":
    main()
