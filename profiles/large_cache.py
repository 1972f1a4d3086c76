"""The rule, on a cache of tens of gigabytes: nothing that could not be done a hundred times a
second.

    python profiles/large_cache.py --slots 300000 --out profiles/results/large-cache.json

A full memory in the shape of Llama 3 8B, without the model. Captured as in a brain, and timed as
the device sees it: the patch that forgets a row and puts another in its place; steps 2 and 3,
brightness and the decision; all of them in a row, as in a tick; and the attention of one token with
every row of every layer, beside the time in which as many bytes can be read. Exits 1 if the patch
allocates in proportion to the cache, or if it or a whole tick without the model is slower than the
rule. On a CPU give few slots.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.measure.bench.memory_reader import read_memory
from compiled.attention import attend, visibility
from compiled.capture import Graph
from compiled.choose import Choice, Forced, choose
from compiled.graphs import Graphs
from compiled.llama import LlamaConfig, Weights, weight_shapes
from compiled.philox import key_of
from compiled.plan import Plan
from compiled.read import Reading
from compiled.sample import Sampling
from compiled.state import State, addresses, allocate_cursor, allocate_state, state_bytes

RULE = 100
"""Times a second."""
ROUNDS, PER_ROUND = 15, 20
VOCABULARY = 128
"""Small: steps 2 and 3 are to be seen, not the sampler's."""
LLAMA_8B = LlamaConfig(VOCABULARY, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, 8192)


def full(state: State) -> None:
    """Rows in every slot, in no order, all numbers ordinary."""
    capacity, device = state.capacity, state.valid.device
    for layer in (*state.keys, *state.values):
        layer.normal_()
    for column in (state.brightness, state.surprise, state.novelty):
        column.uniform_(0, 9)
    state.position.copy_(torch.randperm(capacity, device=device))
    state.token_id.random_(0, VOCABULARY)
    state.valid.fill_(True)


class Subject:
    """A memory, its graphs, and a reading of it."""

    def __init__(self, slots: int, layers: int, device: torch.device) -> None:
        config = LlamaConfig(**{**vars(LLAMA_8B), "num_layers": layers})
        self.config, self.device = config, device
        sizes = [f"capacity={slots}", f"engine.smallest_bucket={slots}"]
        conf = compose_conf([*sizes, "device=cpu", "engine=eager", "dtype=float32"])
        settings = settings_of(conf)
        self.state = allocate_state(config, slots, torch.bfloat16, device)
        full(self.state)
        cursor = allocate_cursor(device)
        cursor.position.fill_(slots)
        cursor.uncommitted.fill_(1)
        number = torch.tensor(1.0, device=device)
        sampling = Sampling(number, number, number * 0, number, key_of(0).to(device))
        nothing = torch.zeros(1, device=device)
        weights = Weights(*(nothing for _ in weight_shapes(config)))
        spec = dataclasses.replace(settings.graphs, compiled=True)
        self.graphs = Graphs(spec, config, weights, self.state, cursor, sampling)
        chosen = partial(choose, method=spec.method, eviction=spec.eviction)
        self.choose = Graph("choose", chosen, device)
        self.sampling = sampling
        rows = (layers, config.num_kv_heads, 1, config.head_dim)
        mass = torch.rand(slots, device=device) / slots
        new = torch.randn(rows, dtype=torch.bfloat16, device=device)
        logits = torch.randn(1, VOCABULARY, device=device)
        self.reading = Reading(logits, new, new.clone(), mass, nothing)
        unforced = torch.full((1,), -1, dtype=torch.int64, device=device)
        self.forced = Forced(unforced, torch.zeros(1, dtype=torch.uint8, device=device))
        self.plan: Plan = self.decide()
        self.plan = Plan(*(_copied(part) for part in self.plan))

    def decide(self) -> Plan:
        """Steps 2 and 3."""
        self.graphs.begin_step()
        bound = (self.state, self.graphs.cursor, self.reading, self.sampling, self.forced)
        choice: Choice = self.choose(*bound)
        return choice.plan(self.reading)

    def patch(self) -> None:
        """Step 4, of the same plan every time: one row of it goes, one comes."""
        self.graphs.begin_step()
        self.graphs.patch(self.plan)

    def tick(self) -> None:
        """Steps 2 to 4."""
        self.graphs.patch(self.decide())


def _copied(part: Any) -> Any:
    """Of a tensor, or of a tuple or dict of them; None stays."""
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, dict):
        return {name: _copied(inner) for name, inner in part.items()}
    return type(part)(*map(_copied, part)) if isinstance(part, tuple) else part


def milliseconds(call: Callable[[], object], device: torch.device, per_round: int) -> float:
    """Of one call among many that are sent one after another: the median of the rounds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(5):  # captured, and past the first runs of a CUDA graph
        call()
    rounds = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(per_round):
            call()
        wait()
        rounds.append((time.perf_counter() - start) / per_round * 1e3)
    return statistics.median(rounds)


def allocated(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that a call had beyond those that were there before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def attention(subject: Subject) -> Callable[[], object]:
    """One token's attention with all layers, captured by the same compiler."""
    state, config, device = subject.state, subject.config, subject.device
    query = torch.randn(1, config.num_heads, config.head_dim, device=device).bfloat16()
    new = torch.randn(config.num_kv_heads, 1, config.head_dim, device=device).bfloat16()
    where = torch.full((1,), state.capacity, dtype=torch.int64, device=device)
    length = torch.ones((), dtype=torch.int64, device=device)

    def layer(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        visible = visibility(state.valid, state.position, where, length)
        return attend(query, keys, values, new, new, visible)

    compiled = torch.compile(layer, fullgraph=True, dynamic=False)

    def every_layer() -> None:
        for keys, values in zip(state.keys, state.values, strict=True):
            compiled(keys, values)

    return every_layer


def measure(slots: int, layers: int, device: torch.device) -> dict[str, Any]:
    """Everything, as numbers for a JSON file."""
    subject = Subject(slots, layers, device)
    before = addresses(subject.state)
    cache = subject.state.keys.nbytes + subject.state.values.nbytes
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "slots": slots,
        "layers": layers,
        "cache_gb": cache / 1e9,
        "state_gb": state_bytes(subject.config, slots, torch.bfloat16) / 1e9,
    }
    calls = {"decide": subject.decide, "patch": subject.patch, "decide_and_patch": subject.tick}
    for name, call in calls.items():
        ms = milliseconds(call, device, PER_ROUND)
        report[name] = {"milliseconds": ms, "per_second": 1e3 / ms}
        report[name]["allocated_bytes"] = allocated(call, device)
    assert int(subject.state.valid.sum()) == slots, "a tick forgets one row and remembers one"
    assert addresses(subject.state) == before
    ms = milliseconds(attention(subject), device, 2)
    size = min(cache, 8 << 30)
    limit = size / statistics.median(read_memory(size, device)[0]) / 1e9
    report["attention"] = {
        "milliseconds": ms,
        "per_second": 1e3 / ms,
        "gb_per_second": cache / ms / 1e6,
        "limit_gb_per_second": limit,
        "share_of_limit": cache / ms / 1e6 / limit,
    }
    return report


def broken(report: dict[str, Any]) -> list[str]:
    """What does not keep the rule."""
    found = []
    for name in ("patch", "decide_and_patch"):
        rate = report[name]["per_second"]
        if rate < RULE:
            found.append(f"{name}: {rate:.0f} a second, not {RULE}")
        extra = report[name]["allocated_bytes"] or 0
        if extra > report["cache_gb"] * 1e9 / 100:
            found.append(f"{name}: allocates {extra} bytes, a hundredth of the cache or more")
    return found


def main() -> None:
    """Measures, prints a line for each, writes the report."""
    parser = argparse.ArgumentParser(description="patches a second on a cache of tens of gigabytes")
    parser.add_argument("--slots", type=int, default=300_000)
    parser.add_argument("--layers", type=int, default=LLAMA_8B.num_layers)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    report = measure(asked.slots, asked.layers, torch.device(asked.device))
    print(
        f"{report['device']}, {asked.slots} slots, {report['cache_gb']:.2f} GB of keys and values"
    )
    for name in ("decide", "patch", "decide_and_patch", "attention"):
        told = report[name]
        print(f"{name:>17}: {told['milliseconds']:.3f} ms, {told['per_second']:.0f} a second")
    print(f"attention: {report['attention']['share_of_limit']:.0%} of the bytes limit")
    report["broken"] = broken(report)
    if asked.out is not None:
        asked.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if report["broken"]:
        sys.exit("; ".join(report["broken"]))


if __name__ == "__main__":
    main()
