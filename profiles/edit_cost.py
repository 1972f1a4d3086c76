"""What an edit costs at different capacities: ``python profiles/edit_cost.py``.

A brain of toy weights is half full of rows, put there without reading them. Then each action is
applied to one row, in alternation over the capacities. An edit must cost what it touches: a million
slots may cost half a millisecond more than a thousand. Append and replace read first; what that
read costs over a million slots is no part of it, so for these two the read is taken off. Prints a
table and one JSON line. An argument names the engine: eager (the default) or compiled.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from brain import Append, Boost, Brain, Cull, Pin, Redact, Replace
from brain.actions import Action
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.measure.golden.seeded import SeededModel
from brain.memory import Account
from compiled.graphs import Graphs, Uncaptured
from compiled.llama import LlamaConfig

CAPACITIES = (1024, 65536, 1 << 20)
ROUNDS = 40
TOY = LlamaConfig(40, 24, 20, 2, 4, 2, 8, 1e-5, 1e4, 1 << 30, None, False)


def brain_of(capacity: int, engine: str) -> Brain:
    """A brain with rows in half of its slots."""
    overrides = [f"capacity={capacity}", f"engine={engine}", "device=cpu", "dtype=float32"]
    conf = compose_conf([*overrides, "cull=none", f"engine.smallest_bucket={capacity}"])
    settings = settings_of(conf)
    b = Brain(SeededModel("toy", TOY, seed=3).checkpoint(settings.dtype, settings.device), settings)
    rows = capacity // 2
    b.prime([7])
    b.state.valid[:rows] = True
    b.state.token_id[:rows] = 7
    b.state.position[:rows] = torch.arange(rows)
    b.cursor.position.fill_(rows - 1)
    b.memory.account = Account(rows, rows, 0, rows - 1)
    return b


class Reads:
    """Time spent reading what is to be remembered, in seconds."""

    def __init__(self, b: Brain) -> None:
        self.seconds = 0.0
        self._on_gpu = b.device.type == "cuda"
        owners: tuple[Graphs | Uncaptured, ...] = (b.graphs, b.graphs.uncaptured)
        for owner in owners:
            owner.scored_prefill = self.timed(owner.scored_prefill)  # type: ignore[method-assign]
        b.memory.logits_after = self.timed(b.memory.logits_after)  # type: ignore[method-assign]

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its time added up."""

        def run(*arguments: Any, **named: Any) -> Any:
            self._wait()
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self._wait()
                self.seconds += time.perf_counter() - start

        return run

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def actions(number: int) -> dict[str, list[Action]]:
    """One action each, for a round: never of a row that an earlier round has removed."""
    at = 8 + 5 * number
    return {
        "cull": [Cull([at])],
        "redact": [Redact([at + 1])],
        "pin": [Pin([at + 2])],
        "boost": [Boost([at + 3], 1.0)],
        "replace": [Replace([at + 4], [9])],
        "append": [Append([9])],
        "tick": [],
    }


def main() -> None:
    """Times every action at every capacity and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", nargs="?", default="eager", choices=("eager", "compiled"))
    engine = parser.parse_args().engine
    brains = {capacity: brain_of(capacity, engine) for capacity in CAPACITIES}
    reads = {capacity: Reads(b) for capacity, b in brains.items()}
    first: dict[int, float] = {}
    seconds: dict[tuple[str, int], list[float]] = {}
    for capacity, b in brains.items():
        start = time.perf_counter()
        b.patch([Boost([0], 1.0)])  # the first edit looks at the whole mirror
        first[capacity] = (time.perf_counter() - start) * 1e3
    for number in tqdm(range(ROUNDS), desc="timing", unit="round"):
        for capacity, b in brains.items():
            for name, batch in actions(number).items():
                reads[capacity].seconds = 0.0
                start = time.perf_counter()
                if batch:
                    b.patch(batch)
                else:
                    _ = b.tick().token
                taken = time.perf_counter() - start - reads[capacity].seconds
                seconds.setdefault((name, capacity), []).append(taken)
    medians = {key: statistics.median(times[3:]) * 1e3 for key, times in seconds.items()}
    print(f"{'ms':<8}" + "".join(f"{capacity:>11,}" for capacity in CAPACITIES) + f"{'more':>9}")
    print(f"{'first':<8}" + "".join(f"{first[capacity]:>11.2f}" for capacity in CAPACITIES))
    names = list(actions(0))
    for name in names:
        row = [medians[name, capacity] for capacity in CAPACITIES]
        print(f"{name:<8}" + "".join(f"{ms:>11.2f}" for ms in row) + f"{row[-1] - row[0]:>9.2f}")
    table = {name: [medians[name, capacity] for capacity in CAPACITIES] for name in names}
    print(json.dumps({"torch": torch.__version__, "engine": engine, "milliseconds": table}))


if __name__ == "__main__":
    main()
