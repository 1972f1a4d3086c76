"""Files that anybody may have written, and paths as people give them.

The kind and size of a file are checked before it is read. A named pipe would make its reader wait
forever, a device would never end, and a file may claim terabytes that are not on the disk. So only
plain files are opened, and none that is too large is read. Links are followed: caches of models are
made of them.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from platformdirs import user_cache_path, user_data_path

from brain.errors import Refused, one_line

SETTINGS_BYTES = 1 << 22  # the most that a small JSON file may have, like config.json
TOKENIZER_BYTES = 1 << 26
"""The most that a vocabulary may have; Gemma's, the largest known, takes half of that."""
PIECE = 1 << 20
LFS = b"version https://git-lfs."  # how a file begins that stands for one that was not fetched
RECORD_BYTES = 1 << 28  # the most that a file may have that a run has written about itself


def open_plain(path: Path) -> BinaryIO:
    """Opens a plain file for reading. Raises OSError, at once, for anything else, and for what Git
    puts in the place of a large file.
    """
    _require_plain(os.stat(path), path)
    # It may have been exchanged since: a pipe is opened without waiting, and looked at again.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", getattr(os, "O_BINARY", 0)))
    try:
        _require_plain(os.fstat(descriptor), path)
        file = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    if file.peek(len(LFS)).startswith(LFS):
        file.close()
        raise OSError(errno.EINVAL, "it is a pointer of Git LFS: run 'git lfs pull'", str(path))
    return file


def _require_plain(status: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a plain file. Raises OSError, before reading it, if it has more bytes."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        # In pieces: some files do not know their size, and some grow.
        content = bytearray()
        while size <= most and (block := file.read(PIECE)):
            content += block
            size = max(size, len(content))
        if size > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
        return bytes(content)


def read_text(path: Path, most: int) -> str:
    """The same as UTF-8 text. Raises ValueError as well."""
    return read_bytes(path, most).decode("utf-8")


def read_json(path: Path, most: int = SETTINGS_BYTES) -> Any:
    """The same as JSON. Raises ValueError for anything else, as :func:`parse_json` does."""
    return parse_json(read_text(path, most))


def read_object(path: Path, most: int = SETTINGS_BYTES) -> dict[str, Any]:
    """A JSON object from a file. Raises Refused, but FileNotFoundError where there is no file."""
    try:
        found = read_json(path, most)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: cannot be read as JSON ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise Refused(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def parse_json(text: str | bytes) -> Any:
    """Parses JSON in which no object has a key twice: readers disagree about such objects. Raises
    ValueError for anything else, however deeply it is nested.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return made


def require_own(paths: Iterable[Path]) -> None:
    """Raises Refused for the first of these that exists and is neither a plain file nor a folder.
    Through a link, a file elsewhere would be written or truncated; a pipe would block forever.
    """
    for path in paths:
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "a link" if stat.S_ISLNK(mode) else "not a plain file"
            raise Refused(f"{path} is {kind}: remove it, or choose another folder")


def cache_folder(given: Path | None = None) -> Path:
    """Where to keep what is fetched and built: the folder that is given, or the user's. Raises
    Refused if no home folder is known.
    """
    if given is not None:
        return given
    return _users(user_cache_path, "keep files in", "XDG_CACHE_HOME", "cache_dir")


def data_folder() -> Path:
    """Where to keep what a person makes and means to keep. Raises Refused if no home folder is
    known.
    """
    return _users(user_data_path, "keep conversations in", "XDG_DATA_HOME", "talk.folder")


def _users(path_of: Callable[[str], Path], use: str, variable: str, setting: str) -> Path:
    """The user's folder for this program. Raises Refused if it is not known, with what to set."""
    with suppress(RuntimeError):
        found = path_of("positronic-brain")
        if found.is_absolute():
            return found
    raise Refused(
        f"no folder is known to {use}: set HOME (or {variable}) to a whole path, or give "
        f"{setting}=FOLDER"
    )


def given_path(path: str | Path) -> Path:
    """The path with ``~`` replaced by a home folder. Raises Refused if that is not known."""
    if not os.fspath(path).startswith("~"):
        return Path(path)  # ./~ is no home folder
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise Refused(f"{path}: no such home folder is known; give the path in full") from None
