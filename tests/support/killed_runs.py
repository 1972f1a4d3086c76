"""Runs that are killed amid a write, and what is compared of their records."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from brain.record.commands import ANSWERS, INBOX

RECORD = ("transcript.txt", "tokens.txt", "repairs.jsonl", ANSWERS)

ORDERS = {
    5: '[{"do": "pin", "positions": [3]}]',
    11: '[{"do": "inject", "text": " hello", "source": "tool"}]',
    16: '[{"do": "cull", "positions": [99999]}]',
    24: '[{"do": "boost", "positions": [4], "amount": 3}, {"do": "inject", "text": "é"}]',
}


class Killed(BaseException):
    """Power is cut here."""


_CHANGES = ("open", "os.rename", "os.truncate", "os.remove", "os.mkdir", "shutil.rmtree")
_left = [0]


def _may_be_killed(event: str, arguments: object) -> None:
    if _left[0] > 0 and event in _CHANGES:
        _left[0] -= 1
        if _left[0] == 0:
            raise Killed


sys.addaudithook(_may_be_killed)  # for good: it does nothing unless asked to


@contextlib.contextmanager
def power_cut_at(nth: int) -> Iterator[None]:
    """Raises Killed at the nth time that a file is opened, renamed, cut or removed in the body."""
    _left[0] = nth
    try:
        yield
    finally:
        _left[0] = 0


def was_sent(folder: Path, order: str) -> bool:
    return (folder / INBOX).exists() and order in (folder / INBOX).read_text("utf-8")
