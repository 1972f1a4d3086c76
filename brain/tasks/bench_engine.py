"""One engine, timed alone in its own process: ``python -m brain.tasks.bench_engine JOB``.

JOB is a JSON object (see :class:`Job`); the result is one JSON line on standard output. Everything
is warmed up first, and the warm-up is discarded.
"""

import dataclasses
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from brain.brain import Brain
from brain.checkpoints.wheel import converted_wheel
from brain.opening import compose_conf, open_brain
from conf.schema import Conf, Source

WARM_UP_TOKENS = 5


@dataclass(frozen=True)
class Job:
    """What to time."""

    engine: str  # eager, compiled, transformers-dynamic, transformers-static-compiled
    overrides: list[str]  # of the configuration
    context: int
    prefill: int
    tokens: int


def main() -> None:
    """Times the engine of the job on the command line."""
    job = Job(**json.loads(sys.argv[1]))
    conf = compose_conf(job.overrides)
    if conf.threads is not None:
        torch.set_num_threads(conf.threads)
    timer = _time_ours if job.engine in ("eager", "compiled") else _time_transformers
    result = timer(job, conf)
    result["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(result))


def _ids(count: int, vocab_size: int) -> list[int]:
    return random.Random(0).choices(range(vocab_size), k=count)


def _timed(call: Callable[[], Any], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def _time_ours(job: Job, conf: Conf) -> dict[str, Any]:
    engine = dataclasses.replace(conf.engine, compiled=job.engine == "compiled")
    start = time.perf_counter()
    brain: Brain = open_brain(dataclasses.replace(conf, engine=engine))
    opened = time.perf_counter() - start
    for _ in brain.warm_up():
        pass
    captured = time.perf_counter() - start - opened
    vocab_size = brain.checkpoint.config.vocab_size
    prompt = _ids(job.prefill, vocab_size)
    prefill = _timed(lambda: brain.prime(prompt), 3)
    brain.prime(_ids(job.context, vocab_size))
    _timed(brain.tick, WARM_UP_TOKENS)
    ticks = _timed(lambda: brain.tick().token, job.tokens)
    reads = _timed(brain.read, job.tokens)
    return {
        "token_seconds": ticks,
        "read_seconds": reads,
        "prefill_seconds": prefill[1:],
        "open_seconds": opened,
        "capture_seconds": captured,
    }


def _time_transformers(job: Job, conf: Conf) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    device = "cuda" if conf.device == "auto" and torch.cuda.is_available() else conf.device
    device = "cpu" if device == "auto" else device
    name = {
        Source.wheel: lambda: str(converted_wheel()),
        Source.hub: lambda: str(conf.model.repo),
        Source.folder: lambda: str(conf.model.path),
    }[conf.model.source]()
    start = time.perf_counter()
    dtype = getattr(torch, conf.dtype.value)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model = model.to(device).eval()
    opened = time.perf_counter() - start
    vocab_size = model.config.vocab_size
    static = job.engine == "transformers-static-compiled"

    def cache() -> Any:
        if static:
            return StaticCache(config=model.config, max_cache_len=conf.capacity)
        return DynamicCache(config=model.config)

    with torch.inference_mode():
        prompt = torch.tensor([_ids(job.prefill, vocab_size)], device=device)
        prefill = _timed(lambda: model(prompt, past_key_values=cache(), use_cache=True), 3)

        held = cache()
        context = torch.tensor([_ids(job.context, vocab_size)], device=device)
        token = model(context, past_key_values=held, use_cache=True).logits[:, -1:].argmax(-1)
        step = (
            torch.compile(model.__call__, mode="reduce-overhead", fullgraph=True, dynamic=False)
            if static
            else model
        )
        position = job.context

        def decode() -> int:
            nonlocal token, position
            where = torch.tensor([[position]], device=device)
            out = step(token, position_ids=where, past_key_values=held, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            position += 1
            return int(token)

        start = time.perf_counter()
        _timed(decode, WARM_UP_TOKENS)
        captured = time.perf_counter() - start
        tokens = _timed(decode, job.tokens)
    return {
        "token_seconds": tokens,
        "prefill_seconds": prefill[1:],
        "open_seconds": opened,
        "capture_seconds": captured if static else 0.0,
    }


if __name__ == "__main__":
    main()
