"""What an evaluation has measured so far, part by part, in its folder: it may be ended at any time,
and the same command goes on. A part is what one policy made of one text.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from brain.errors import Refused
from brain.files import require_own
from brain.record.journal import Journal, read_journal

FILE = "parts.jsonl"

Key = tuple[str | int, ...]
Made = TypeVar("Made")


class Parts:
    """The parts of one folder.

    Args:
        folder: of the run.
        about: what every part depends on; JSON can hold it. It is written with the first part.
    Raises:
        Refused: the folder holds parts of another evaluation, or a damaged file.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._path = path = folder / FILE
        require_own([path])
        self._about = json.loads(json.dumps(about))  # as it will be found again
        self._journal: Journal | None = None
        self._known: dict[Key, Any] = {}
        if not path.exists():
            return
        records, size = read_journal(path)
        if records:
            _require_same(records[0], self._about, folder)
            try:
                self._known = {tuple(key): found for key, found in records[1:]}
            except (TypeError, ValueError):
                raise Refused(f"{path} is damaged: it holds something that is no part") from None
        os.truncate(path, size)  # what a crash tore

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: Key) -> bool:
        return key in self._known

    def read(self, key: Key, parse: Callable[[Any], Made]) -> Made:
        """What ``parse`` makes of a part. Raises Refused where it can make nothing of it."""
        try:
            return parse(self._known[key])
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
            raise Refused(
                f"{self._path} is damaged: it holds something else for {' '.join(map(str, key))}"
            ) from None

    def keep(self, key: Key, found: Any) -> None:
        """Adds a part, as JSON has it. Raises Unwritten, with nothing added, if that fails."""
        if self._journal is None:
            self._journal = Journal(self._path)
            if not self._path.stat().st_size:
                self._journal.add(self._about)
        self._journal.add([list(key), found])
        self._known[key] = found

    def close(self) -> None:
        """Closes the file."""
        if self._journal is not None:
            self._journal.close()


def _require_same(found: Any, about: dict[str, Any], folder: Path) -> None:
    if not isinstance(found, dict):
        raise Refused(f"{folder / FILE} is damaged: its first line is no description")
    for key in sorted({*found, *about}):
        if found.get(key) != about.get(key):
            raise Refused(
                f"{folder} holds an evaluation with another {key} ({_short(found.get(key))}, not "
                f"{_short(about.get(key))}): give the same, or another hydra.run.dir"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
