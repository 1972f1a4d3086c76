"""Engines timed beside each other: tables, pictures and ``bench.json``.

Each engine runs in a process of its own, one at a time, in alternation, so that a drift of the
machine meets all of them. So does the reading of memory, which shows how fast any of them could be.
Medians over all repetitions are reported.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from brain.checkpoints import model_folder
from brain.checkpoints.folder import stored_model
from brain.checkpoints.gguf_file import gguf_config, token_bytes
from brain.config.settings import device_of
from brain.errors import Refused
from brain.machine.environment import environment
from brain.measure.bench import plots
from brain.measure.bench.command import (
    Command,
    default_command,
    llama_cpp_command,
    time_command,
)
from brain.measure.bench.contestants import (
    DEFAULT,
    LLAMA_CPP,
    LLAMA_CPP_COMMAND,
    MEMORY,
    PRECISIONS,
    Contestant,
    Precision,
    contestants,
    row_bytes,
    weight_bytes,
    why_missing,
)
from brain.measure.bench.gguf_writer import converted_gguf
from brain.measure.bench.job import Failed, Job, Waiting, result_of
from brain.measure.bench.progress import Progress
from brain.measure.bench.results import command_rows, engine_rows, limit_rows, scaling_rows
from brain.measure.bench.tables import command_table, decode_table, flatness, scaling_table
from brain.terminal import note
from conf.schema import BenchTask, Conf

Runs = dict[Any, list[dict[str, Any]]]


class Comparison:
    """One benchmark: what it was asked for, and what it has measured so far.

    Attributes: ``missing``, who could not be timed, and why; ``interrupted``, whether somebody
    ended it before everything was timed.

    Args:
        conf: all settings.
        task: those of the benchmark.
        command: the arguments of the command line, for the report.
        asked: those of them that our engines take.
        precisions: to time, by name; that of a GGUF file is the only one.
        run_dir: where ``bench.json`` and the pictures go.
    """

    def __init__(
        self,
        conf: Conf,
        task: BenchTask,
        command: Sequence[str],
        asked: Sequence[str],
        precisions: Mapping[str, Precision],
        run_dir: Path,
    ) -> None:
        self.conf, self.task, self.asked, self.precisions = conf, task, asked, list(precisions)
        self.run_dir = run_dir
        self.formats = {**PRECISIONS, **precisions}
        (self.file,) = {formats.file for formats in precisions.values()}
        self.model = self.file or model_folder(conf.model, conf.cache_dir)
        self.config = gguf_config(self.file) if self.file else stored_model(self.model).config
        self.threads = torch.get_num_threads() if conf.threads is None else conf.threads
        self.missing: dict[str, str] = {}
        self.interrupted = False
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
        """Tokens per second of decode and prefill, and the share of what memory allows; and how
        soon the default command says something.
        """
        task = self.task
        entries = []
        for precision in self.precisions:
            present = self._present(contestants(task.engines, [precision]))
            entries += [Contestant(MEMORY, precision), *present] if present else []
        jobs = {entry: self._decode_job(entry) for entry in entries}
        commands = self._commands() if DEFAULT in task.engines else {}
        runs = self._alternate("decode", {**commands, **jobs})
        said = command_rows({entry: runs[entry] for entry in commands})
        timed = {entry: runs[entry] for entry in jobs}
        rows, limits = engine_rows(timed, task.context, task.prefill), limit_rows(timed)
        self._write(commands=said, engines=rows, limits=limits)
        if said:
            print(f"\n{self.conf.model.name}, from the start of the process")
            print(command_table(said))
        if rows:
            title = (
                f"{self.conf.model.name}, {task.context} tokens in context, capacity "
                f"{self.conf.capacity}, prefill of {task.prefill}, {self.threads} threads"
            )
            print(f"\n{title}; a token of ours is a whole tick")
            print(decode_table(rows, limits))
            print(
                "limit: share of the GB/s that the same bytes were read with; MB: peak above start"
            )
            if any(row["engine"] == LLAMA_CPP for row in rows):
                print(f"llama-cpp keeps its cache in float16 at every precision; {self._beside()}")
            plots.plot_decode(rows, limits, title, self.run_dir / "decode.png")
        elif not said:
            self._nobody()

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
            self._nobody()
            return
        self._write(scaling=rows)
        title = f"{self.conf.model.name}, milliseconds per token, {self.threads} threads"
        print(f"\n{title}; a token of ours is a whole tick")
        print(scaling_table(rows, counts, task.rows))
        for line in flatness(rows, task.rows):
            print(line)
        plots.plot_scaling(rows, task.rows, title, self.run_dir / "scaling.png")

    def _beside(self) -> str:
        """What else is not alike in llama.cpp and ours."""
        if self.file is None:
            return "its int8 is Q8_0, its int4 Q4_1"
        return f"ours is in {self.formats[self.precisions[0]].dtype}"

    def _nobody(self) -> None:
        """Raises Refused where nobody could be timed, unless somebody ended it before."""
        if not self.interrupted:
            raise Refused("; ".join(f"{n}: {why}" for n, why in self.missing.items()))

    def _commands(self) -> dict[Contestant, Command]:
        """The default command, and llama.cpp's at the precision that it chooses. Each has been run
        once: what is fetched, built or compiled once is no part of what is timed.
        """
        tokens = self.task.command_tokens
        ours = default_command(self.conf, self.asked, tokens)
        note("running the default command once, to see what it chooses …")
        try:
            precision = time_command(ours, lambda: None)["precision"]
            if self.file is not None:
                (precision,) = self.precisions
        except Failed as failure:
            self._miss(DEFAULT, f"failed: {failure}")
            return {}
        commands = {Contestant(DEFAULT, precision): ours}
        if LLAMA_CPP in self.task.engines:
            entry = Contestant(LLAMA_CPP_COMMAND, precision)
            try:
                reason = self._why_missing(Contestant(LLAMA_CPP, precision))
                if reason is None:
                    gguf = self._gguf_of(precision)
                    command = llama_cpp_command(self.conf, gguf, tokens, self.threads)
                    time_command(command, lambda: None)
                    commands[entry] = command
            except Failed as failure:
                reason = f"failed: {failure}"
            except Refused as refusal:
                reason = str(refusal)
            if reason is not None:
                self._miss(entry.label, reason)
        return commands

    def _present(self, entries: Sequence[Contestant]) -> list[Contestant]:
        """Those that can be timed here; the others are named as missing."""
        present = []
        for entry in entries:
            reason = self._why_missing(entry)
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

    def _why_missing(self, entry: Contestant) -> str | None:
        return why_missing(entry, self.asked, self.formats[entry.precision])

    def _miss(self, name: str, reason: str) -> None:
        if name not in self.missing:
            self.missing[name] = reason
            note(f"{name} is missing: {reason}")

    def _gguf_of(self, precision: str) -> Path:
        if self.file is not None:
            return self.file
        cache = None if self.conf.cache_dir is None else Path(self.conf.cache_dir).expanduser()
        if precision not in self._gguf:
            kind = self.formats[precision].gguf
            self._gguf[precision] = converted_gguf(self.model, kind, cache_dir=cache)
        return self._gguf[precision]

    def _job(self, entry: Contestant, capacity: int) -> Job:
        is_llama_cpp, formats = entry.engine == LLAMA_CPP, self.formats[entry.precision]
        gguf = self._gguf_of(entry.precision) if is_llama_cpp else self.file
        return Job(
            engine=entry.engine,
            precision=entry.precision,
            folder=str(self.model),
            device=str(device_of(self.conf.device)),
            threads=self.threads,
            capacity=capacity,
            tokens=self.task.tokens,
            overrides=entry.overrides(self.asked, formats) if entry.is_ours else [],
            gguf=str(gguf) if is_llama_cpp else None,
            weight_bytes=token_bytes(gguf) if gguf else weight_bytes(self.config, formats),
            row_bytes=row_bytes(self.config, PRECISIONS["float16"] if is_llama_cpp else formats),
        )

    def _decode_job(self, entry: Contestant) -> Job:
        task, job = self.task, self._job(entry, self.conf.capacity)
        if entry.engine == MEMORY:
            return dataclasses.replace(job, bytes=job.weight_bytes + task.context * job.row_bytes)
        return dataclasses.replace(job, counts=[task.context], prefill=task.prefill)

    def _alternate(self, measure: str, jobs: Mapping[Any, Job | Command]) -> Runs:
        """Every job in turn, as often as is asked for. One that fails is missing from then on.

        Writes the timings after every run. Whoever interrupts it gets what there is.
        """
        runs: Runs = {key: [] for key in jobs}
        failed = set()
        progress = Progress(measure, list(jobs), self.task.repeats)
        try:
            for key in self.task.repeats * list(jobs):
                entry = key if isinstance(key, Contestant) else Contestant(*key[:2])
                if entry in failed:
                    progress.drop(key)
                    continue
                try:
                    with progress.run(key, entry.label):
                        runs[key].append(_result(jobs[key], progress.show))
                except Failed as failure:
                    failed.add(entry)
                    progress.clear()
                    self._miss(entry.label, f"failed: {failure}")
                self._write(**{f"{measure}_runs": {_name(key): runs[key] for key in runs}})
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            progress.close()
        return runs

    def _write(self, **results: Any) -> None:
        self.report.update(results)
        text = json.dumps(self.report, indent=1) + "\n"
        (self.run_dir / "bench.json").write_text(text, "utf-8")


def _result(job: Job | Command, waiting: Waiting) -> dict[str, Any]:
    """What one run of a job has measured. Raises Failed."""
    return time_command(job, waiting) if isinstance(job, Command) else result_of(job, waiting)


def _name(key: Any) -> str:
    """Of what is timed, in the report."""
    return key.label if isinstance(key, Contestant) else " ".join(map(str, key))
