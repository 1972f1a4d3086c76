"""``task=command``: change what a running brain remembers."""

from pathlib import Path
from typing import cast

from brain.errors import Refused
from brain.files import given_path
from brain.record.commands import ANSWERS, parse_batch, send
from brain.record.lock import is_taken
from brain.terminal import note
from conf.schema import CommandTask, Conf


def run(conf: Conf, run_dir: Path) -> None:
    """Sends one batch of actions to the run in ``task.path``. Raises Refused if it is malformed;
    whether the brain applies it is in its ``answers.jsonl``.
    """
    task = cast(CommandTask, conf.task)
    if task.path is None:
        raise Refused("task.path is missing: give the folder of a running brain")
    if task.actions is None:
        raise Refused('task.actions is missing: give a JSON list, like [{"do":"pin",…}]')
    parse_batch(task.actions, lambda text, *_, **__: [0] if text else [])
    folder = given_path(task.path)
    send(folder, task.actions)
    if is_taken(folder):
        note(f"sent; the answer will be in {folder / ANSWERS}")
    else:
        note(f"sent, but {folder} is not running: it will be executed when that run goes on")
