"""Kills a running brain at random moments and shows that nothing is lost.

    python profiles/soak.py FOLDER KILLS brain prompt="…" ticks=20000 engine=compiled …

Runs the command once undisturbed, in FOLDER/whole, and once in FOLDER/killed with SIGKILL at so
many random moments, each time followed by the same command. Then compares transcript, tokens,
memory and the last save, byte for byte; leaves with status 1 if anything differs.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

COMPARED = ("transcript.txt", "tokens.txt", "memory.json", "repairs.jsonl")


def soak(
    command: Sequence[str],
    folder: Path,
    kills: int,
    seed: int = 0,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, list[str]]:
    """Returns how often the run was killed, and what differs in the end."""
    whole, killed = folder / "whole", folder / "killed"
    started = time.monotonic()
    _process(command, whole, environment).wait()
    length = (whole / "tokens.txt").stat().st_size
    draw, done = random.Random(seed), 0
    longest = 10 + 4 * (time.monotonic() - started)
    # Evenly over the run, each at a random moment of its part of it; some while it starts.
    marks = [length * (part + draw.random()) / (kills + 1) for part in range(kills)]
    for mark in tqdm(marks, desc="killing", unit="kill"):
        running = _process(command, killed, environment)
        deadline = time.monotonic() + longest
        if draw.random() < 0.2:
            deadline = time.monotonic() + 3 * draw.random()
        while running.poll() is None and time.monotonic() < deadline:
            if _size(killed / "tokens.txt") >= mark:
                break
            time.sleep(0.005)
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
            done += 1
        running.wait()
    _process(command, killed, environment).wait()
    return done, _differing(whole, killed)


def _process(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*command, f"hydra.run.dir={folder}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _differing(whole: Path, killed: Path) -> list[str]:
    names = [name for name in COMPARED if _content(whole / name) != _content(killed / name)]
    last = [_last_save(folder) for folder in (whole, killed)]
    if last[0] is None or last[0] != last[1]:
        names.append("saves")
    return names


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _last_save(folder: Path) -> tuple[str, str] | None:
    """The number of the newest save, and the checksum of its tensors: of the whole state."""
    numbers = [path.name for path in (folder / "saves").iterdir() if path.name.isdecimal()]
    if not numbers:
        return None
    newest = max(numbers, key=int)
    described = json.loads((folder / "saves" / newest / "brain.json").read_text("utf-8"))
    return newest, described["sha256"]


def main() -> None:
    """The command line."""
    if len(sys.argv) < 4 or not sys.argv[2].isdecimal():
        sys.exit("usage: python profiles/soak.py FOLDER KILLS COMMAND …")
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: choose another folder")
    kills, differing = soak(sys.argv[3:], folder, int(sys.argv[2]), environment=os.environ)
    spoken = len((folder / "killed" / "tokens.txt").read_text().splitlines())
    print(f"{kills} kills, {spoken} tokens; differing: {', '.join(differing) or 'nothing'}")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
