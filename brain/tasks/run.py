"""``task=run``: prime with the prompt and speak."""

import contextlib
import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from brain.auto import resolved
from brain.brain import Brain
from brain.config.settings import engine_name
from brain.errors import MemoryFull, OutputLost, Refused, as_line
from brain.files import given_path
from brain.machine.environment import environment
from brain.machine.graph_cache import kept_graphs
from brain.machine.memory import without_collection
from brain.machine.progress import progress_bar
from brain.machine.signals import asked_to_stop
from brain.opening import open_brain
from brain.record.captures import CaptureWriter
from brain.record.heatmap import FILE, remembered, write_rows
from brain.record.lock import sole_writer
from brain.record.run_folder import CAPTURES, keep_composed
from brain.record.run_record import FAILED, RunRecord, as_recorded
from brain.terminal import capture_graphs, note
from brain.tick import Tick
from conf.schema import Conf

MOST_SHOWN = 1000
"""Characters of the prompt that a terminal repeats, at most."""


def run(conf: Conf, run_dir: Path) -> None:
    """Speaks on standard output until ``conf.ticks`` tokens have been spoken. Raises Refused.

    Writes into the run folder its record (see ``brain/record/run_record.py``), ``run.json`` (ids,
    timings, versions), ``memory.json`` (what is remembered at the end) and, with ``capture=true``,
    ``captures/``; ``failed.txt`` instead of a report where an error ended the text. Where the
    folder has the record of this run already, it goes on with the next token. Between ticks it
    executes what is added to ``commands.jsonl`` there (see ``brain/record/commands.py``).
    """
    if conf.ticks < 1:
        raise Refused(f"ticks must be at least 1, not {conf.ticks}")
    if not conf.prompt:
        raise Refused('prompt is empty: give some text, prompt="…"')
    if conf.capture_top < 0:
        raise Refused(f"capture_top must be 0 (everything) or more, not {conf.capture_top}")
    if conf.save_every < 0:
        raise Refused(f"save_every must be 0 (at the end) or more, not {conf.save_every}")
    with sole_writer(run_dir):
        cache = None if conf.cache_dir is None else given_path(conf.cache_dir)
        note(f"loading {conf.model.name} …")
        conf, reason = resolved(as_recorded(conf, run_dir))
        if reason is not None:
            note(reason)
        graphs = kept_graphs(cache) if conf.engine.captured else nullcontext(lambda: None)
        with graphs as record_graphs:
            _run(conf, run_dir, record_graphs)


def _run(conf: Conf, run_dir: Path, record_graphs: Callable[[], None]) -> None:
    started = time.perf_counter()
    with without_collection():
        brain = open_brain(conf)
        # Graphs of edits take seconds on a CPU: only if there will be repairs, as a prompt needs
        # none. On a GPU they are recorded together with the others.
        edits = brain.graphs.device.type == "cuda" or conf.repair.every > 0
        capture_graphs(brain.graphs, edits=edits)
    record_graphs()
    record = RunRecord(run_dir, brain, conf)

    first, rest = brain.prompt_ids(conf.prompt, conf.source)

    def prime() -> None:
        with progress_bar("reading the prompt"):
            brain.prime(first, conf.source)

    went_on = record.begin(prime, rest)
    keep_composed()
    if conf.capture:
        brain.observer = CaptureWriter(run_dir / CAPTURES, brain, conf.capture_top)
    if went_on and record.heard < len(rest):
        text = len(first) + len(rest)
        note(f"going on after {len(first) + record.heard} of {text} tokens of the text")
    elif went_on:
        note(f"going on after {record.spoken} tokens")
    if sys.stderr.isatty():
        shown = conf.prompt if len(conf.prompt) <= MOST_SHOWN else f"…{conf.prompt[-MOST_SHOWN:]}"
        note(f"\033[2m{shown}\033[0m")
    try:
        if rest:
            _hear(brain, record, len(first), len(rest))
        primed, before = time.perf_counter(), record.spoken
        ended = _speak(brain, conf, record)
    except BrokenPipeError:  # the reader of the text has left: nothing has failed
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk may be what failed
            (run_dir / FAILED).write_text(f"{as_line(str(error))}\n", "utf-8")
        raise
    count, spoken = record.spoken - before, time.perf_counter() - primed
    write_rows(remembered(brain), run_dir / FILE)
    _write_report(brain, conf, run_dir / "run.json", record.tokens(), primed - started, spoken)
    note(
        f"{count} tokens in {spoken:.1f} s ({count / max(spoken, 1e-9):.1f} per second), "
        f"{len(brain)} of {brain.capacity} rows remembered, ready after {primed - started:.1f} s; "
        f"{run_dir}"
    )
    counts = brain.lookahead.counts
    if counts.proposed:
        note(
            f"lookup: {counts.tokens / counts.passes:.2f} tokens per read, {counts.accepted} of "
            f"{counts.proposed} proposed tokens accepted"
        )
    if ended is not None:
        raise ended


def _hear(brain: Brain, record: RunRecord, first: int, rest: int) -> None:
    """Reads what is left of a text that does not fit. Raises KeyboardInterrupt if it is asked to
    stop, when what has been read is saved.
    """
    started, before = time.perf_counter(), record.heard
    with (
        asked_to_stop() as asked,
        progress_bar("reading", rest, "token", initial=before, leave=False) as bar,
    ):
        for size in record.hear():
            bar.set_postfix_str(f"{_forgotten(brain, first, record)} rows forgotten", refresh=False)
            bar.update(size)
            if asked():
                break
        stopped = asked()
    seconds, heard = time.perf_counter() - started, record.heard - before
    if stopped or record.heard < rest:
        record.save()
        record.close()
        note(f"{first + record.heard} of {first + rest} tokens are read; the same command goes on")
        raise KeyboardInterrupt
    if heard:
        note(
            f"read {first + rest} tokens of text, {heard} of them in {seconds:.1f} s with "
            f"forgetting ({heard / max(seconds, 1e-9):.0f} per second): {len(brain)} rows "
            f"remembered, {_forgotten(brain, first, record)} forgotten"
        )


def _forgotten(brain: Brain, first: int, record: RunRecord) -> int:
    """Rows of the text that are not there any more; its last token has none yet."""
    return first + record.heard - int(brain.memory.account.uncommitted) - len(brain)


def _speak(brain: Brain, conf: Conf, record: RunRecord) -> BaseException | None:
    """Prints and records every token until there are enough. Returns what ended it before that (a
    request to stop, a full memory, or output that is lost), to be raised when everything is
    written.

    A device that works by itself is sent the next tick before the token of the last one has
    arrived, so that it need not wait for the host. Only where something depends on that token, or
    on the memory as it is then, everything is waited for, printed and recorded first: a text that
    may end, a command, a save, a request to stop, and what :attr:`Brain.may_queue` says.
    """
    ending = brain.tokenizer.eos_ids if conf.stop_at_eos else frozenset()
    before, on_terminal = record.spoken, sys.stdout.isatty()
    ended: BaseException | None = None
    queue: deque[tuple[Tick, ...]] = deque()  # launched, and not recorded yet

    def may_queue() -> bool:
        if not brain.may_queue or ending:
            return False
        return not (asked() or record.inbox.has_news or record.is_save_due)

    with asked_to_stop() as asked:
        record.inbox.poll()  # what came after the last token, if the run was killed
        try:
            while (due := conf.ticks - record.spoken - sum(map(len, queue))) > 0:
                if record.last in ending or ended:
                    break
                queue.append(brain.speak(due))
                is_last = due == len(queue[-1])
                while queue and (len(queue) > 1 or is_last or not may_queue()):
                    _print(record.record_ticks(*queue.popleft()))
                if not queue:
                    record.inbox.poll()
                    record.save_if_due()
                    ended = KeyboardInterrupt() if asked() else None
        except (MemoryFull, OutputLost) as error:  # the end of a run with cull=none, or of a disk
            ended = error
        left = "".join(record.record_ticks(*ticks) for ticks in queue)
        record.save()
        remainder = brain.finish_text()
        record.finish(remainder)
        if record.spoken > before and not isinstance(ended, OutputLost):
            try:
                _print(left + remainder + ("\n" if on_terminal else ""))
            except OutputLost as error:
                ended = ended or error
        if isinstance(ended, OutputLost) and on_terminal:  # it has gone, as a signal says, too
            ended = KeyboardInterrupt()
    return ended


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_report(
    brain: Brain, conf: Conf, path: Path, ids: Sequence[int], ready: float, spoken: float
) -> None:
    here = environment(brain.device)
    report: dict[str, Any] = {
        "model": brain.checkpoint.name,
        "model_sha256": brain.checkpoint.sha256,
        **{fact: here[fact] for fact in ("torch", "python", "device")},
        "dtype": conf.dtype.value,
        "weights": conf.weights.value,
        "positions": conf.positions.value,
        "cull": conf.cull.policy,
        "engine": engine_name(conf.engine),
        "seed": conf.seed,
        "capacity": brain.capacity,
        "rows": len(brain),
        "prompt": conf.prompt,
        "tokens": list(ids),
        "seconds_until_ready": round(ready, 3),
        "seconds_speaking": round(spoken, 3),
        "lookup": dataclasses.asdict(brain.lookahead.counts),
        "graphs": [
            {"name": g.name, "compilations": g.compilations, "seconds": round(g.seconds, 3)}
            for g in brain.graphs.captured.values()
        ],
        "sampler": dataclasses.asdict(conf.sampler),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, "utf-8", errors="backslashreplace")  # a path may not be text
