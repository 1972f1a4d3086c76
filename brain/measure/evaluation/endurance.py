"""Endurance: does the loop stay what it is, tick after tick?"""

import time
from collections.abc import Iterator
from typing import Any

from brain.brain import Brain
from brain.errors import Refused

GRAM = 3


def resident_bytes() -> int:
    """Resident memory of this process. Raises Refused where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            pages = int(statm.read().split()[1])
    except (OSError, ValueError, IndexError):
        raise Refused("endurance needs /proc/self/statm, which this system lacks") from None
    import resource

    return pages * resource.getpagesize()


def endure(brain: Brain, ticks: int, bucket: int) -> Iterator[dict[str, Any]]:
    """Runs a primed brain and yields an account of every ``bucket`` ticks: nats per spoken token,
    share of distinct 3-grams, ticks per second, resident memory, rows and compilations.
    """
    done = 0
    while done < ticks:
        size = min(bucket, ticks - done)
        started = time.perf_counter()
        tokens, nats = [], 0.0
        for tick in brain.stream(size):
            tokens.append(tick.token)
            nats += tick.surprise
        seconds = time.perf_counter() - started
        done += size
        grams = list(zip(*(tokens[offset:] for offset in range(GRAM)), strict=False))
        yield {
            "ticks": done,
            "nll": nats / size,
            "distinct": len(set(grams)) / max(1, len(grams)),
            "ticks_per_second": size / seconds,
            "resident_mb": resident_bytes() / 1e6,
            "rows": len(brain),
            "compilations": sum(graph.compilations for graph in brain.graphs.captured.values()),
        }
