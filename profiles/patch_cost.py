"""What a tick's patch costs at different capacities: ``python profiles/patch_cost.py``.

The same patch (one row appended, two culled) is captured for a cache of SmolLM2's shape in
bfloat16 at each capacity and timed in alternation. Its cost must follow the rows written: a scan
of the mirror is all that grows with the capacity. Prints a table and one JSON line.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from compiled.llama import LlamaConfig
from compiled.patch import patch
from compiled.plan import Plan
from compiled.state import (
    COLUMNS,
    ROW_COLUMNS,
    Cursor,
    State,
    addresses,
    allocate_cursor,
    allocate_state,
)

CAPACITIES = (1024, 8192, 65536)
ROUNDS, PER_ROUND = 40, 25
SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, 8192, None, True)


def plan_for(state: State, cursor: Cursor) -> Plan:
    """One row to append, two to cull."""
    shape = (SMOLLM2.num_layers, SMOLLM2.num_kv_heads, 1, SMOLLM2.head_dim)
    cull = torch.zeros_like(state.valid)
    cull[[3, 7]] = True
    rows = {name: torch.ones(1, dtype=COLUMNS[name].dtype) for name in ROW_COLUMNS}
    return Plan(
        keys=torch.ones(shape, dtype=state.keys.dtype),
        values=torch.ones(shape, dtype=state.values.dtype),
        rows=rows | {"pinned": torch.zeros(1, dtype=torch.bool)},
        length=torch.ones((), dtype=torch.int64),
        cull=cull,
        updates={name: getattr(state, name).clone() for name in ("brightness", "lit", "novelty")},
        cursor=Cursor(*(tensor.clone() for tensor in cursor)),
        not_finite=torch.zeros((), dtype=torch.int64),
    )


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds per call, over one round."""
    start = time.perf_counter()
    for _ in range(PER_ROUND):
        call()
    return (time.perf_counter() - start) / PER_ROUND * 1e3


def main() -> None:
    """Times every capacity and prints the medians."""
    calls: dict[int, Callable[[], Any]] = {}
    cache_mb = {}
    for capacity in CAPACITIES:
        device = torch.device("cpu")
        state = allocate_state(SMOLLM2, capacity, torch.bfloat16, device)
        state.valid[: capacity - 8] = True  # the free slot is at the far end
        cursor = allocate_cursor(device)
        plan = plan_for(state, cursor)
        captured = torch.compile(patch, fullgraph=True, dynamic=False)
        before = addresses(state)
        captured(state, cursor, plan)
        assert addresses(state) == before
        cache_mb[capacity] = 2 * state.keys.nbytes / 1e6

        calls[capacity] = functools.partial(captured, state, cursor, plan)
    milliseconds: dict[int, list[float]] = {capacity: [] for capacity in CAPACITIES}
    for _ in tqdm(range(ROUNDS), desc="timing", unit="round"):
        for capacity, call in calls.items():
            milliseconds[capacity].append(timed(call))
    medians = {capacity: statistics.median(ms) for capacity, ms in milliseconds.items()}
    print(
        f"{'capacity':>8} {'cache MB':>9} {'ms per patch':>13} {'above ' + str(CAPACITIES[0]):>12}"
    )
    for capacity, ms in medians.items():
        above = ms - medians[CAPACITIES[0]]
        print(f"{capacity:>8} {cache_mb[capacity]:>9.0f} {ms:>13.3f} {above:>12.3f}")
    print(json.dumps({"torch": torch.__version__, "milliseconds": medians}))


if __name__ == "__main__":
    main()
