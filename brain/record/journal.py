"""Lines that are added one at a time and survive a crash: each carries its own checksum.

A line is the CRC-32 of the rest in eight hex digits, a space, and JSON. Only the last one can be
torn, by a crash while it was written; it is then as if it had never been begun.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from brain.errors import Refused, Unwritten, one_line
from brain.files import open_plain

LONGEST_LINE = 1 << 26
"""Bytes; the longest command, each of its characters written out, takes less."""


class Journal:
    """Adds lines to a file. What is written is in the hands of the system at once, so that it
    outlives the process; to outlive the machine it takes a save.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise Refused(f"{path} cannot be written ({one_line(error)})") from None

    def add(self, record: Any) -> None:
        """Writes one line. Raises Unwritten if it does not fit on the disk."""
        line = _line(record)
        try:
            written = self._file.write(line)
        except OSError as error:
            raise Unwritten(f"{self._path} cannot be written ({one_line(error)})") from None
        if written != len(line):
            raise Unwritten(f"{self._path} cannot be written: the disk is full")

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()


def read_journal(path: Path) -> tuple[list[Any], int]:
    """The records of a journal, and the bytes they take: what comes after them is torn.

    Raises Refused if it cannot be read, or if a line is damaged that is not the last.
    """
    records: list[Any] = []
    size = 0
    try:
        with open_plain(path) as file:
            whole = os.fstat(file.fileno()).st_size
            # A line at a time, none longer than any that is written: a hole may be terabytes.
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
                record = _record(line[:-1])
                if record is None and size + len(line) < whole:
                    raise Refused(f"{path} is damaged in line {len(records) + 1}")
                if record is None:
                    break
                records.append(record)
                size += len(line)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({one_line(error)})") from None
    if len(line) == LONGEST_LINE:
        raise Refused(f"{path} is damaged in line {len(records) + 1}")
    return records, size


def _line(record: Any) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _record(line: bytes) -> Any:
    """What a line says, or None if it is damaged."""
    text = line[9:]
    if line[:9] != b"%08x " % zlib.crc32(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
