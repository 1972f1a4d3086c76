"""``task=command`` reaches a brain that runs, or one that runs later."""

import json
import subprocess
import time
from pathlib import Path

from brain.record.commands import ANSWERS
from processes import ENVIRONMENT, call, command


def test_a_command_to_a_run_that_has_ended_waits_for_it(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["prompt=abc", "ticks=4", "capacity=32", "hydra.run.dir=out"]
    call(tmp_path, tiny_folder, *arguments)
    order = '[{"do": "inject", "text": "hi", "source": "tool"}]'
    done = call(tmp_path, tiny_folder, "task=command", "task.path=out", f"task.actions={order}")
    assert "is not running" in done.stderr
    assert not (tmp_path / "out" / ANSWERS).exists()
    call(tmp_path, tiny_folder, *arguments)
    assert (tmp_path / "out" / ANSWERS).exists()


def test_a_running_brain_takes_commands(tiny_folder: Path, tmp_path: Path) -> None:
    running = subprocess.Popen(
        command(
            tiny_folder,
            "prompt=Hello there",
            "ticks=1000000",
            "capacity=64",
            "hydra.run.dir=out",
        ),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        out = tmp_path / "out"
        deadline = time.monotonic() + 60
        while not (out / "transcript.txt").exists() or not (out / "transcript.txt").stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        batch = '[{"do":"pin","positions":[0]},{"do":"inject","text":"now","source":"system"}]'
        call(tmp_path, tiny_folder, "task=command", "task.path=out", f"task.actions={batch}")
        while not (out / ANSWERS).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = json.loads((out / ANSWERS).read_text().splitlines()[0])
        assert answer["applied"] == 2, answer
    finally:
        running.kill()
        running.wait()
