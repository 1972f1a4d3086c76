"""What the session on a GPU measures with PyTorch, one step in one process:

    python profiles/gpu_reads.py STEP OUT         # STEP: machine, one of CASES, edits, or one read

Whole ticks of a brain whose layers are our kernels and of one whose layers PyTorch compiles, both
captured, in alternation in this process; beside each number how far its brain's own read is from
the same functions in float32. Weights are seeded and random, in the dimensions of known models.
Results go to OUT/gpu.json as they come. Environment: DEVICE (cuda), TINY=1 for sizes that a CPU
can interpret. ``gpu_session.py`` runs the steps.
"""

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import older_pytorch  # noqa: F401
import torch
from edit_cost import Reads
from gpu_session import Found
from seeded_folder import SHAPES, write_folder
from torch import Tensor

from brain import Append, Cull, Pin
from brain.actions import Action
from brain.brain import Brain
from brain.checkpoints import Checkpoint
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.machine.environment import environment
from brain.machine.memory import free_bytes
from brain.measure.bench.contestants import INT8, PRECISIONS, STATIC, row_bytes, weight_bytes
from brain.measure.bench.job import Job
from brain.measure.bench.memory_reader import copy_memory, read_memory
from brain.measure.golden.seeded import SeededModel
from brain.memory import Account
from compiled import torch_private
from compiled.int8 import quantize
from compiled.llama import LlamaConfig
from compiled.read import Reading, read

Racer = Callable[[int], dict[str, float]]
"""Makes so many ticks, and says what one took, in milliseconds, in different ways."""


@dataclass(frozen=True)
class Case:
    """What is read."""

    shape: str
    precision: str = "bfloat16"
    rows: int = 512
    slots: int = 1024
    rounds: int = 9
    ticks: int = 40  # in each round
    cache_gb: float = 0.0  # rows and slots follow from it; the rows are not read, but made up
    beside: bool = False  # also kernels that wait for each other, and transformers
    captured: bool = True
    agree: int = 16  # ticks over which two brains are held against each other
    repeated: int = 32  # reads that are to have the same bits
    profiled: int = 8  # ticks whose kernels are counted


CASES = {
    "smollm2": Case("smollm2", beside=True),
    "tinyllama": Case("tinyllama", beside=True),
    "smollm2-int8": Case("smollm2", INT8),
    "tinyllama-int8": Case("tinyllama", INT8),
    "large": Case("tinyllama", rounds=5, ticks=8, cache_gb=30.0),
    "llama-8b": Case("llama-8b", rounds=5, ticks=20),
}
TINY = LlamaConfig(64, 8, 8, 1, 2, 1, 8, 1e-5, 1e4, 8192)
"""Interpreted, a kernel takes milliseconds for each of its programs."""
COPY_BYTES, TINY_COPY_BYTES = 4 << 30, 4 << 20
WITHIN = 0.05
"""Logits and mass are right if they are off by at most this share of the largest of them: bfloat16
rounds to 2^-9 some ten times a layer."""
EDIT_ROUNDS = 15


def wait(device: torch.device) -> None:
    """For everything that has been sent to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    known = list(values)
    return {"median": median(known), "least": min(known), "most": max(known)}


# Brains ------------------------------------------------------------------------------------------


def why_no_kernels() -> str | None:
    """Why our kernels cannot run here; None where they can."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def model_of(case: Case) -> SeededModel:
    """The dimensions of a case, with weights for them."""
    config = TINY if _tiny() else SHAPES[case.shape]
    if case.cache_gb:  # positions of so many rows
        config = replace(config, max_position_embeddings=1 << 30)
    return SeededModel(case.shape, config, seed=7)


def checkpoint_of(case: Case, device: torch.device) -> Checkpoint:
    """Seeded random weights, rounded to eight bits where they are wanted."""
    found = model_of(case).checkpoint(torch.bfloat16, device)
    if case.precision != INT8:
        return found
    matrices = ("embedding", "qkv", "attention_out", "gate_up", "down", "head")
    rounded: dict[str, Any] = {name: quantize(getattr(found.weights, name)) for name in matrices}
    weights = found.weights._replace(**rounded)
    return Checkpoint(found.name, found.config, weights, found.tokenizer, found.hash_weights)


def sized(case: Case, device: torch.device, share: float) -> Case:
    """The case with rows and slots, where they follow from bytes: at most this share of those that
    are free.
    """
    if not case.cache_gb or _tiny():
        return case
    most = min(case.cache_gb * 1e9, share * (free_bytes(device) or 0))
    rows = int(most * 0.95 / row_bytes(model_of(case).config, PRECISIONS[case.precision]))
    return replace(case, rows=rows, slots=rows + rows // 20)


def opened(found: Checkpoint, case: Case, device: torch.device, *, kernels: bool) -> Brain:
    """A brain at its target of rows: each tick forgets one."""
    overrides = [
        *(f"device={device}", *PRECISIONS["bfloat16"].overrides),
        *(f"engine={'compiled' if case.captured else 'eager'}", "engine.native=false"),
        f"engine.kernels={str(kernels).lower()}",
        *(f"capacity={case.slots}", f"engine.smallest_bucket={case.slots}"),
        f"cull.target={case.rows}",
    ]
    b = Brain(found, settings_of(compose_conf(overrides)))
    begin(b, case)
    return b


def ids(count: int, vocab_size: int) -> list[int]:
    """The same tokens every time."""
    return random.Random(0).choices(range(vocab_size), k=count)


def begin(b: Brain, case: Case) -> None:
    """Rows as at the beginning: a text that is read, or, many, numbers that are made up."""
    if not case.cache_gb:
        b.prime(ids(case.rows, b.checkpoint.config.vocab_size))
        return
    b.prime([7])
    state, rows = b.state, case.rows
    torch.manual_seed(0)
    for layer in (*state.keys, *state.values):
        layer.normal_()
    for column in (state.brightness, state.surprise, state.novelty):
        column.uniform_(0, 9)
    state.position[:rows] = torch.randperm(rows, device=b.device)
    state.token_id[:rows].random_(0, b.checkpoint.config.vocab_size)
    state.valid[:rows] = True
    b.cursor.position.fill_(rows - 1)
    b.memory.account = Account(rows, rows, 0, rows - 1)


def warmed_up(b: Brain) -> float:
    """Captures its ticks: how many seconds that took."""
    start = time.perf_counter()
    for _ in b.warm_up(edits=False):
        pass
    wait(b.device)
    return time.perf_counter() - start


@contextlib.contextmanager
def one_after_another() -> Iterator[None]:
    """Brains that are made within this have kernels that begin when the one before has ended."""
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)):
        yield


# Correctness -------------------------------------------------------------------------------------


def truth(b: Brain, *, wide: bool) -> Reading:
    """What it should read, by the functions called directly: in float32, or as it is."""
    weights, state = b.checkpoint.weights, b.state
    if wide:
        fields = {
            name: field.float()
            for name, field in weights._asdict().items()
            if isinstance(field, Tensor) and name != "inverse_frequencies"
        }
        weights = weights._replace(**fields)
        state = state._replace(keys=state.keys.float(), values=state.values.float())
    asked = (b.cursor.token, b.cursor.position, b.graphs.one)
    return read(b.checkpoint.config, weights, state, *asked, bucket=b.memory.account.high_water)


def own_reading(b: Brain) -> Reading:
    """What the step reads that is timed: the very graph, and nothing of it is carried out."""
    b.graphs.begin_step()
    reading, _ = b.graphs.step(b._unforced, high_water=b.memory.account.high_water)
    return Reading(*(tensor.clone() for tensor in reading))  # or the next step would write there


def correctness(b: Brain, case: Case) -> dict[str, Any]:
    """Of the read of the very brain that is timed: logits and mass against the truth, and how many
    of a few dozen reads have the bits of the first.
    """
    wide = not case.cache_gb  # or there would be no room for it
    first, true = own_reading(b), truth(b, wide=wide)
    told: dict[str, Any] = {
        "against": f"the functions called directly in {'float32' if wide else 'bfloat16'}"
    }
    for name in ("logits", "mass"):
        ours, theirs = getattr(first, name).float(), getattr(true, name).float()
        told[f"{name}_off"] = float((ours - theirs).abs().max())
        told[f"{name}_size"] = float(theirs.abs().max())
    told["mass_sum"] = float(first.mass.sum() + first.own_mass.sum())  # of one token: 1
    told["right"] = (
        told["logits_off"] <= WITHIN * told["logits_size"]
        and told["mass_off"] <= WITHIN * told["mass_size"]
        and abs(told["mass_sum"] - 1) <= 0.01
    )
    told["repeated"] = case.repeated
    told["repeated_alike"] = sum(_same(first, own_reading(b)) for _ in range(case.repeated))
    del true
    if b.device.type == "cuda":
        torch.cuda.empty_cache()  # of the wider weights
    return told


def _same(one: Reading, other: Reading) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def agreement(one: Brain, other: Brain, case: Case) -> dict[str, Any]:
    """Two brains from the same beginning: how many tokens they speak alike; and, both told the same
    tokens, how often their likeliest token is the same one, and how much likelier the second of
    them thought its own where it is not.
    """
    spoken = 0
    for _ in range(case.agree):
        if one.tick().token != other.tick().token:
            break
        spoken += 1
    for b in (one, other):
        begin(b, case)
    same, gap = 0, 0.0
    for _ in range(case.agree):
        logits, theirs = (own_reading(b).logits[0] for b in (one, other))
        best, second = int(logits.argmax()), int(theirs.argmax())
        same += best == second
        gap = max(gap, float(theirs[second] - theirs[best]))
        for b in (one, other):
            _ = b.tick(best).token
    rows = [set(b.state.position[b.state.valid].tolist()) for b in (one, other)]
    for b in (one, other):
        begin(b, case)
    return {
        "ticks": case.agree,
        "spoken_alike": spoken,
        "likeliest_alike": same,
        "widest_gap": gap,
        "rows_of_one_alone": len(rows[0] - rows[1]),
    }


# Timing ------------------------------------------------------------------------------------------


def of_ticks(b: Brain, ticks: int) -> dict[str, float]:
    """One tick, in milliseconds: when every token is waited for, and the host's part of that; when
    the next tick is sent before the token of the last has come; and its step without the patch,
    sent again and again.
    """
    wait(b.device)
    inside, start = 0.0, time.perf_counter()
    for _ in range(ticks):
        called = time.perf_counter()
        tick = b.tick()
        inside += time.perf_counter() - called
        _ = tick.token
    waited = time.perf_counter() - start
    start = time.perf_counter()
    ahead = b.tick()
    for _ in range(ticks - 1):
        tick = b.tick()
        _ = ahead.token
        ahead = tick
    _ = ahead.token
    queued = time.perf_counter() - start
    wait(b.device)
    start = time.perf_counter()
    for _ in range(ticks):
        b.graphs.begin_step()
        b.graphs.step(b._unforced, high_water=b.memory.account.high_water)
    wait(b.device)
    stepping = time.perf_counter() - start
    taken = {"waited": waited, "host": inside, "queued": queued, "step": stepping}
    return {name: seconds / ticks * 1e3 for name, seconds in taken.items()}


def of_direct_reads(b: Brain, ticks: int) -> dict[str, float]:
    """One read whose kernels the host starts, in milliseconds."""
    asked = (b.cursor.token, b.cursor.position, b.graphs.one)
    given = (b.checkpoint.config, b.checkpoint.weights, b.state, *asked)
    wait(b.device)
    start = time.perf_counter()
    for _ in range(ticks):
        read(*given, bucket=b.capacity, decode=b.graphs.decode)
    wait(b.device)
    return {"read": (time.perf_counter() - start) / ticks * 1e3}


def alternate(
    racers: dict[str, Racer], rounds: int, ticks: int
) -> dict[str, list[dict[str, float]]]:
    """Every racer in every round, in turns forwards and backwards."""
    told: dict[str, list[dict[str, float]]] = {name: [] for name in racers}
    gc.collect()
    for number in range(rounds):
        for name in list(racers)[:: -1 if number % 2 else 1]:
            told[name].append(racers[name](ticks))
    return told


def times(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of one racer: the spread over the rounds, and ticks a second by their medians."""
    told: dict[str, Any] = {
        f"{name}_ms": spread(taken[name] for taken in rounds) for name in rounds[0]
    }
    for name in {"waited", "queued"} & rounds[0].keys():
        told[f"ticks_per_second_{name}"] = 1e3 / told[f"{name}_ms"]["median"]
    return told


def ratios(
    rounds: Sequence[dict[str, float]], to: Sequence[dict[str, float]]
) -> dict[str, dict[str, float]]:
    """How many times as long one took as the other in the same round, whatever both were timed in.
    In the host's part they are not compared.
    """
    names = sorted((rounds[0].keys() & to[0].keys()) - {"host"})
    return {
        name: spread(one[name] / two[name] for one, two in zip(rounds, to, strict=True))
        for name in names
    }


# What a tick is made of --------------------------------------------------------------------------


def kernels_of(b: Brain, ticks: int) -> dict[str, Any]:
    """Of a tick, by PyTorch's profiler: what is started, how often and for how long, and how many
    begin before the one before them has ended. On a CPU these are calls, none beside another.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = b.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        for _ in range(ticks):
            _ = b.tick().token
        wait(b.device)
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = seen.key_averages()
    found = sorted(
        ((getattr(row, attribute) / ticks, row.count / ticks, row.key) for row in rows),
        reverse=True,
    )
    ranges = []
    if on_gpu:
        kind = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        events = (event for event in seen.events() or () if event.device_type == kind)
        ranges = [(event.time_range.start, event.time_range.end) for event in events]
    started = [row for row in found if row[0] > 0]
    return {
        "per_tick": sum(count for _, count, _ in started),
        "microseconds": sum(taken for taken, _, _ in started),
        "begun_early": begun_early(ranges) / ticks,
        "longest": [
            {"name": name[:100], "per_tick": count, "microseconds": taken}
            for taken, count, name in started[:16]
        ],
    }


def begun_early(ranges: Iterable[tuple[float, float]]) -> int:
    """How many begin before the one that began last before them has ended."""
    ordered = sorted(ranges)
    return sum(start < before[1] for before, (start, _) in pairwise(ordered))


# Steps -------------------------------------------------------------------------------------------


def machine(found: Found, device: torch.device) -> None:
    """The card, its software, and the limit: a plain copy, and a plain reading."""
    names = ("triton", "numpy", "tokenizers", "hydra-core", "nvtx")
    versions = {name: _version(name) for name in names}
    found.put("environment", {**environment(device), **versions, "cuda": torch.version.cuda})
    card: dict[str, Any] = {"asked": clocks(device)}
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        card |= {
            "name": of.name,
            "compute_capability": f"{of.major}.{of.minor}",
            "multiprocessors": of.multi_processor_count,
            "memory_gb": of.total_memory / 1e9,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    found.put("card", card)
    size = TINY_COPY_BYTES if _tiny() else COPY_BYTES
    found.put("copy", {"bytes_copied": size, **copy_rate(device)})
    seconds, operation = read_memory(size, device)
    told = {"operation": operation, "gb_per_second": spread(size / s / 1e9 for s in seconds)}
    found.put("plain_reading", told)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def clocks(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of the card now; None where it is not there."""
    asked = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    asked += ",power.draw,power.limit,temperature.gpu"
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = told.stdout.splitlines()[device.index or 0].split(",")
    return dict(zip(asked.split(","), (value.strip() for value in values), strict=False))


def copy_rate(device: torch.device) -> dict[str, Any]:
    """What a plain copy moves: gigabytes read and written in a second."""
    size = TINY_COPY_BYTES if _tiny() else COPY_BYTES
    rates = spread(2 * size / s / 1e9 for s in copy_memory(size, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"gb_per_second": rates}


def reads(case: Case, found: Found, device: torch.device) -> None:
    """Ticks with our kernels beside ticks of PyTorch's, and what they read."""
    checkpoint = checkpoint_of(case, device)
    found.put("copy", copy_rate(device))
    case = sized(case, device, share=0.4)  # there are two
    config = checkpoint.config
    weights = weight_bytes(config, PRECISIONS[case.precision])
    rows = case.rows * row_bytes(config, PRECISIONS[case.precision])
    found.put("case", asdict(case))
    found.put(
        "bytes", {"weights": weights, "rows": rows, "copy_ms": _copy_ms(found, weights + rows)}
    )

    brains: dict[str, Brain] = {}
    racers: dict[str, Racer] = {}

    def enter(name: str) -> None:
        b = opened(checkpoint, case, device, kernels=name == "kernels")
        told: dict[str, Any] = {"captured": case.captured}
        try:
            told["capture_seconds"] = warmed_up(b)
        except Exception as error:
            traceback.print_exc()
            told |= {"captured": False, "failed": f"not captured: {error}".splitlines()[0]}
        if "failed" in told:  # what it reads, and by which kernels, is still worth knowing
            del b
            b = opened(checkpoint, replace(case, captured=False), device, kernels=name == "kernels")
        found.put(name, told)
        told["correct"] = correctness(b, case)
        if not told["correct"]["right"]:
            told["failed"] = "its read is not right"
        if "failed" in told:
            found.failed.append(name)
        found.put(name, told)
        brains[name], racers[name] = b, functools.partial(of_ticks, b)
        # Until it is timed beside the other; for this one it is the warm-up, too.
        found.put(name, told | times([racers[name](case.ticks)]))
        begin(b, case)

    def race() -> None:
        told = alternate(racers, case.rounds, case.ticks)
        for name, rounds in told.items():
            timed = times(rounds)
            share = found.values["bytes"]["copy_ms"] / timed["queued_ms"]["median"]
            found.put(name, found.values[name] | timed | {"share_of_copy": share})
        if len(told) == 2:
            found.put("twin_over_kernels", ratios(told["twin"], told["kernels"]))
        found.put("clocks", clocks(device))

    missing = why_no_kernels()
    if missing is None:
        found.attempt("kernels", lambda: enter("kernels"))
    else:
        found.put("kernels", {"left_out": missing})
    found.attempt("twin", lambda: enter("twin"))
    if len(brains) == 2:
        pair = (brains["kernels"], brains["twin"])
        found.attempt("agreement", lambda: found.put("agreement", agreement(*pair, case)))
    if racers:
        found.attempt("race", race)

    def count(name: str) -> None:
        found.put(f"{name}_started", kernels_of(brains[name], case.profiled))

    for name in brains if case.profiled else ():
        found.attempt(f"{name}_started", functools.partial(count, name))
    ours = brains.get("kernels")
    if case.beside and ours is not None:
        found.attempt("overlap", lambda: found.put("overlap", overlap(ours, case)))
    if case.beside:
        found.attempt("transformers", lambda: beside_transformers(ours, case, found, device))


def _copy_ms(found: Found, size: int) -> float:
    """How long as many bytes would take at the rate of a plain copy."""
    return float(size / found.values["copy"]["gb_per_second"]["median"] / 1e6)


def overlap(ours: Brain, case: Case) -> dict[str, Any]:
    """Programmatic dependent launch: kernels that may begin before the one before them has ended,
    beside those that may not, captured and started by the host.
    """
    device = ours.device
    with one_after_another():
        plain = opened(ours.checkpoint, case, device, kernels=True)
    warmed_up(plain)
    for b in (ours, plain):
        begin(b, case)
    alike = _same(own_reading(ours), own_reading(plain))
    pair = {"with": ours, "without": plain}
    rounds, ticks = -(-case.rounds // 2), case.ticks
    of_ticks(plain, ticks)
    captured = alternate(
        {name: functools.partial(of_ticks, b) for name, b in pair.items()}, rounds, ticks
    )
    direct = alternate(
        {name: functools.partial(of_direct_reads, b) for name, b in pair.items()},
        rounds,
        -(-ticks // 4),
    )
    early = {name: kernels_of(b, 1)["begun_early"] for name, b in pair.items()}
    faster = ratios(captured["with"], captured["without"])
    told: dict[str, Any] = {
        "same_bits": alike,
        "captured": {name: times(taken) for name, taken in captured.items()},
        "captured_with_over_without": faster,
        "started_by_the_host": {name: times(taken) for name, taken in direct.items()},
        "begun_early_per_tick": early,
    }
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        told["says"] = "left out: overlapping kernels need a GPU of compute capability 9.0"
        return told
    survives = early["with"] > early["without"]
    told["says"] = (
        f"programmatic dependent launch {'survives' if survives else 'does NOT survive'} capture: "
        f"{early['with']:.0f} kernels of a tick begin early, {early['without']:.0f} without it; "
        f"a captured step takes {faster['step']['median']:.3f} of its time"
    )
    return told


def beside_transformers(ours: Brain | None, case: Case, found: Found, device: torch.device) -> None:
    """StaticCache and torch.compile of transformers, the same weights: a step is a forward pass
    and an argmax; its cache grows from the same rows and forgets nothing.
    """
    if importlib.util.find_spec("transformers") is None:
        found.put("transformers", {"left_out": "transformers is not installed"})
        return
    from brain.measure.bench.transformers_peer import Transformers

    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), model_of(case))
        threads = torch.get_num_threads()
        peer = Transformers(Job(STATIC, case.precision, folder, str(device), threads, case.slots))
    prompt = ids(case.rows, peer.vocab_size)

    def step() -> int:
        if device.type == "cuda":  # or it would go on with the recording of our last tick
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return peer.step()

    def of_steps(ticks: int) -> dict[str, float]:
        peer.prime(prompt)
        step()
        start = time.perf_counter()
        for _ in range(ticks):
            step()
        return {"waited": (time.perf_counter() - start) / ticks * 1e3}

    start = time.perf_counter()
    peer.prime(prompt)
    for _ in range(4):  # compiled, recorded
        step()
    told: dict[str, Any] = {"capture_seconds": time.perf_counter() - start}
    found.put("transformers", told)
    racers: dict[str, Racer] = {"transformers": of_steps}
    if ours is not None:
        known = prompt[: case.rows - case.agree - 2]  # few enough that nothing is forgotten
        ours.prime(known)
        peer.prime(known)
        likeliest = []
        for _ in range(case.agree + 1):
            likeliest.append(int(own_reading(ours).logits[0].argmax()))
            _ = ours.tick(likeliest[-1]).token
        same = [step() == token for token in likeliest[1:]]
        told["ticks"], told["same_as_ours"] = case.agree, [*same, False].index(False)
        begin(ours, case)
        racers["kernels"] = functools.partial(of_ticks, ours)
    taken = alternate(racers, -(-case.rounds // 2), case.ticks)
    told |= times(taken["transformers"])
    if ours is not None:
        told["over_kernels"] = ratios(taken["transformers"], taken["kernels"])
    found.put("transformers", told)


def edits(found: Found, device: torch.device) -> None:
    """An edit and the tick after it, beside a tick alone, on the large cache."""
    case = case_of("large")
    checkpoint = checkpoint_of(case, device)
    case = sized(case, device, share=0.5)
    found.put("case", asdict(case))
    kernels = why_no_kernels() is None
    b = opened(checkpoint, case, device, kernels=kernels)
    warmed_up(b)
    found.put("kernels", kernels)
    found.put("correct", correctness(b, case))
    reading = Reads(b)

    def actions(name: str) -> list[Action]:
        row = b.state.position[b.state.valid][len(b) // 3 :][:1]
        at = int(row)
        known: dict[str, list[Action]] = {
            "tick": [],
            "pin": [Pin([at])],
            "cull": [Cull([at])],
            "inject": [Append([9])],
        }
        return known[name]

    def timed(name: str) -> Racer:
        def edit_and_tick(_: int) -> dict[str, float]:
            b.loop.settle()
            batch = actions(name)
            wait(device)
            reading.seconds = 0.0
            start = time.perf_counter()
            if batch:
                b.patch(batch)
            wait(device)
            edited = time.perf_counter()
            _ = b.tick().token
            taken = {"edit": edited - start, "with_tick": time.perf_counter() - start}
            taken["reading"] = reading.seconds
            return {name: seconds * 1e3 for name, seconds in taken.items()}

        return edit_and_tick

    racers = {name: timed(name) for name in ("tick", "pin", "cull", "inject")}
    for _ in range(1 if _tiny() else 4):  # the first looks at the whole mirror; graphs are recorded
        for name, racer in racers.items():
            taken = racer(1)
            if f"first_{name}" not in found.values:
                found.put(f"first_{name}", taken)
    told = alternate(racers, 1 if _tiny() else EDIT_ROUNDS, 1)
    for name, rounds in told.items():
        values = times(rounds)
        if name != "tick":
            both = zip(rounds, told["tick"], strict=True)
            above = [(one["with_tick"] - two["with_tick"], one["reading"]) for one, two in both]
            values["above_a_tick_ms"] = spread(more for more, _ in above)
            values["above_without_its_read_ms"] = spread(more - took for more, took in above)
        found.put(name, values)
    found.put("clocks", clocks(device))


def one_read(shape: str, device: torch.device) -> None:
    """One read by our kernels, started by the host, for Nsight Compute to look at."""
    case = replace(case_of(shape), captured=False)
    b = opened(checkpoint_of(case, device), case, device, kernels=True)
    of_direct_reads(b, 1)
    if device.type == "cuda":
        torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
    of_direct_reads(b, 1)
    if device.type == "cuda":
        torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]


def case_of(step: str) -> Case:
    """The case of a step; with TINY in sizes that can be interpreted, called directly, and only the
    first of them beside others.
    """
    case = CASES[step]
    if not _tiny():
        return case
    ticks, beside = 2 if step == "tinyllama" else 1, step == "smollm2"
    small = replace(case, rows=112, slots=128, rounds=1, ticks=ticks, agree=1, repeated=1)
    return replace(small, captured=False, beside=beside, profiled=int(beside))


def _tiny() -> bool:
    return os.environ.get("TINY", "") not in ("", "0")


def main() -> int:
    """Measures one step; the exit status."""
    step, out = sys.argv[1], Path(sys.argv[2])
    torch_private.silence_profiler()
    device = torch.device(os.environ.get("DEVICE", "cuda"))
    if step == "read":
        one_read("tinyllama", device)
        return 0
    found = Found(out / "gpu.json", step)
    if step == "machine":
        machine(found, device)
    elif step == "edits":
        edits(found, device)
    else:
        reads(case_of(step), found, device)
    return 1 if found.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
