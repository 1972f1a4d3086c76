"""Which rows hold a fact? The ingredients of ``cull=novelty`` in turn, without running a loop.

    python profiles/novelty_kernels.py TEXT [trials]

A text with one fact in it is remembered whole. Then a memory of 256 rows is made of it: the first
four, the most novel by some score, and the newest; and the question is read against those alone.
That is what a static score leaves of the text after so many ticks, but for keys and values being
those of the whole text, so the numbers are somewhat better than the loop's. In return dozens of
scores can be compared in minutes.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import brain
from brain.measure.evaluation.facts import KINDS, make_facts
from brain.measure.evaluation.texts import read_text
from compiled.read import read
from compiled.state import State

BUDGET, SINKS, BEFORE = 256, 4, 300
DISTANCES = (512, 1024, 2048)
QUOTAS = (64, 96, 128)

Column = npt.NDArray[np.float64]


def mean_before(surprise: Column, decay: float) -> Column:
    """Exponential mean of surprise up to each row."""
    mean, told = 0.0, []
    for nats in surprise:
        mean = decay * mean + (1 - decay) * nats
        told.append(mean)
    return np.array(told)


def mean_after(surprise: Column, decay: float) -> Column:
    """The same from each row on."""
    return mean_before(surprise[::-1], decay)[::-1]


def around(surprise: Column, decay: float) -> Column:
    """Both."""
    return mean_before(surprise, decay) + mean_after(surprise, decay)


SCORES: dict[str, Callable[[Column], Column]] = {
    "own surprise": lambda s: s,
    "mean before, 0.9": lambda s: mean_before(s, 0.9),
    "mean before, 0.93": lambda s: mean_before(s, 0.93),
    "mean after, 0.93": lambda s: mean_after(s, 0.93),
    "around, 0.85": lambda s: around(s, 0.85),
    "around, 0.9": lambda s: around(s, 0.9),
    "around, 0.93": lambda s: around(s, 0.93),
    "around, 0.96": lambda s: around(s, 0.96),
    "around, 0.93, + own": lambda s: around(s, 0.93) + 0.3 * s,
    "around, 0.93, capped at 8": lambda s: around(np.minimum(s, 8.0), 0.93),
}


def kept(score: Column, quota: int) -> list[int]:
    """Indices of the rows that are left of a text."""
    newest = len(score) - (BUDGET - SINKS - quota)
    old = np.arange(SINKS, newest)
    best = old[np.argsort(-score[old], kind="stable")[:quota]]
    return [*range(SINKS), *sorted(best.tolist()), *range(newest, len(score))]


def main() -> None:
    """Prints a row per score and quota: recall at each distance."""
    text = read_text(Path(sys.argv[1]))
    trials = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    b = brain.open(capacity=BEFORE + 100 + DISTANCES[-1], dtype="bfloat16", cull="none")
    config, weights = b.checkpoint.config, b.checkpoint.weights
    ids = b.encode(text)
    hits: dict[tuple[str, int, int], list[bool]] = {}
    for trial in range(trials):
        kinds = [KINDS[trial % len(KINDS)]]
        (fact,) = make_facts(b.tokenizer, 1, kinds, f"kernels {trial}")
        start = random.Random(trial).randrange(len(ids) - BEFORE - DISTANCES[-1])
        excerpt = ids[start : start + BEFORE + DISTANCES[-1]]
        stream = [*excerpt[:BEFORE], *fact.statement, *excerpt[BEFORE:]]
        b.prime(stream)
        surprise = b.mirror.surprise.astype(np.float64)
        question = torch.tensor(fact.question)
        for distance in DISTANCES:
            end = BEFORE + len(fact.statement) + distance
            for name, score in SCORES.items():
                for quota in QUOTAS:
                    rows = torch.tensor(kept(score(surprise[:end]), quota))
                    left = State(*(t.index_select(2 if t.dim() == 4 else 0, rows) for t in b.state))
                    positions = torch.arange(end, end + len(question))
                    length = torch.tensor(len(question))
                    told = read(
                        config, weights, left, question, positions, length, bucket=BUDGET
                    ).logits[-1][list(fact.options)]
                    hits.setdefault((name, quota, distance), []).append(int(told.argmax()) == 0)
        print(f"{trial + 1} of {trials}", file=sys.stderr)
    print(f"{'score':<28} {'rows':>5}" + "".join(f"{d / BUDGET:>8g}×" for d in DISTANCES))
    for name in SCORES:
        for quota in QUOTAS:
            shares = [np.mean(hits[name, quota, distance]) for distance in DISTANCES]
            print(f"{name:<28} {quota:>5}" + "".join(f"{share:>9.2f}" for share in shares))


if __name__ == "__main__":
    main()
