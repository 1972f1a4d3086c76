"""``task=bench``: tokens per second beside the peers that are installed, from one run.

Each engine runs in a process of its own, one at a time, in alternation, so that a drift of the
machine meets all of them; so does the reading of memory, which says how fast any of them could be.
Medians over all repetitions are reported. Ours take the likeliest token, as the others do, unless a
``sampler`` is named on the command line, which the report holds. Writes ``bench.json`` and a
picture for each measure.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from tqdm import tqdm

from brain.checkpoints.gguf_writer import converted_gguf
from brain.checkpoints.hf_config import read_config
from brain.config.settings import device_of, settings_of
from brain.errors import Refused
from brain.measure.bench import plots
from brain.measure.bench.contestants import (
    ENGINES,
    INT8,
    LLAMA_CPP,
    MEMORY,
    PRECISIONS,
    Contestant,
    contestants,
    key_of,
    row_bytes,
    weight_bytes,
    why_missing,
)
from brain.measure.bench.job import WARM_UP_TOKENS, Failed, Job, result_of
from brain.measure.bench.results import engine_rows, limit_rows, scaling_rows
from brain.measure.bench.tables import decode_table, flatness, scaling_table
from brain.opening import MOST_THREADS, model_folder
from brain.terminal import note
from conf.schema import BenchTask, Conf, DType, WeightFormat

DECODE, SCALING = "decode", "scaling"
MEASURES = (DECODE, SCALING)


def run(conf: Conf, run_dir: Path) -> None:
    """Prints one table for each measure. Raises Refused before anything long begins."""
    task = cast(BenchTask, conf.task)
    given = HydraConfig.get().overrides.task
    asked = [override for override in given if key_of(override).partition(".")[0] != "task"]
    keys = {key_of(override) for override in asked}
    precisions = _precisions(task, conf, keys)
    _check(task, conf, precisions)
    _check_untimed(conf, keys)
    bench = _Bench(conf, task, asked, precisions, run_dir)
    for measure in dict.fromkeys(task.measures):
        {DECODE: bench.decode, SCALING: bench.scaling}[measure]()
    for name, reason in bench.missing.items():
        print(f"missing: {name}: {reason}")
    note(f"results and pictures in {run_dir}")


def _precisions(task: BenchTask, conf: Conf, keys: set[str]) -> list[str]:
    """``task.precisions``, whatever else is said, or what ``dtype`` or ``weights`` say where they
    are given. Raises Refused for what cannot be timed together.
    """
    given = [key for key in ("dtype", "weights") if key in keys]
    if task.precisions and given:
        note(f"task.precisions says what is timed: {given[0]} is not looked at")
    if task.precisions:
        return list(task.precisions)
    if conf.weights is WeightFormat.int8:
        if "dtype" in given and conf.dtype is not DType.bfloat16:
            raise Refused(
                f"weights=int8 is timed with dtype=bfloat16 here, not {conf.dtype.value}: leave "
                "out dtype"
            )
        return [INT8]
    if "dtype" in given:
        return [conf.dtype.value]
    return ["float32", "bfloat16", *([] if given else [INT8])]


def _check(task: BenchTask, conf: Conf, precisions: Sequence[str]) -> None:
    known = {
        "measures": (task.measures, MEASURES),
        "engines": (task.engines, ENGINES),
        "scaling_engines": (task.scaling_engines, ENGINES),
        "precisions": (precisions, PRECISIONS),
    }
    for key, (chosen, possible) in known.items():
        for name in chosen:
            if name not in possible:
                raise Refused(f"task.{key}: {name!r} is unknown; use {', '.join(possible)}")
        if not chosen:
            raise Refused(f"task.{key} is empty: use {', '.join(possible)}")
    for name in ("context", "prefill", "tokens", "repeats", "rows"):
        if getattr(task, name) < 1:
            raise Refused(f"task.{name} must be at least 1, not {getattr(task, name)}")
    if conf.threads is not None and not 1 <= conf.threads <= MOST_THREADS:
        raise Refused(f"threads must be 1 to {MOST_THREADS}, not {conf.threads}")
    _check_rows(task, conf)
    settings_of(conf)


def _check_rows(task: BenchTask, conf: Conf) -> None:
    """Raises Refused where rows would not fit, or would be forgotten while they are counted on."""
    decoded = task.tokens + WARM_UP_TOKENS
    needed = max(task.prefill, task.context + decoded)
    if DECODE in task.measures and needed > conf.capacity:
        raise Refused(f"this benchmark needs capacity={needed} or more, not {conf.capacity}")
    if SCALING in task.measures:
        if not task.capacities or not task.counts or min(task.counts) < 1:
            raise Refused("task.capacities and task.counts must hold numbers of at least 1")
        if min(task.capacities) < task.rows + decoded:
            raise Refused(f"task.capacities must be {task.rows + decoded} or more for task.rows")
        if max(task.counts) + decoded > max(task.capacities):
            most = max(task.capacities) - decoded
            raise Refused(f"task.counts must be {most} or less in a capacity of that size")
    if conf.cull.policy != "none" and conf.cull.target is not None:
        _check_target(task, conf.cull.target)


def _check_target(task: BenchTask, target: int) -> None:
    """Raises Refused where a target is not for every capacity, or below the rows to be timed."""
    scales = SCALING in task.measures
    if scales and target > min(task.capacities):
        raise Refused(
            f"cull.target={target} is more than the smallest of task.capacities, "
            f"{min(task.capacities)}: leave it out, for it to be the capacity"
        )
    decode = [task.context] if DECODE in task.measures else []
    held = max([*decode, *([task.rows, *task.counts] if scales else [])])
    needed = held + task.tokens + WARM_UP_TOKENS
    if target < needed:
        raise Refused(
            f"this benchmark needs cull.target={needed} or more, not {target}, so that none of "
            f"{held} rows is forgotten; or leave it out, for it to be the capacity"
        )


def _check_untimed(conf: Conf, keys: set[str]) -> None:
    """Says what is asked for and not looked at; raises Refused where that would mislead."""
    if keys & {"engine", "engine.compiled"}:
        note("task=bench times the engines of task.engines: engine is not looked at")
    if conf.lookup.width:
        raise Refused("a token of task=bench is a plain tick: use lookup=none")


class _Bench:
    """One run: what it was asked for, and what it has measured so far."""

    def __init__(
        self,
        conf: Conf,
        task: BenchTask,
        asked: Sequence[str],
        precisions: Sequence[str],
        run_dir: Path,
    ) -> None:
        self.conf, self.task, self.asked, self.precisions = conf, task, asked, precisions
        self.run_dir = run_dir
        self.folder = model_folder(conf.model, conf.cache_dir)
        self.config = read_config(self.folder / "config.json")
        self.threads = torch.get_num_threads() if conf.threads is None else conf.threads
        self.missing: dict[str, str] = {}
        self._gguf: dict[str, Path] = {}
        self.report = _circumstances(conf, task, self.threads) | {"missing": self.missing}

    def decode(self) -> None:
        """Tokens per second of decode and prefill, and the share of what memory allows."""
        task = self.task
        entries = []
        for precision in self.precisions:
            present = self._present(contestants(task.engines, [precision]))
            entries += [Contestant(MEMORY, precision), *present] if present else []
        jobs = {entry: self._decode_job(entry) for entry in entries}
        runs = self._alternate("decode", jobs)
        rows, limits = engine_rows(runs, task.context, task.prefill), limit_rows(runs)
        if not rows:
            raise Refused("; ".join(f"{n}: {why}" for n, why in self.missing.items()))
        title = (
            f"{self.conf.model.name}, {task.context} tokens in context, capacity "
            f"{self.conf.capacity}, prefill of {task.prefill}, {self.threads} threads"
        )
        print(f"\n{title}; a token of ours is a whole tick")
        print(decode_table(rows, limits))
        print("limit: share of the GB/s that the same bytes were read with; MB: peak above start")
        if any(row["engine"] == LLAMA_CPP for row in rows):
            print("llama-cpp keeps its cache in float16 at every precision; its int8 is Q8_0")
        plots.plot_decode(rows, limits, title, self.run_dir / "decode.png")
        self._write(engines=rows, limits=limits)

    def scaling(self) -> None:
        """Time per token against the count of rows, and against capacity."""
        task = self.task
        capacities = sorted(set(task.capacities))
        counts = sorted(set(task.counts))
        present = self._present(contestants(task.scaling_engines, self.precisions))
        jobs = {
            (entry.engine, entry.precision, capacity): dataclasses.replace(
                self._job(entry, capacity),
                counts=sorted({task.rows, *(counts if capacity == capacities[-1] else ())}),
                # The same buckets at every capacity, so that capacity alone is compared.
                smallest_bucket=min(self.conf.engine.smallest_bucket, capacities[0]),
                capture_all=False,
            )
            for entry in present
            for capacity in capacities
        }
        runs = self._alternate("scaling", jobs)
        rows = scaling_rows(runs)
        if not rows:
            raise Refused("; ".join(f"{n}: {why}" for n, why in self.missing.items()))
        title = f"{self.conf.model.name}, milliseconds per token, {self.threads} threads"
        print(f"\n{title}; a token of ours is a whole tick")
        print(scaling_table(rows, counts, task.rows))
        for line in flatness(rows, task.rows):
            print(line)
        plots.plot_scaling(rows, task.rows, title, self.run_dir / "scaling.png")
        self._write(scaling=rows)

    def _present(self, entries: Sequence[Contestant]) -> list[Contestant]:
        """Those that can be timed here; the others are named as missing."""
        present = []
        for entry in entries:
            reason = why_missing(entry, self.asked)
            if reason is None and entry.engine == LLAMA_CPP:
                try:
                    self._gguf_of(entry.precision)
                except Refused as refusal:
                    reason = str(refusal)
            if reason is None:
                present.append(entry)
            else:
                self._miss(entry.label, reason)
        return present

    def _miss(self, name: str, reason: str) -> None:
        if name not in self.missing:
            self.missing[name] = reason
            note(f"{name} is missing: {reason}")

    def _gguf_of(self, precision: str) -> Path:
        cache = None if self.conf.cache_dir is None else Path(self.conf.cache_dir).expanduser()
        if precision not in self._gguf:
            kind = PRECISIONS[precision].gguf
            self._gguf[precision] = converted_gguf(self.folder, kind, cache_dir=cache)
        return self._gguf[precision]

    def _job(self, entry: Contestant, capacity: int) -> Job:
        is_llama_cpp = entry.engine == LLAMA_CPP
        return Job(
            engine=entry.engine,
            precision=entry.precision,
            folder=str(self.folder),
            device=str(device_of(self.conf.device)),
            threads=self.threads,
            capacity=capacity,
            tokens=self.task.tokens,
            overrides=entry.overrides(self.asked) if entry.is_ours else [],
            gguf=str(self._gguf_of(entry.precision)) if is_llama_cpp else None,
        )

    def _decode_job(self, entry: Contestant) -> Job:
        task, job = self.task, self._job(entry, self.conf.capacity)
        if entry.engine == MEMORY:
            rows = task.context * row_bytes(self.config, entry.precision)
            size = weight_bytes(self.config, entry.precision) + rows
            return dataclasses.replace(job, bytes=size)
        return dataclasses.replace(job, counts=[task.context], prefill=task.prefill)

    def _alternate(self, measure: str, jobs: dict[Any, Job]) -> dict[Any, list[dict[str, Any]]]:
        """Every job in turn, as often as is asked for. One that fails is missing from then on.

        Writes the timings after every round: a long run that is cut short keeps what it has.
        """
        runs: dict[Any, list[dict[str, Any]]] = {key: [] for key in jobs}
        failed = set()
        with tqdm(total=self.task.repeats * len(jobs), unit="run", desc=measure) as bar:
            for _ in range(self.task.repeats):
                for key, job in jobs.items():
                    entry = Contestant(job.engine, job.precision)
                    bar.set_postfix_str(entry.label)
                    if entry not in failed:
                        try:
                            runs[key].append(result_of(job))
                        except Failed as failure:
                            failed.add(entry)
                            bar.clear()
                            self._miss(entry.label, f"failed: {failure}")
                    bar.update()
                named = {
                    key.label if isinstance(key, Contestant) else " ".join(map(str, key)): results
                    for key, results in runs.items()
                }
                self._write(**{f"{measure}_runs": named})
        return runs

    def _write(self, **results: Any) -> None:
        self.report.update(results)
        text = json.dumps(self.report, indent=1) + "\n"
        (self.run_dir / "bench.json").write_text(text, "utf-8")


def _circumstances(conf: Conf, task: BenchTask, threads: int) -> dict[str, Any]:
    """Everything that numbers depend on."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": str(device_of(conf.device)),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "llama-cpp-python": _version("llama-cpp-python"),
        "task": dataclasses.asdict(task),
        "model": conf.model.name,
        "capacity": conf.capacity,
        "command": ["brain", *HydraConfig.get().overrides.task],
    }


def _version(package: str) -> str | None:
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
