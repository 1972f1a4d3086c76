"""How much of its speed a brain keeps beside processes that are always busy:
``python profiles/shared_machine.py``.

The default model ticks in this process: alone, beside one process, beside two, in alternation. Each
is a single thread that computes without end. Prints ticks per second, medians over the rounds, and
shares of the rate alone; then one JSON line. Arguments are overrides,
such as ``weights=int8``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

import brain
from brain import Brain

ROUNDS, SECONDS, NEIGHBOURS = 5, 4.0, 2
BUSY = "while True: pass"
PROMPT = "The sea was calm that morning, and the harbour was full of boats. " * 30


def rate(b: Brain, neighbours: int) -> float:
    """Ticks per second beside so many busy processes."""
    with ExitStack() as stack:
        for _ in range(neighbours):
            process = subprocess.Popen([sys.executable, "-c", BUSY])
            stack.callback(process.wait)
            stack.callback(process.kill)
        time.sleep(0.5)  # until they are busy
        for _ in range(3):
            assert b.tick().text is not None
        ticks, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            assert b.tick().text is not None
            ticks += 1
        return ticks / (time.perf_counter() - start)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("override", nargs="*", help="such as weights=int8 or engine=compiled")
    given: dict[str, Any] = dict(text.split("=", 1) for text in parser.parse_args().override)
    b = brain.open("smollm2", **given)
    b.prime(PROMPT)
    counts = range(1 + NEIGHBOURS)
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in tqdm(range(ROUNDS), unit="round", disable=None):
        for count in counts:
            rates[count].append(rate(b, count))
    medians = {count: statistics.median(found) for count, found in rates.items()}
    print(f"{'busy processes':>14} {'ticks/s':>8} {'(rounds)':>12} {'of alone':>9}")
    for count, found in rates.items():
        spread = f"{min(found):.1f}–{max(found):.1f}"
        share = medians[count] / medians[0]
        print(f"{count:>14} {medians[count]:>8.1f} {spread:>12} {share:>9.2f}")
    print(json.dumps({"overrides": given, "ticks_per_second": rates}))


if __name__ == "__main__":
    main()
