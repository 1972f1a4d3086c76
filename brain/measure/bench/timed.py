"""One engine, timed alone in its own process: ``python -m brain.measure.bench.timed JOB``.

JOB is a JSON object (see :class:`Job`); the result is one JSON line on standard output. Everything
is warmed up first, and the warm-up is discarded.
"""

import importlib
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from brain.errors import Refused
from brain.measure.bench.contestants import LLAMA_CPP, MEMORY, OURS
from brain.measure.bench.engine import Engine
from brain.measure.bench.job import WARM_UP_TOKENS, Job

PREFILLS = 2
WARM_UP_PREFILL = 64
"""Tokens of a first prompt, which is discarded."""

ENOUGH_SECONDS = 4.0
FEWEST_TOKENS = 8
"""Timing ends when so much time has passed and so many tokens have been decoded: more of what is
slow says nothing new.
"""


def main() -> int:
    """Times the engine of the job on the command line; the exit status."""
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    try:
        result = _read_memory(job) if job.engine == MEMORY else _time(job)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def _time(job: Job) -> dict[str, Any]:
    open_engine = _opener(job)
    before = _resident_mb("VmRSS")
    start = time.perf_counter()
    engine = open_engine()
    opened = time.perf_counter()
    engine.capture()
    captured = time.perf_counter() - opened
    prefill = []
    if job.prefill:
        prompt = _ids(job.prefill, engine.vocab_size)
        engine.prime(prompt[:WARM_UP_PREFILL])
        prefill = _seconds(lambda: engine.prime(prompt), PREFILLS, fewest=1)
    tokens: dict[str, list[float]] = {}
    for count in job.counts:
        engine.prime(_ids(count, engine.vocab_size))
        first_steps = sum(_seconds(engine.step, WARM_UP_TOKENS, fewest=WARM_UP_TOKENS))
        if not tokens:
            captured += first_steps  # in which some engines compile
        tokens[str(count)] = _seconds(engine.step, job.tokens, fewest=FEWEST_TOKENS)
    return {
        "token_seconds": tokens,
        "prefill_seconds": prefill,
        "open_seconds": opened - start,
        "capture_seconds": captured,
        "weight_bytes": engine.weight_bytes,
        "row_bytes": engine.row_bytes,
        **_taken(job, before),
    }


def _taken(job: Job, before: float) -> dict[str, float]:
    """The peak of the memory that the model is in, and what was taken of it before."""
    if torch.device(job.device).type == "cuda":
        return {"peak_mb": torch.cuda.max_memory_allocated(job.device) / 1e6, "before_mb": 0.0}
    return {"peak_mb": _resident_mb("VmHWM"), "before_mb": before}


def _opener(job: Job) -> Callable[[], Engine]:
    """What opens the job's engine, its libraries being imported already: they are no part of what
    a model takes.
    """
    if job.engine in OURS:
        from brain.measure.bench.ours import Ours

        return lambda: Ours(job)
    if job.engine == LLAMA_CPP:
        importlib.import_module("llama_cpp")
        from brain.measure.bench.llama_cpp_peer import LlamaCpp

        return lambda: LlamaCpp(job)
    # An attribute, because transformers imports nothing before it is asked for.
    assert importlib.import_module("transformers").AutoModelForCausalLM
    from brain.measure.bench.transformers_peer import Transformers

    return lambda: Transformers(job)


def _read_memory(job: Job) -> dict[str, Any]:
    from brain.measure.bench.memory_reader import read_memory

    seconds, operation = read_memory(job.bytes, torch.device(job.device))
    return {"read_seconds": seconds, "operation": operation, "bytes": job.bytes}


def _ids(count: int, vocab_size: int) -> list[int]:
    """The same tokens for every engine."""
    return random.Random(0).choices(range(vocab_size), k=count)


def _seconds(call: Callable[[], Any], most: int, *, fewest: int) -> list[float]:
    """Of each call: ``most`` of them, or only ``fewest`` where they take long. Whatever a call
    starts, it waits for.
    """
    seconds: list[float] = []
    while len(seconds) < most and (len(seconds) < fewest or sum(seconds) < ENOUGH_SECONDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _resident_mb(field: str) -> float:
    """Resident memory now (``VmRSS``) or at its peak (``VmHWM``).

    Where the system has no such account: the peak, which may be that of the parent process.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
