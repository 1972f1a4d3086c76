"""PyTorch's profiler: a watch over some ticks, and its trace as ranges with kernels.

On a GPU a kernel is a kernel. On a CPU it is a compiled loop nest or an operator that computes
something: views, allocations and looks at one number are not counted, nor what an operator calls
inside.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from brain.loop import TICK
from brain.measure.profiling.ranges import Kernel, Range, with_kernels
from compiled import torch_private
from compiled.graphs import Ranges

Event = dict[str, Any]


def profiler_ranges() -> Ranges:
    """Ranges that PyTorch's profiler records."""
    naming: Ranges = torch.profiler.record_function
    return naming


def record(run: Callable[[], None], device: torch.device, path: Path) -> list[Range]:
    """Watches a run; writes a Chrome trace and returns its ranges."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    torch_private.silence_profiler()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profile.export_chrome_trace(str(path))
    return ranges_of_trace(json.loads(path.read_text("utf-8"))["traceEvents"])


def ranges_of_trace(events: Iterable[Event]) -> list[Range]:
    """The ranges of the thread that ticks, with their kernels."""
    whole = [event for event in events if event.get("ph") == "X"]
    threads = {e["tid"] for e in whole if e.get("cat") == RANGES and e["name"] == TICK}
    here = [event for event in whole if event["tid"] in threads]
    ranges = [Range(e["name"], e["ts"], e["ts"] + e["dur"]) for e in here if e.get("cat") == RANGES]
    on_device = [event for event in whole if event.get("cat") == "kernel"]
    if on_device:
        kernels = _device_kernels(whole, on_device)
    else:
        kernels = _host_kernels([event for event in here if event.get("cat") == "cpu_op"])
    return with_kernels(ranges, kernels)


RANGES = "user_annotation"


def _device_kernels(events: Iterable[Event], kernels: Iterable[Event]) -> list[Kernel]:
    """Each kernel at the time of the call that launched it: of a graph's, the graph's launch."""
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    return [
        Kernel(launches[kernel["args"]["correlation"]], kernel["dur"])
        for kernel in kernels
        if kernel["args"].get("correlation") in launches
    ]


def _host_kernels(operators: Iterable[Event]) -> list[Kernel]:
    kernels: list[Kernel] = []
    computes: dict[str, bool] = {}
    until = float("-inf")
    for event in sorted(operators, key=lambda e: (e["ts"], -e["dur"])):
        name = event["name"]
        if name not in computes:
            computes[name] = _computes(name)
        if computes[name] and event["ts"] >= until:
            kernels.append(Kernel(event["ts"]))
            until = event["ts"] + event["dur"]
    return kernels


def _computes(name: str) -> bool:
    """Whether an operator does more than allocate, or look at the same numbers in another way."""
    if "cpp_fused" in name:
        return True
    if "::" not in name or name.startswith(("aten::empty", "aten::item", "aten::_local_scalar")):
        return False
    return torch_private.computes(name)
