"""Talking in a terminal and through a pipe, as a person does."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from brain.record.lock import sole_writer
from fixture_types import CommandLine
from processes import ENVIRONMENT

pytestmark = pytest.mark.usefixtures("smollm2_folder")

FAST = ("engine=native", "dtype=bfloat16", "device=cpu", "capacity=256", "threads=1")
HELLO = "Hello! My name is Ada."


def through_a_pipe(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ["task=talk", f"talk.folder={folder}", *FAST, "talk.longest=16", *options]
    return subprocess.run(
        [sys.executable, "-m", "brain.app", *arguments],
        input=text,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        cwd=folder.parent,
    )


def test_a_pipe_is_answered_and_gone_on_with(tmp_path: Path) -> None:
    """The reply alone is printed, and the next command knows the first."""
    folder = tmp_path / "ada"
    first = through_a_pipe(folder, HELLO, "sampler=greedy")
    assert first.returncode == 0, first.stderr
    assert "refused" not in first.stderr
    assert first.stdout.strip()
    assert "<|im_end|>" not in first.stdout
    second = through_a_pipe(folder, "What is my\nname?\n", "sampler=greedy")
    assert second.returncode == 0, second.stderr
    told = json.loads((folder / "conversation.json").read_text())
    assert [turn["user"] for turn in told["turns"]] == [HELLO, "What is my\nname?"]
    rows = json.loads((folder / "memory.json").read_text())
    assert "Ada" in "".join(row["text"] for row in rows)
    closed = subprocess.run(
        [sys.executable, "-m", "brain.app", "task=talk", f"talk.folder={folder}", *FAST],
        stdin=None,
        preexec_fn=lambda: os.close(0),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (closed.returncode, closed.stderr.count("Traceback")) == (2, 0)
    refused = through_a_pipe(folder, "Hm?", "sampler=greedy", "capacity=128")
    assert refused.returncode == 2
    assert "capacity: 256 in the record, 128 given" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ada"]  # no folder of a run


def test_a_conversation_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    for name in ("../x", ".", "a/b", ""):
        status, _, errors = command_line("task=talk", f"talk.name={name}", *FAST)
        assert status == 2, name
        assert "is no name" in errors
    status, _, errors = command_line("task=talk", *FAST)
    assert (status, "standard input is empty" in errors) == (2, True)
    assert not (tmp_path / "data/positronic-brain/talk/default").exists()  # nothing was said
    folder = tmp_path / "taken"
    folder.mkdir()
    with sole_writer(folder):
        status, _, errors = command_line("task=talk", f"talk.folder={folder}", *FAST)
    assert (status, "choose another folder with talk.name" in errors) == (2, True)


@contextmanager
def terminal(folder: Path, *options: str) -> Iterator[tuple[int, int]]:
    """The program on a terminal of its own: its descriptor and its process."""
    arguments = ["task=talk", f"talk.folder={folder}", *FAST, "talk.longest=400", *options]
    import pty  # here, since some systems have none

    child, descriptor = pty.fork()
    if child == 0:
        os.chdir(folder.parent)
        command = [sys.executable, "-m", "brain.app", *arguments]
        os.execvpe(sys.executable, command, {**ENVIRONMENT, "TERM": "dumb"})
    try:
        yield descriptor, child
    finally:
        os.close(descriptor)
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def read_until(descriptor: int, wanted: str, seconds: float = 60) -> str:
    """What a terminal shows, up to some text."""
    shown, end = "", time.monotonic() + seconds
    while wanted not in shown:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{wanted!r} did not come: {shown[-2000:]!r}"
        try:
            shown += os.read(descriptor, 4096).decode(errors="replace")
        except OSError:
            raise AssertionError(f"it ended before {wanted!r}: {shown[-2000:]!r}") from None
    return shown


def type_line(descriptor: int, text: str) -> None:
    os.write(descriptor, text.encode() + b"\r")


def ended(screen: int, child: int, typed: bytes = b"", seconds: float = 60) -> int:
    """The exit status, once it has ended; what it shows meanwhile is read. ``typed`` is typed again
    and again: a key that comes before there is a prompt may be lost.
    """
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        assert time.monotonic() < end, "it goes on"
        with suppress(OSError):
            os.write(screen, typed)
        if select.select([screen], [], [], 0.3)[0]:
            with suppress(OSError):  # its terminal has gone
                os.read(screen, 4096)


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals like this")
def test_a_person_at_a_terminal(tmp_path: Path) -> None:
    """Says things, asks what is remembered, stops a reply, forgets, and leaves."""
    folder = tmp_path / "ada"
    with terminal(folder) as (screen, child):
        read_until(screen, "/help tells what can be done")
        type_line(screen, "/nonsense")
        assert "is not a command" in read_until(screen, "/help lists them")
        type_line(screen, "/help")
        read_until(screen, "stops a reply")
        type_line(screen, "/regen")
        read_until(screen, "there is no reply yet")
        type_line(screen, '"""Count to a thousand,')
        read_until(screen, "... ")
        type_line(screen, 'in words."""')
        time.sleep(1.5)
        os.write(screen, b"\x03")  # stops the reply, and not the program
        type_line(screen, "/memory")
        told = read_until(screen, "pinned")
        assert "of 256 rows" in told
        os.write(screen, b"\x03")
        read_until(screen, "Ctrl-D or /exit leaves")
        type_line(screen, "/forget thousand")
        read_until(screen, "rows erased")
        type_line(screen, "/pin words")
        read_until(screen, "rows pinned")
        type_line(screen, "/clear")
        read_until(screen, "forgotten;")
        type_line(screen, "/exit")
        assert ended(screen, child) == 0
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"thousand" not in path.read_bytes(), path


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals like this")
def test_a_reply_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "ada"
    with terminal(folder) as (screen, child):
        read_until(screen, "/help tells what can be done")
        type_line(screen, "Tell me a long story about the sea.")
        while not (folder / "tokens.txt").exists() or not (folder / "tokens.txt").stat().st_size:
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    said = (folder / "tokens.txt").read_text().count("\n")
    with terminal(folder) as (screen, child):
        shown = read_until(screen, "> Tell me a long story about the sea.")
        assert "going on after 1 turns" in shown
        end = time.monotonic() + 60
        while (folder / "tokens.txt").read_text().count("\n") <= said + 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        os.write(screen, b"\x03")
        type_line(screen, "/memory")  # what is typed before there is a prompt is not lost
        read_until(screen, "pinned")
        assert ended(screen, child, b"\x04") == 0  # Ctrl-D
