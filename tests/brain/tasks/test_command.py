"""``task=command`` reaches a brain that runs, or one that runs later."""

import json
import subprocess
import time
from pathlib import Path

from brain.record.commands import ANSWERS
from fixture_types import CommandLine
from processes import ENVIRONMENT, command


def test_a_command_to_a_run_that_has_ended_waits_for_it(
    tiny_command_line: CommandLine, tmp_path: Path
) -> None:
    arguments = ["prompt=abc", "ticks=4", "capacity=32", "hydra.run.dir=out"]
    assert tiny_command_line(*arguments)[0] == 0
    order = '[{"do": "inject", "text": "hi", "source": "tool"}]'
    task = ["task=command", "task.path=out", f"task.actions={order}"]
    status, _, told = tiny_command_line(*task)
    assert status == 0
    assert "is not running" in told
    assert not (tmp_path / "out" / ANSWERS).exists()
    assert tiny_command_line(*arguments)[0] == 0
    assert (tmp_path / "out" / ANSWERS).exists()


def test_a_running_brain_takes_commands(
    tiny_folder: Path, tmp_path: Path, tiny_command_line: CommandLine
) -> None:
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
        task = ["task=command", "task.path=out", f"task.actions={batch}"]
        assert tiny_command_line(*task)[0] == 0
        while not (out / ANSWERS).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = json.loads((out / ANSWERS).read_text().splitlines()[0])
        assert answer["applied"] == 2, answer
    finally:
        running.kill()
        running.wait()
