"""Engines timed beside each other: tables, pictures and ``bench.json``.

Each engine runs in a process of its own, one at a time, in alternation, so that a drift of the
machine meets all of them. So does the reading of memory, which shows how fast any of them could be.
Medians over all repetitions are reported.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from brain.checkpoints import model_folder
from brain.checkpoints.folder import stored_model
from brain.config.settings import device_of
from brain.errors import Refused
from brain.machine.environment import environment
from brain.machine.progress import progress_bar
from brain.measure.bench import plots
from brain.measure.bench.contestants import (
    LLAMA_CPP,
    MEMORY,
    PRECISIONS,
    Contestant,
    contestants,
    row_bytes,
    weight_bytes,
    why_missing,
)
from brain.measure.bench.gguf_writer import converted_gguf
from brain.measure.bench.job import Failed, Job, result_of
from brain.measure.bench.results import engine_rows, limit_rows, scaling_rows
from brain.measure.bench.tables import decode_table, flatness, scaling_table
from brain.terminal import note
from conf.schema import BenchTask, Conf


class Comparison:
    """One benchmark: what it was asked for, and what it has measured so far.

    Args:
        conf: all settings.
        task: those of the benchmark.
        command: the arguments of the command line, for the report.
        asked: those of them that our engines take.
        precisions: to time.
        run_dir: where ``bench.json`` and the pictures go.
    """

    def __init__(
        self,
        conf: Conf,
        task: BenchTask,
        command: Sequence[str],
        asked: Sequence[str],
        precisions: Sequence[str],
        run_dir: Path,
    ) -> None:
        self.conf, self.task, self.asked, self.precisions = conf, task, asked, precisions
        self.run_dir = run_dir
        self.folder = model_folder(conf.model, conf.cache_dir)
        self.config = stored_model(self.folder).config
        self.threads = torch.get_num_threads() if conf.threads is None else conf.threads
        self.missing: dict[str, str] = {}
        self._gguf: dict[str, Path] = {}
        here = environment(device_of(conf.device))
        self.report = {
            "platform": here["platform"],
            "processor": here["processor"],
            "cores": here["cores"],
            "threads": self.threads,
            "device": here["device"],
            "torch": here["torch"],
            "transformers": here["transformers"],
            "llama-cpp-python": here["llama-cpp-python"],
            "task": dataclasses.asdict(task),
            "model": conf.model.name,
            "capacity": conf.capacity,
            "command": ["brain", *command],
            "missing": self.missing,
        }

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
        with progress_bar(measure, self.task.repeats * len(jobs), "run") as bar:
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
