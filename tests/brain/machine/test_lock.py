"""Locks between processes: alone or shared, and gone with the process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from brain.machine.lock import exclusive, shared

HOLDER = """
import sys, time
from pathlib import Path
from brain.machine.lock import exclusive, shared
with {kind}(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path: Path, kind: str) -> subprocess.Popen[str]:
    """A process that holds the lock, until it is killed."""
    command = [sys.executable, "-c", HOLDER.format(kind=kind), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["exclusive", "shared"])
def test_a_lock_keeps_another_process_out_and_ends_with_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = holder(path, kind)
    try:
        with pytest.raises(TimeoutError, match="locked by another process"), exclusive(path, 0.1):
            raise AssertionError
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with exclusive(path, 5):
        pass


def test_shared_locks_stand_side_by_side_and_know_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with shared(path) as alone:
        with alone() as nobody_else:
            assert nobody_else
        with shared(path) as other:
            with alone() as nobody_else:
                assert not nobody_else
            with other() as nobody_else:
                assert not nobody_else
        with alone() as nobody_else:
            assert nobody_else


def test_an_error_while_alone_leaves_the_lock_shared(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with shared(path) as alone:
        with pytest.raises(ZeroDivisionError), alone():
            raise ZeroDivisionError
        with shared(path):
            pass


def test_two_threads_of_a_process_exclude_each_other(tmp_path: Path) -> None:
    path, inside, most = tmp_path / ".lock", [0], [0]

    def enter() -> None:
        for _ in range(5):
            with exclusive(path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.002)
                inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_patience_is_rewarded(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = holder(path, "exclusive")
    threading.Timer(0.3, process.kill).start()
    with exclusive(path, 30):
        assert process.wait() == -signal.SIGKILL


def test_a_lock_file_that_was_removed_keeps_nobody_out_of_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with exclusive(path):
        path.unlink()
        with exclusive(path, 1):
            assert path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no links and pipes as on Unix")
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_not_locked(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    for lock in (exclusive, shared):
        with pytest.raises(OSError, match=r"\.lock"), lock(path):
            raise AssertionError
    assert not (tmp_path / "elsewhere").exists()
