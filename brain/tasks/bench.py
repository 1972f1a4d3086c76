"""``task=bench``: tokens per second of decode and prefill, beside transformers, from one run.

Each engine runs in a process of its own, one at a time, in alternation, so that a drift of the
machine meets all of them. Medians over all repetitions are reported, and ratios to the last engine
in the list.
"""

import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from tqdm import tqdm

from brain.errors import Refused
from brain.tasks.bench_engine import WARM_UP_TOKENS, Job
from brain.terminal import note
from conf.schema import BenchTask, Conf

OURS = ("eager", "compiled")
PEERS = ("transformers-dynamic", "transformers-static-compiled")


def run(conf: Conf, run_dir: Path) -> None:
    """Prints one table; writes ``bench.json``. Raises Refused for an unknown engine."""
    task = cast(BenchTask, conf.task)
    _check(task, conf)
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("task")]
    engines = [e for e in task.engines if e in OURS or importlib.util.find_spec("transformers")]
    for missing in set(task.engines) - set(engines):
        note(f"{missing} is missing: install positronic-brain[reference]")
    results: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    with tqdm(total=task.repeats * len(engines), unit="run", desc="timing") as bar:
        for _ in range(task.repeats):
            for engine in engines:
                bar.set_postfix_str(engine)
                job = Job(engine, overrides, task.context, task.prefill, task.tokens)
                results[engine].append(_result(job))
                bar.update()
    rows = [_row(engine, results[engine], task) for engine in engines]
    _print_table(rows, conf, task)
    report = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "task": dataclasses.asdict(task),
        "dtype": conf.dtype.value,
        "capacity": conf.capacity,
        "command": ["brain", *HydraConfig.get().overrides.task],
        "engines": rows,
        "runs": results,
    }
    (run_dir / "bench.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def _check(task: BenchTask, conf: Conf) -> None:
    for engine in task.engines:
        if engine not in OURS + PEERS:
            raise Refused(f"task.engines: {engine!r} is unknown; use {', '.join(OURS + PEERS)}")
    for name in ("context", "prefill", "tokens", "repeats"):
        if getattr(task, name) < 1:
            raise Refused(f"task.{name} must be at least 1, not {getattr(task, name)}")
    needed = max(task.prefill, task.context + task.tokens + WARM_UP_TOKENS)
    if needed > conf.capacity:
        raise Refused(f"this benchmark needs capacity={needed} or more, not {conf.capacity}")


def _result(job: Job) -> dict[str, Any]:
    arguments = [sys.executable, "-m", "brain.tasks.bench_engine", json.dumps(vars(job))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Refused(f"{job.engine} failed: {last}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _row(engine: str, runs: list[dict[str, Any]], task: BenchTask) -> dict[str, Any]:
    def median(key: str) -> float:
        seconds: list[float] = [second for run in runs for second in run[key]]
        return statistics.median(seconds)

    per_run = [1 / statistics.median(run["token_seconds"]) for run in runs]
    return {
        "engine": engine,
        "tokens_per_second": 1 / median("token_seconds"),
        "slowest_run": min(per_run),
        "fastest_run": max(per_run),
        "prefill_tokens_per_second": task.prefill / median("prefill_seconds"),
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
        "open_seconds": statistics.median(run["open_seconds"] for run in runs),
        "capture_seconds": statistics.median(run["capture_seconds"] for run in runs),
    }


def _print_table(rows: list[dict[str, Any]], conf: Conf, task: BenchTask) -> None:
    base = rows[-1]
    print(
        f"{conf.model.name} {conf.dtype.value}, {task.context} tokens in context, "
        f"capacity {conf.capacity}, prefill of {task.prefill}; a token of ours is a whole tick"
    )
    print(
        f"{'engine':<30} {'tok/s':>7} {'(runs)':>15} {'ratio':>6} {'prefill tok/s':>14} "
        f"{'ratio':>6} {'peak MB':>8} {'ready s':>8}"
    )
    for row in rows:
        spread = f"{row['slowest_run']:.1f}–{row['fastest_run']:.1f}"
        print(
            f"{row['engine']:<30} {row['tokens_per_second']:>7.1f} {spread:>15} "
            f"{row['tokens_per_second'] / base['tokens_per_second']:>6.2f} "
            f"{row['prefill_tokens_per_second']:>14.0f} "
            f"{row['prefill_tokens_per_second'] / base['prefill_tokens_per_second']:>6.2f} "
            f"{row['peak_rss_mb']:>8} {row['open_seconds'] + row['capture_seconds']:>8.1f}"
        )


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            names = [line.split(":", 1)[1].strip() for line in cpuinfo if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
