"""What PyTorch's compiler keeps for later starts, and proof that it is as it was left.

The compiler loads the libraries that it finds in its folder without looking at them: one that was
cut short by a full disk ends the process, and one with a wrong byte says wrong words. So it is
given a folder of our own, whose files are sealed by size and SHA-256 and looked at before use.
"""

import contextlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from brain.files import RECORD_BYTES, read_json
from brain.machine.digest import file_sha256
from brain.terminal import note

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
NAME = "positronic-brain-graphs"
SEAL, LOCK = "sealed.json", ".lock"

Sealed = dict[str, tuple[int, str]]
"""Size and SHA-256 of each file, by its path in the folder."""


@contextmanager
def kept_graphs(cache_dir: Path | None = None) -> Iterator[Callable[[], None]]:
    """Within this the compiler keeps what it makes in a folder of ours, and all that it finds there
    is whole. Gives a function that seals what is there, which is also done at the end.

    The folder is in the one that ``TORCHINDUCTOR_CACHE_DIR`` names, else in ``cache_dir`` (default:
    the user's cache folder). If a sealed file is damaged or lost, all are removed, and one line
    says so; so are, without a word, files that a process left unsealed when it was killed. Where
    there can be no such folder, the compiler keeps its files where it always does.
    """
    named = os.environ.get(VARIABLE)
    root = Path(named) if named else cache_dir or user_cache_path("positronic-brain")
    folder = root if root.name == NAME else root / NAME  # of a process that was begun within this
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(folder)
            alone = stack.enter_context(_shared(folder / LOCK))
            with alone() as nobody_else:
                if nobody_else:
                    _sweep(folder)
        except OSError:
            yield lambda: None
            return

        def seal() -> None:
            # What another process is making may be half a file: it is for the last to seal.
            with contextlib.suppress(OSError), alone() as nobody_else:
                if nobody_else:
                    _seal(folder)

        os.environ[VARIABLE] = str(folder)
        try:
            yield seal
        finally:
            if named is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = named
            seal()


def _require_private(folder: Path) -> None:
    """Raises OSError unless this is a folder that nobody but us may write: what lies in it is run,
    and removed.
    """
    status = os.lstat(folder)
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not private or (hasattr(os, "geteuid") and status.st_uid != os.geteuid()):
        raise PermissionError(f"{folder} is not a folder of one's own")


def _sweep(folder: Path) -> None:
    """Removes what is not as it was sealed. Nobody may be using the folder."""
    found = _files(folder)
    try:
        sealed = _read_seal(folder)
        damaged = any(_entry(folder, name) != entry for name, entry in sealed.items())
    except FileNotFoundError as error:
        sealed = {}
        damaged = Path(error.filename or "") != folder / SEAL
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        sealed, damaged = {}, True
    if damaged:
        note(f"{folder}: what was kept of earlier graphs is damaged; they are compiled once more")
        sealed = {}
        (folder / SEAL).unlink(missing_ok=True)
    for name in found - sealed.keys():
        (folder / name).unlink(missing_ok=True)


def _seal(folder: Path) -> None:
    """Writes down every file that is there now, if there is a new one. Nobody else may be using the
    folder. What cannot be sealed is made once more next time.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        sizes = {name: size for name, (size, _) in _read_seal(folder).items()}
        if sizes == {name: (folder / name).stat().st_size for name in _files(folder)}:
            return
    partial = folder / f"{SEAL}.{os.getpid()}"
    try:
        entries = {name: _entry(folder, name) for name in sorted(_files(folder))}
        partial.write_text(json.dumps(entries, indent=1) + "\n", "utf-8")
        partial.replace(folder / SEAL)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _read_seal(folder: Path) -> Sealed:
    told = read_json(folder / SEAL, RECORD_BYTES)
    return {str(name): (int(entry[0]), str(entry[1])) for name, entry in told.items()}


def _files(folder: Path) -> set[str]:
    """All files below the folder but our own."""
    found = set()
    for where, _, names in os.walk(folder):
        found |= {str((Path(where) / name).relative_to(folder)) for name in names}
    return {name for name in found if name != LOCK and not name.startswith(SEAL)}


def _entry(folder: Path, name: str) -> tuple[int, str]:
    path = folder / name
    return path.stat().st_size, file_sha256(path)


@contextmanager
def _shared(path: Path) -> Iterator[Callable[[], contextlib.AbstractContextManager[bool]]]:
    """Marks a folder as in use, by however many. What it gives says, where it is entered, whether
    nobody else uses the folder, and lets nobody begin to until it is left. The lock ends with the
    process. Raises OSError where files cannot be locked.
    """
    if sys.platform == "win32":
        yield lambda: contextlib.nullcontext(False)
        return
    import fcntl

    with path.open("ab") as file:

        @contextmanager
        def alone() -> Iterator[bool]:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
            fcntl.flock(file, fcntl.LOCK_SH)

        fcntl.flock(file, fcntl.LOCK_SH)
        yield alone
