"""``task=profile``: where the time of a tick goes, step by step.

Alone it watches with PyTorch's profiler. With ``nvtx=true`` it leaves the watching to Nsight
Systems, which ``profiles/nsys.sh`` starts around it, and only names the ranges.
"""

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from brain.auto import resolved
from brain.brain import Brain
from brain.config.settings import engine_name
from brain.errors import Refused
from brain.machine.environment import environment
from brain.measure.profiling.picture import draw_timeline
from brain.measure.profiling.ranges import legible, summary, table
from brain.measure.profiling.trace import profiler_ranges, record
from brain.opening import open_brain
from brain.terminal import capture_graphs, note
from compiled import torch_private
from conf.schema import Conf, ProfileTask, WeightFormat

UNWATCHED_TICKS = 5
"""Ticks before those that are timed: the first runs of CUDA graphs and of a cold cache differ."""


def run(conf: Conf, run_dir: Path) -> None:
    """Prints the table of a tick; writes ``trace.json``, ``profile.json`` and ``timeline.png``; for
    Nsight Systems none of these. Raises Refused.
    """
    task = cast(ProfileTask, conf.task)
    _check(task, conf)
    note(f"loading {conf.model.name} …")
    conf = resolved(conf).conf
    brain = open_brain(conf)
    with contextlib.nullcontext() if conf.nvtx else torch_private.with_kernel_profile():
        capture_graphs(brain.graphs)
        with brain.graphs.ranges("prime"):
            brain.prime(conf.prompt, conf.source)
        naming, brain.graphs.ranges = brain.graphs.ranges, contextlib.nullcontext
        plain = [_timed(brain) for _ in range(UNWATCHED_TICKS + task.ticks)][UNWATCHED_TICKS:]
    unwatched = round(statistics.median(plain) * 1e6, 1)
    if conf.nvtx:
        brain.graphs.ranges = naming
        with _profiled(brain.device):
            for _ in range(task.ticks):
                brain.tick()
        note(f"a tick without names: {unwatched:.1f} µs; Nsight Systems has those with names")
        return
    brain.graphs.ranges = profiler_ranges()

    def ticks() -> None:
        for _ in range(task.ticks):
            brain.tick()

    ranges = record(ticks, brain.device, run_dir / "trace.json")
    brain.graphs.ranges = contextlib.nullcontext
    rows = table(ranges)
    print(legible(rows))
    print(f"a tick without the profiler: {unwatched:.1f} µs")
    here = environment(brain.device)
    report: dict[str, Any] = {
        "profiler": f"torch.profiler {here['torch']}",
        **{fact: here[fact] for fact in ("platform", "device", "threads")},
        "model": brain.checkpoint.name,
        "dtype": conf.dtype.value,
        "weights": conf.weights.value,
        "engine": engine_name(conf.engine),
        "capacity": brain.capacity,
        "rows": len(brain),
        "task": dataclasses.asdict(task),
        "unwatched_tick_microseconds": unwatched,
        "tick": summary(rows),
        "warm_up": [
            {"name": graph.name, "seconds": round(graph.seconds, 3)}
            for graph in brain.graphs.captured.values()
        ],
    }
    (run_dir / "profile.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    draw_timeline(ranges, run_dir / "timeline.png", _title(report))
    note(f"trace.json (chrome://tracing), profile.json and timeline.png are in {run_dir}")


def _check(task: ProfileTask, conf: Conf) -> None:
    if task.ticks < 1:
        raise Refused(f"task.ticks must be at least 1, not {task.ticks}")
    if conf.lookup.width:
        raise Refused("task=profile watches plain ticks: use lookup=none")
    if conf.capture:
        raise Refused("task=profile writes no captures: leave out capture=true")
    if conf.stop_at_eos:
        raise Refused("task=profile watches task.ticks ticks: leave out stop_at_eos=true")


def _timed(brain: Brain) -> float:
    """Seconds of one tick, until its token is known."""
    start = time.perf_counter()
    _ = brain.tick().token
    return time.perf_counter() - start


@contextlib.contextmanager
def _profiled(device: torch.device) -> Iterator[None]:
    """Marks what Nsight Compute records if it was started to wait for it (``profiles/ncu.sh``)."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.profiler.profile():
        yield
        torch.cuda.synchronize(device)


def _title(report: dict[str, Any]) -> str:
    form = report["weights"]
    rounded = [] if form == WeightFormat.model.value else [f"{form} weights"]
    facts = [report["model"], report["dtype"], *rounded, report["engine"], report["device"]]
    return ", ".join([*facts, report["profiler"]])
