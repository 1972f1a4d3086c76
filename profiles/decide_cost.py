"""The user's rule: score, decision and patch, more than a hundred times a second at 65,536 slots.

    python profiles/decide_cost.py

For each capacity and policy: milliseconds of steps 2, 3 and 4 of one tick (brightness, keep-scores,
which row to forget, and the patch that forgets it and appends another), compiled, with the shape of
SmolLM2-135M in bfloat16, memory full. Medians over rounds.
"""

import statistics
import time

import torch
from patch_cost import SMOLLM2
from torch import Tensor

from brain.policies import policy
from compiled.choose import Look
from compiled.patch import patch
from compiled.plan import Plan, new_rows
from compiled.read import Reading
from compiled.score import Brightness, Culling, Novelty, brighten, decide_cull, echo
from compiled.state import Cursor, State, allocate_cursor, allocate_state

CAPACITIES = (1024, 8192, 65536)
POLICIES = ("sink_recent", "brightness", "novelty", "h2o", "random")
ROUNDS, PER_ROUND = 15, 20


def full_memory(capacity: int) -> tuple[State, Cursor, Reading]:
    """A memory without a free slot, and a reading of it."""
    state = allocate_state(SMOLLM2, capacity, torch.bfloat16, torch.device("cpu"))
    cursor = allocate_cursor(torch.device("cpu"))
    state.valid.fill_(True)
    state.position.copy_(torch.randperm(capacity))
    for column in (state.brightness, state.surprise, state.novelty):
        column.uniform_(0, 9)
    cursor.position.fill_(capacity)
    shape = (SMOLLM2.num_layers, SMOLLM2.num_kv_heads, 1, SMOLLM2.head_dim)
    new = torch.ones(shape, dtype=torch.bfloat16)
    mass = torch.rand(capacity) / capacity
    return state, cursor, Reading(torch.zeros(1), new, new.clone(), mass, torch.zeros(1))


def main() -> None:
    """Prints one row per capacity and policy."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'capacity':>9} {'policy':>12} {'ms':>8} {'per second':>11}")
    for capacity in CAPACITIES:
        for name in POLICIES:
            torch._dynamo.reset()
            state, cursor, reading = full_memory(capacity)
            culling = Culling(capacity)
            keep_score = policy(name, culling, 0.25)

            def steps(state: State, cursor: Cursor, reading: Reading) -> Tensor:
                bright, lit = brighten(state, cursor.tick + 1, reading.mass, Brightness())
                novelty = echo(state, cursor.position[0], cursor.surprise[0], Novelty())
                updates = {"brightness": bright, "lit": lit, "novelty": novelty}
                look = Look(reading.mass, cursor.position[0], torch.tensor(1), cursor.tick + 1)
                scores = keep_score(state._replace(**updates), look)  # noqa: B023
                cull, culled = decide_cull(state, cursor, scores, culling)  # noqa: B023
                one = torch.ones(1)
                rows = new_rows(
                    1,
                    one.device,
                    token_id=cursor.token + 0,
                    position=cursor.position + 0,
                    brightness=one,
                    surprise=one,
                    novelty=one,
                    source=cursor.source + 0,
                    born=cursor.tick[None] + 0,
                    lit=cursor.tick[None] + 0,
                )
                following = Cursor(*(tensor + 0 for tensor in cursor))
                following = following._replace(position=cursor.position + 1)
                plan = Plan(
                    keys=reading.new_keys,
                    values=reading.new_values,
                    rows=rows,
                    length=torch.ones((), dtype=torch.int64),
                    cull=cull,
                    updates=updates,
                    cursor=following,
                    not_finite=torch.zeros((), dtype=torch.int64),
                )
                patch(state, cursor, plan)
                return culled

            compiled = torch.compile(steps, fullgraph=True, dynamic=False)
            for _ in range(5):
                compiled(state, cursor, reading)
            rounds = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                for _ in range(PER_ROUND):
                    compiled(state, cursor, reading)
                rounds.append((time.perf_counter() - start) / PER_ROUND * 1e3)
            assert int(state.valid.sum()) == capacity  # it forgets one and remembers one
            ms = statistics.median(rounds)
            print(f"{capacity:>9} {name:>12} {ms:>8.3f} {1e3 / ms:>11.0f}", flush=True)


if __name__ == "__main__":
    main()
