"""Gives everything that reads a file, a line or an argument what a stranger might give it.

    python tests/fuzz/fuzz.py [--cases 100000] [--seed 0] [--targets config gguf …] [--out FILE]
    python tests/fuzz/fuzz.py --again gguf:4711 [--seed 0]      # one case again, with its traceback

Every case damages a valid specimen and hands it to the function that loads it, in a worker process.
Allowed is that it is taken, or refused with one line. A crash of the process, a hang, any other
exception, memory taken beyond a gibibyte, a file left behind or touched elsewhere is a finding.
A case is a function of target, seed and index. Leaves with status 1 if there are findings.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fuzzing.worker import (
    READY,
    REFUSED,
    TAKEN,
    Finding,
    Job,
    Outcome,
    Workbench,
    stop_with_parent,
    work,
)

COMMAND_LINES = 4
"""Share of the cases that are command lines, beside the shares in ``fuzzing/targets.py``."""
FEWEST_SECONDS = 60.0
"""For a worker to start in."""


@dataclass
class Account:
    """What has come of all cases so far."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, job: Job, outcome: Outcome) -> None:
        """Notes one case."""
        told = outcome if isinstance(outcome, str) else "findings"
        self.outcomes.setdefault(job.target, Counter())[told] += 1
        if isinstance(outcome, Finding):
            self.findings.append(outcome)

    def to_json(self, seed: int) -> dict[str, Any]:
        """As JSON: numbers for each target, and one example of every kind of finding."""
        kinds: dict[str, list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.key, []).append(finding)
        return {
            "cases": sum(map(Counter.total, self.outcomes.values())),
            "seed": seed,
            "python": platform.python_version(),
            "seconds": round(self.seconds),
            "targets": {
                name: {told: counted[told] for told in (TAKEN, REFUSED, "findings")}
                for name, counted in sorted(self.outcomes.items())
            },
            "findings": [
                {"what": key, "times": len(same), "index": same[0].job.index, "told": same[0].told}
                for key, same in sorted(kinds.items())
            ],
        }


def plan(cases: int, seed: int, targets: Sequence[str]) -> list[Job]:
    """So many cases, shared out among the targets and mixed."""
    from fuzzing.targets import TARGETS

    shares = {name: share for name, (_, share) in TARGETS.items()} | {"command_line": COMMAND_LINES}
    chosen = {name: shares[name] for name in targets or shares}
    whole = sum(chosen.values())
    jobs = []
    for name, share in chosen.items():
        count = max(1, cases * share // whole)
        jobs += [((index + 0.5) / count, Job(name, seed, index)) for index in range(count)]
    return [job for _, job in sorted(jobs, key=lambda pair: (pair[0], pair[1].target))]


def fuzz(jobs: Sequence[Job], seconds: float, scratch: Path) -> Account:
    """Does the jobs in one worker after another: one that dies or hangs is replaced."""
    account, started = Account(), time.monotonic()
    with tqdm(total=len(jobs), desc="fuzzing", unit="case") as bar:
        for job, outcome in _outcomes(jobs, seconds, scratch):
            account.add(job, outcome)
            if isinstance(outcome, Finding):
                bar.write(f"{outcome.key} (index {job.index})", file=sys.stderr)
            bar.set_postfix_str(f"{len(account.findings)} findings", refresh=False)
            bar.update()
    account.seconds = time.monotonic() - started
    return account


def _outcomes(jobs: Sequence[Job], seconds: float, scratch: Path) -> Iterator[tuple[Job, Outcome]]:
    at = 0
    for number in itertools.count():
        if at >= len(jobs):
            return
        with _Worker(scratch / f"worker-{number}", jobs[at:], seconds) as worker:
            for outcome in worker.outcomes():
                yield jobs[at], outcome
                at += 1
            trouble = worker.trouble
        if at < len(jobs):
            # The machine may have been busy: what is slow alone as well is slow.
            with _Worker(scratch / f"worker-{number}-again", [jobs[at]], seconds) as alone:
                outcomes = list(alone.outcomes())
                trouble = alone.trouble or trouble
            job = jobs[at]
            told = Finding(job, f"{job.target}: {trouble}", trouble)
            yield job, outcomes[0] if outcomes else told
            at += 1


class _Worker:
    """A worker process. ``trouble`` says afterwards why it ended early, if it did."""

    def __init__(self, root: Path, jobs: Sequence[Job], seconds: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._root, self._jobs, self._seconds = root, jobs, seconds
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_begin, args=(root, jobs, sender))
        self._process.start()
        sender.close()
        self.trouble = ""

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        shutil.rmtree(self._root, ignore_errors=True)

    def outcomes(self) -> Iterator[Outcome]:
        """What comes of its jobs, as long as it lives and answers."""
        left, limit = len(self._jobs), FEWEST_SECONDS
        while left:
            if not self._receiver.poll(limit):
                self.trouble = f"no answer in {self._seconds:g} seconds"
                return
            try:
                outcome: Outcome = self._receiver.recv()
            except EOFError:
                self._process.join()
                self.trouble = f"the process died ({self._process.exitcode})"
                return
            limit = self._seconds
            if outcome != READY:
                left -= 1
                yield outcome


def _begin(root: Path, jobs: Sequence[Job], results: Any) -> None:
    stop_with_parent()
    work(root, jobs, results)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--seconds-per-case", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="where the summary goes as JSON")
    parser.add_argument("--again", metavar="TARGET:INDEX", help="one case, in this process")
    given = parser.parse_args()
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if os.access(fast, os.W_OK) else None) as scratch:
        if given.again:
            target, index = given.again.split(":")
            print(Workbench(Path(scratch)).do(Job(target, given.seed, int(index))))
            return
        jobs = plan(given.cases, given.seed, given.targets)
        account = fuzz(jobs, given.seconds_per_case, Path(scratch))
    report = account.to_json(given.seed)
    if given.out:
        given.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name, counted in report["targets"].items():
        print(f"{name:<20}" + "".join(f"{number:>8} {told}" for told, number in counted.items()))
    for finding in report["findings"]:
        print(f"{finding['times']:>6} × {finding['what']} (index {finding['index']})")
    sys.exit(bool(account.findings))


if __name__ == "__main__":
    main()
