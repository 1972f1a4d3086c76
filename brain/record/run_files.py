"""The files of a run that grow while it speaks: its text, its tokens, its repairs, its answers.

They can be cut back to what they were when a save was made. Two of them can be replaced together
with a save: their new content is a draft beside them until the save is there.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from brain.errors import Refused, one_line
from brain.files import read_bytes
from brain.machine.integrity import to_disk
from brain.record.commands import ANSWERS

TRANSCRIPT, TOKENS, REPAIRS = "transcript.txt", "tokens.txt", "repairs.jsonl"
OPEN = (TRANSCRIPT, TOKENS, REPAIRS)  # those that are kept open for the whole run
ALL = (*OPEN, ANSWERS)
DRAFT = ".rewritten"
MOST_TOKEN_BYTES = 1 << 32  # of ``tokens.txt``: some hundred million tokens


class RunFiles:
    """The growing files in one run folder; ``streams`` are those that are open, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.streams: dict[str, IO[str]] = {}

    def draft(self, name: str, number: int) -> Path:
        """Where the content lies that replaces a file when the save of this number is made."""
        return self._folder / f"{name}.{number}{DRAFT}"

    def open(self, name: str, mode: str) -> None:
        """Opens a file for writing, ``mode`` "w" or "a". Raises OSError."""
        self.streams[name] = (self._folder / name).open(mode, encoding="utf-8", newline="")

    def append(self, name: str, text: str) -> None:
        """Hands text to the system, so that it outlives this process. Raises OSError."""
        self.streams[name].write(text)
        self.streams[name].flush()

    def close(self) -> None:
        """Closes all files."""
        for stream in self.streams.values():
            stream.close()

    def tokens(self) -> list[tuple[int, int]]:
        """Tick and id of every token in ``tokens.txt``. Raises Refused if it is damaged."""
        path = self._folder / TOKENS
        try:
            pairs = [line.split() for line in read_bytes(path, MOST_TOKEN_BYTES).splitlines()]
            return [(int(tick), int(token)) for tick, token in pairs]
        except (OSError, ValueError) as error:
            raise Refused(f"{path} is damaged ({one_line(error)})") from None

    def sizes(self, number: int) -> dict[str, int]:
        """Bytes of each file, or of its draft for the save of this number."""
        sizes = {}
        for name in (*self.streams, ANSWERS):
            paths = (self.draft(name, number), self._folder / name)
            sizes[name] = next((path.stat().st_size for path in paths if path.exists()), 0)
        return sizes

    def to_disk(self, number: int) -> None:
        """Waits until all files and the drafts of this number would survive a power cut."""
        for name in (*self.streams, ANSWERS):
            for path in (self._folder / name, self.draft(name, number)):
                if path.exists():
                    to_disk(path)
        to_disk(self._folder)

    def replace(self, name: str, number: int) -> None:
        """Puts a draft in the place of an open file. Raises OSError."""
        self.streams[name].close()
        self.draft(name, number).replace(self._folder / name)
        self.open(name, "a")

    def remove_drafts(self) -> None:
        """Removes all drafts. Raises OSError."""
        for draft in self._folder.glob(f"*{DRAFT}"):
            draft.unlink()

    def cut_back(self, number: int, sizes: Mapping[str, int]) -> None:
        """Makes the files what they were at the save of this number, when they had ``sizes`` bytes,
        and opens them for more. Raises Refused if one is missing, or shorter than it was.
        """
        for name in ALL:
            path, size = self._folder / name, sizes.get(name, 0)
            draft = self.draft(name, number)
            if draft.exists():
                draft.replace(path)
            if path.exists():
                if path.stat().st_size < size:
                    raise Refused(
                        f"{path} has {path.stat().st_size} bytes, but had {size} when the run was "
                        "saved: choose another folder"
                    )
                os.truncate(path, size)
            elif size:
                raise Refused(f"{path} is missing: choose another folder")
            if name in OPEN:
                self.open(name, "a")
        self.remove_drafts()
