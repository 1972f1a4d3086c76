"""``task=run``: prime with the prompt and speak."""

import dataclasses
import json
import platform
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from brain.brain import Brain
from brain.captures import CaptureWriter
from brain.commands import Inbox
from brain.errors import Refused
from brain.heatmap import FILE, remembered, write_rows
from brain.opening import open_brain
from brain.repair import Repair
from brain.terminal import capture_graphs, note
from conf.schema import Conf


def run(conf: Conf, run_dir: Path) -> None:
    """Speaks ``conf.ticks`` tokens on standard output.

    Writes ``transcript.txt`` (the exact text), ``run.json`` (ids, timings, versions),
    ``memory.json`` (what is remembered at the end), ``repairs.jsonl`` (what was replaced, by what,
    when and with what gain) and, if asked to, ``captures/`` into the run folder. Between ticks it
    does what ``commands.jsonl`` there asks for (see ``brain/commands.py``).
    """
    if conf.ticks < 1:
        raise Refused(f"ticks must be at least 1, not {conf.ticks}")
    if not conf.prompt:
        raise Refused('prompt is empty: give some text, prompt="…"')
    if conf.capture_top < 0:
        raise Refused(f"capture_top must be 0 (everything) or more, not {conf.capture_top}")
    note(f"loading {conf.model.name} …")
    started = time.perf_counter()
    brain = open_brain(conf)
    capture_graphs(brain)
    if conf.capture:
        brain.observer = CaptureWriter(run_dir / "captures", brain, conf.capture_top)
    brain.prime(conf.prompt, conf.source)
    if sys.stderr.isatty():
        note(f"\033[2m{conf.prompt}\033[0m")
    primed = time.perf_counter()
    ids, interrupted = _speak(brain, conf, run_dir)
    spoken = time.perf_counter() - primed
    write_rows(remembered(brain), run_dir / FILE)
    _write_report(brain, conf, run_dir / "run.json", ids, primed - started, spoken)
    note(
        f"{len(ids)} tokens in {spoken:.1f} s ({len(ids) / spoken:.1f} per second), "
        f"{len(brain)} of {brain.capacity} rows remembered, ready after {primed - started:.1f} s; "
        f"{run_dir}"
    )
    if interrupted:
        raise KeyboardInterrupt


def _speak(brain: Brain, conf: Conf, run_dir: Path) -> tuple["array[int]", bool]:
    """Prints and records every token and repair; returns the ids of the tokens, and whether Ctrl-C
    cut them short.
    """
    ids = array("q")  # a loop of a million ticks takes 8 MB
    interrupted = False
    with (
        (run_dir / "transcript.txt").open("w", encoding="utf-8", newline="") as record,
        (run_dir / "repairs.jsonl").open("w", encoding="utf-8") as repairs,
    ):

        def say(text: str) -> None:
            record.write(text)
            record.flush()
            sys.stdout.write(text)
            sys.stdout.flush()

        def mended(repair: Repair) -> None:
            repairs.write(json.dumps(repair.to_json()) + "\n")
            repairs.flush()

        brain.on_repair = mended
        inbox = Inbox(run_dir, brain)
        try:
            for tick in brain.stream(conf.ticks, stop_at_eos=conf.stop_at_eos):
                ids.append(tick.token)
                say(tick.text)
                inbox.look()
        except KeyboardInterrupt:
            interrupted = True
        say(brain.finish_text())
    if sys.stdout.isatty():
        sys.stdout.write("\n")
        sys.stdout.flush()
    return ids, interrupted


def _write_report(
    brain: Brain, conf: Conf, path: Path, ids: Sequence[int], ready: float, spoken: float
) -> None:
    report: dict[str, Any] = {
        "model": brain.checkpoint.name,
        "model_sha256": brain.checkpoint.sha256,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(brain.device),
        "dtype": conf.dtype.value,
        "engine": "compiled" if brain.graphs.compiled else "eager",
        "seed": conf.seed,
        "capacity": brain.capacity,
        "rows": len(brain),
        "prompt": conf.prompt,
        "tokens": list(ids),
        "seconds_until_ready": round(ready, 3),
        "seconds_speaking": round(spoken, 3),
        "graphs": [
            {"name": g.name, "compilations": g.compilations, "seconds": round(g.seconds, 3)}
            for g in brain.graphs.captures.values()
        ],
        "sampler": dataclasses.asdict(conf.sampler),
    }
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
