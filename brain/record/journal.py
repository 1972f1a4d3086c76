"""A file of lines that survives a crash: each line carries its own checksum.

A line is the CRC-32 of the rest in eight hex digits, a space, and JSON. A crash can tear only the
last line, while it is written; a torn line counts as not written.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from brain.errors import Refused, Unwritten, one_line
from brain.files import open_plain

LONGEST_LINE = 1 << 26
"""Bytes. The longest command takes less, even with each of its characters escaped."""


class Journal:
    """Adds lines to a file. Each is handed to the system at once, so that it outlives the process;
    a save makes it outlive the machine.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise Refused(f"{path} cannot be written ({one_line(error)})") from None

    def add(self, record: Any) -> None:
        """Writes one line. Raises Unwritten if it cannot be written whole."""
        text = json.dumps(record, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        try:
            written = self._file.write(line)
        except OSError as error:
            raise Unwritten(f"{self._path} cannot be written ({one_line(error)})") from None
        if written != len(line):
            raise Unwritten(f"{self._path} cannot be written: the disk is full")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_journal(path: Path) -> tuple[list[Any], int]:
    """What each line of a journal holds, and the bytes that these lines take: any more are torn.
    Raises Refused if it cannot be read, or a line before the last is damaged.
    """
    records: list[Any] = []
    size = 0
    try:
        with open_plain(path) as file:
            whole = os.fstat(file.fileno()).st_size
            # Line by line, and no more of a line than is ever written: a hole may be terabytes.
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
                record = _record(line[:-1])
                if record is None:
                    if size + len(line) < whole:
                        raise Refused(f"{path} is damaged at line {len(records) + 1}")
                    break
                records.append(record)
                size += len(line)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({one_line(error)})") from None
    if len(line) == LONGEST_LINE:
        raise Refused(f"{path} is damaged at line {len(records) + 1}")
    return records, size


def _record(line: bytes) -> Any:
    """What a line holds, or None if it is damaged."""
    text = line[9:]
    if line[:9] != b"%08x " % zlib.crc32(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
