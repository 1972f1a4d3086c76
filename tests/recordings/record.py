"""Recordings of what a revision of the program does, to be compared with those of another one.

    python tests/recordings/record.py make --revision REV OUT
    python tests/recordings/record.py make --checkout PATH [--cache DIR] OUT
    python tests/recordings/record.py continue BASE OUT --checkout PATH [--cache DIR]
    python tests/recordings/record.py continue BASE OUT --revision REV
    python tests/recordings/record.py compare A B

A change that must not change any output is held against a recording from before it. Bit equality is
promised for one machine and one version of PyTorch only, so both recordings are made on the same
machine. ``--only NAME,NAME`` picks scenarios; ``list`` names them.

``make`` plays every scenario: some thirty short runs of the command line and of the Python API.
It then gives some of the run folders and saves the same command with more ticks, and records that
too. With ``--revision`` the revision is cloned into OUT/checkout and gets an environment and a
cache folder of its own, in OUT/checkout/.venv and OUT/cache. With ``--checkout`` an environment
must be there, in PATH/.venv; what is not committed there is recorded as it is. ``--cache`` names a
cache folder that outlives the recording, so that the next one compiles nothing: give no two
revisions the same one, unless it is meant that one finds what the other has left.

``continue`` takes the run folders and saves of a recording and lets another revision go on with
them: the only question is whether old folders can still be opened and say the same. It is compared
with the recording that it continued, which knows what its own revision said there.

``compare`` prints a line for each scenario and a line for each thing in it that differs, and leaves
with status 1 if anything does. Where one of the two comes from ``continue``, only what was
continued is compared.

A recording is a folder:

    manifest.json                   the revision, versions, and the SHA-256 of everything below
    recorded/NAME/run/              what the scenario left: run folders, saves, files of the API
    recorded/NAME/said/N.stdout     standard output of the scenario's Nth process
    recorded/NAME/said/N.exit       its exit code
    continued/NAME/                 the same of the continuation
    toy/                            a small seeded model with a short trained range
    logs/                           standard error, not compared

Compared are the names of all files, and of each file its bytes, with these exceptions:

* safetensors files are compared tensor by tensor: name, type, shape and bytes, and the metadata.
  ``brain.json`` holds the checksum of the whole file.
* In ``run.json``, ``brain.json``, ``graphs.json``, ``eval.json`` and ``endurance.json`` times,
  memory, versions of PyTorch and Python, the seal over such a version, and the numbers of nodes in
  a graph are blanked. Every key and its place count.
* Of ``hydra.yaml`` and ``multirun.yaml``, which hold paths, and of ``endurance.png``, which shows
  times, only the names are compared.
* Of the table that ``task=graphs`` prints, times and numbers of nodes are blanked.
* Of refused inputs only the exit code is kept: the wording may change.
* What a killed process printed, and the one that went on after it, is not kept: it depends on when
  it was killed. Nor is what ``task=eval`` prints of endurance, which are times.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from comparing import MANIFEST, compare
from contents import CONTINUED, RECORDED, items
from scenarios import PROMPT, Scenario, scenarios
from session import HERE, Session
from toy import write_toy

ROOT = HERE.parents[1]
FORMAT = 1


def clone(revision: str, folder: Path) -> None:
    """Clones a revision of this repository and builds its environment."""
    found = _printed(["git", "-C", str(ROOT), "rev-parse", "--verify", f"{revision}^{{commit}}"])
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", found], check=True)
    subprocess.run(["make", "-C", str(folder), ".venv/.installed"], check=True, stdout=sys.stderr)


def make(out: Path, checkout: Path, cache: Path, chosen: Sequence[Scenario]) -> None:
    """Plays scenarios and what continues them, and writes the manifest."""
    text = "".join(f"{number}. {PROMPT[number:]}\n" for number in range(24))
    write_toy(out / "toy", text)
    progress = Progress([scenario.seconds for scenario in chosen])
    try:
        for scenario in chosen:
            progress.begin(scenario.name)
            session = Session(out, checkout, cache, RECORDED, scenario.name)
            scenario.play(session)
            if scenario.go_on is not None:
                _continue(scenario, out, Session(out, checkout, cache, CONTINUED, scenario.name))
            progress.end()
    finally:  # of what was recorded, if it was cut short
        write_manifest(out, "make", checkout, chosen[: progress.done])


def go_on(base: Path, out: Path, checkout: Path, cache: Path, chosen: Sequence[Scenario]) -> None:
    """Continues the run folders and saves of another recording, and writes the manifest."""
    shutil.copytree(base / "toy", out / "toy")
    able = [scenario for scenario in chosen if scenario.go_on is not None]
    progress = Progress([10.0] * len(able))
    try:
        for scenario in able:
            progress.begin(scenario.name)
            _continue(scenario, base, Session(out, checkout, cache, CONTINUED, scenario.name))
            progress.end()
    finally:
        write_manifest(out, "continue", checkout, able[: progress.done])


def _continue(scenario: Scenario, base: Path, session: Session) -> None:
    assert scenario.go_on is not None
    shutil.copytree(base / RECORDED / scenario.name / "run", session.out / session.folder)
    scenario.go_on(session)


@dataclass
class Progress:
    """Says on standard error what is played, and how much time is left."""

    expected: Sequence[float]
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def begin(self, name: str) -> None:
        """Something begins."""
        passed, known = time.monotonic() - self.started, sum(self.expected[: self.done])
        rate = passed / known if known else 1.0
        left = rate * sum(self.expected[self.done :])
        where = f"{self.done + 1}/{len(self.expected)}"
        _say(f"[{where}] {name} ({passed:.0f} s passed, about {left:.0f} s left)")

    def end(self) -> None:
        """It has ended."""
        self.done += 1
        if self.done == len(self.expected):
            _say(f"all done after {time.monotonic() - self.started:.0f} s")


def write_manifest(out: Path, kind: str, checkout: Path, chosen: Sequence[Scenario]) -> None:
    """Says what was recorded, of what, and the checksum of every item."""
    asked = "import importlib.metadata as m; print(*(m.version(n) for n in ('torch', 'numpy')))"
    names = [scenario.name for scenario in chosen]
    git = ["git", "-C", str(checkout)]
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "revision": _printed([*git, "rev-parse", "HEAD"]),
        "uncommitted": bool(_printed([*git, "status", "--porcelain"])),
        "versions": _printed([str(checkout / ".venv/bin/python"), "-c", asked]),
        "machine": f"{platform.node()} {platform.machine()} {os.cpu_count()} cores",
        "scenarios": names,
        "items": {name: hashlib.sha256(part).hexdigest() for name, part in items(out, names)},
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


# The command line


def _printed(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _new_folder(path: Path) -> Path:
    if path.exists() and any(path.iterdir()):
        sys.exit(f"{path} is not empty: choose another folder")
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def _place(asked: argparse.Namespace, out: Path) -> tuple[Path, Path]:
    """The checkout that is recorded and its cache folder."""
    checkout = out / "checkout" if asked.checkout is None else asked.checkout.resolve()
    cache = (out / "cache" if asked.cache is None else asked.cache).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    if asked.checkout is None:
        clone(asked.revision, checkout)
    if not (checkout / ".venv/bin/brain").exists():
        sys.exit(f"{checkout} has no environment: make -C {checkout} .venv/.installed")
    return checkout, cache


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    what = parser.add_subparsers(dest="what", required=True)
    making = what.add_parser("make", help="play all scenarios and record them")
    continuing = what.add_parser("continue", help="go on with the folders of a recording")
    comparing = what.add_parser("compare", help="say what differs between two recordings")
    what.add_parser("list", help="name the scenarios")
    continuing.add_argument("base", type=Path, help="the recording")
    for player in (making, continuing):
        player.add_argument("out", type=Path, help="a new folder for the recording")
        of = player.add_mutually_exclusive_group(required=True)
        of.add_argument("--revision", help="of this repository; gets an environment of its own")
        of.add_argument("--checkout", type=Path, help="a folder with an environment in .venv")
        player.add_argument("--cache", type=Path, help="cache folder; in OUT if left out")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    for command in (making, continuing, comparing):
        command.add_argument("--only", default="", help="scenarios, separated by commas")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is done gets its manifest
    known = scenarios()
    if asked.what == "list":
        print("\n".join(scenario.name for scenario in known))
        return
    only = [name for name in asked.only.split(",") if name]
    unknown = set(only) - {scenario.name for scenario in known}
    if unknown:
        parser.error(f"unknown scenario {min(unknown)}")
    if asked.what == "compare":
        for folder in (asked.a, asked.b):
            if not (folder / MANIFEST).is_file():
                sys.exit(f"{folder} is not a recording: it has no {MANIFEST}")
        sys.exit(0 if compare(asked.a, asked.b, only) else 1)
    chosen = [scenario for scenario in known if not only or scenario.name in only]
    out = _new_folder(asked.out)
    checkout, cache = _place(asked, out)
    if asked.what == "make":
        make(out, checkout, cache, chosen)
    else:
        go_on(asked.base.resolve(), out, checkout, cache, chosen)


if __name__ == "__main__":
    main()
